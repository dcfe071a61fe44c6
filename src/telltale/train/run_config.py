"""Settings of the plain training loop."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.config import check_choice, check_integer, check_range, from_mapping, from_yaml
from telltale.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know. Batch and sequence sizes are in tokens of the corpus; rates are per optimizer step."""

    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 50
    """Steps of linear warm-up; never more than a tenth of ``steps``."""
    schedule: str = "cosine"
    """"cosine" to a tenth of the peak, or "constant"."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    activation_checkpointing: bool = False
    precision: str = "bfloat16"
    """Autocast precision of the forward: "bfloat16" or "float32". Weights and optimizer state are float32."""
    seed: int = 0
    """Seed of what the caller draws (initial weights), and of the batches unless ``data_seed`` is given."""
    data_seed: int | None = None
    """Seed of the batches. None: ``seed``."""
    log_every: int = 10
    evaluate_every: int = 100
    evaluation_tokens: int = 16384
    """Held-out tokens per evaluation."""
    checkpoint_every: int = 100
    """Steps between checkpoints; an interrupted run saves one as well."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "evaluate_every", "checkpoint_every"):
            check_integer(name, getattr(self, name), low=1)
        for name in ("warmup_steps", "seed"):
            check_integer(name, getattr(self, name), low=0)
        if self.data_seed is not None:
            check_integer("data_seed", self.data_seed, low=0)
        for name in ("sequence_length", "evaluation_tokens"):
            check_integer(name, getattr(self, name), low=2)
        check_range("learning_rate", self.learning_rate, low=0.0)
        check_range("weight_decay", self.weight_decay, low=0.0)
        check_range("grad_clip", self.grad_clip, low=0.0)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_choice("precision", self.precision, ("bfloat16", "float32"))
        check_choice("activation_checkpointing", self.activation_checkpointing, (True, False))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ConfigError(f"betas={self.betas!r} is not allowed; expected two numbers.")
        for beta in self.betas:
            check_range("betas", beta, low=0.0, below=1.0)
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of gradient_accumulation={self.gradient_accumulation}."
            )

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read the configuration from a YAML file of its fields."""
        return from_yaml(cls, path)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build the configuration from a mapping; an unknown key raises ConfigError."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain YAML values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, 0-based."""
        warmup = min(self.warmup_steps, self.steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
