"""Training of small vision transformers from scratch: the embedded default pair, an edge and a server on digit scenes.

The classes are Transformers' own (``ViTForImageClassification``); a checkpoint is an ordinary Hugging Face folder with the
``preprocessor_config.json`` that says how pixels are normalised. Users bring their own checkpoints; nothing else needs this.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_integer, check_range, check_seed
from telltale.models.loading import without_progress_bars
from telltale.runs.files import atomic_directory
from telltale.tasks import scenes

Batches = Iterator[tuple[np.ndarray, np.ndarray]]
"""Images (batch, height, width, 3) uint8 and labels (batch,) int64, without end."""


@dataclass(frozen=True)
class ClassifierConfig:
    """A vision transformer and its training. Pixels are normalised as (value / 255 - mean) / std, the same in each channel.

    ``dropped``: largest share of patches that a step hides from the model (0: never; a server trained with 0.9 knows subsets).
    """

    image_size: int = 32
    patch_size: int = 4
    width: int = 48
    layers: int = 2
    heads: int = 4
    labels: tuple[str, ...] = tuple(str(label) for label in range(scenes.CLASSES))
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    mean: float = 0.5
    std: float = 0.5
    dropped: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "layers", "heads", "steps", "batch_size"):
            check_integer(name, getattr(self, name), low=1)
        check_range("learning_rate", self.learning_rate, low=0.0)
        check_range("std", self.std, low=1e-6)
        check_range("dropped", self.dropped, low=0.0, below=1.0)
        check_seed(self.seed)


class ClassifierTraining:
    """One model on its way: :meth:`run` does steps, :meth:`state` and :meth:`restore` carry it over a restart."""

    def __init__(self, config: ClassifierConfig) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model: Any = ViTForImageClassification(
                ViTConfig(
                    image_size=config.image_size,
                    patch_size=config.patch_size,
                    hidden_size=config.width,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    intermediate_size=2 * config.width,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    id2label=dict(enumerate(config.labels)),
                    label2id={name: number for number, name in enumerate(config.labels)},
                )
            )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
        )
        self.done = 0

    def run(
        self, batches: Batches, *, seconds: float | None = None, tell: Callable[[int, float], None] | None = None
    ) -> bool:
        """Train until the config's steps are done (True) or ``seconds`` have passed (False); ``tell`` gets step and loss."""
        end = None if seconds is None else time.monotonic() + seconds
        self.model.train()
        while self.done < self.config.steps:
            if end is not None and time.monotonic() > end:
                return False
            images, labels = next(batches)
            loss = self._step(torch.from_numpy(images), torch.from_numpy(labels))
            self.done += 1
            if tell is not None:
                tell(self.done, loss)
        self.model.eval()
        return True

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        kept = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return {**kept, "done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]

    def save(self, path: str | Path) -> None:
        """Write the model as a Hugging Face folder, whole or not at all."""
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": self.config.image_size, "width": self.config.image_size},
            "resample": 2,
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [self.config.mean] * 3,
            "image_std": [self.config.std] * 3,
        }
        with atomic_directory(path) as aside, without_progress_bars():
            self.model.save_pretrained(aside)
            (aside / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))

    def _step(self, images: Tensor, labels: Tensor) -> float:
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.config.mean) / self.config.std
        if self.config.dropped:
            from telltale.models.vision import partial_forward

            patches = (self.config.image_size // self.config.patch_size) ** 2
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.done)
            share = self.config.dropped * torch.rand((), generator=generator).item()
            kept = max(1, round((1 - share) * patches))
            order = torch.rand((len(images), patches), generator=generator).argsort(dim=1)
            logits = partial_forward(self.model, pixels, order[:, :kept])
        else:
            logits = self.model(pixel_values=pixels).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


DEFAULT_EDGE = ClassifierConfig(width=48, layers=2, steps=300, mean=0.1, std=0.3)
DEFAULT_SERVER = ClassifierConfig(width=64, layers=4, steps=600, mean=0.1, std=0.3, seed=100)
SMALL_EDGE = ClassifierConfig(width=32, layers=1, heads=2, steps=160, mean=0.1, std=0.3, batch_size=64)
SMALL_SERVER = ClassifierConfig(width=48, layers=2, steps=300, mean=0.1, std=0.3, batch_size=64, seed=100)


def train_pair(
    folder: str | Path,
    *,
    edge: ClassifierConfig = DEFAULT_EDGE,
    server: ClassifierConfig = DEFAULT_SERVER,
    tell: Callable[[str, int, int, float], None] | None = None,
) -> tuple[Path, Path]:
    """The embedded default: an edge and a server model of digit scenes, in ``folder/edge`` and ``folder/server``.

    Models that are there already are kept, so that an interrupted run goes on. ``tell`` gets name, step, steps and loss.
    """
    for name, config in (("edge", edge), ("server", server)):
        target = Path(folder) / name
        if (target / "config.json").exists():
            continue
        training = ClassifierTraining(config)
        batches = scenes.batches(config.batch_size, seed=config.seed)

        def told(step: int, loss: float, name: str = name, steps: int = config.steps) -> None:
            if tell is not None:
                tell(name, step, steps, loss)

        training.run(batches, tell=told)
        training.save(target)
    return Path(folder) / "edge", Path(folder) / "server"
