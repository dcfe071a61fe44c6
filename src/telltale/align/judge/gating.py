"""The gate: which objectives count for this prompt. A small MLP on the prompt's hidden state, softmaxed over objectives.

ArmoRM (arXiv 2406.12845), stage 2b: g = softmax(MLP(h_g) / tau) over the K objectives, times a learnable scale; ReLU, three
hidden layers of 1,024, tau = 10. The softmax is over the last axis whatever stands before it: the released script takes the
pair axis, which makes every weight one half and leaves the MLP without a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.configuration import check_integer, check_range, from_mapping
from telltale.errors import ConfigError


@dataclass(frozen=True)
class GateConfig:
    """Shape of the gate and how it is trained; defaults are the paper's where it has them."""

    hidden: int = 1024
    layers: int = 3
    """Hidden layers."""
    temperature: float = 10.0
    dropout: float = 0.0
    mask_nuisances: bool = True
    """A decorrelated nuisance has reward 0: weight on it would be a free way to abstain."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 2000
    batch_size: int = 1024
    initial_scale: float | None = None
    """Of the weights; None: so that margins under equal weights have a standard deviation of 1 (the paper starts at 100)."""
    held_out: float = 0.2
    """Part of the prompts to stop by; a fit keeps as large a part to compare on, first."""
    evaluate_every: int = 20
    patience: int = 15
    """Evaluations without a better held-out loss after which training stops."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "steps", "batch_size", "evaluate_every", "patience"):
            check_integer(name, getattr(self, name), low=1)
        check_range("temperature", self.temperature, low=1e-6)
        check_range("dropout", self.dropout, low=0.0, below=1.0)
        check_range("learning_rate", self.learning_rate, low=0.0)
        check_range("weight_decay", self.weight_decay, low=0.0)
        check_range("held_out", self.held_out, low=0.01, high=0.9)
        if self.initial_scale is not None:
            check_range("initial_scale", self.initial_scale, low=1e-9)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GateConfig:
        """From a mapping; an unknown key raises :class:`~telltale.errors.ConfigError`."""
        return from_mapping(cls, values)


class Gate(nn.Module):
    """Prompt states (..., prompt size) -> weights (..., K), each row positive and summing to ``logit_scale``.

    ``masked`` objectives get weight 0. Parameters have the official names: ``layers.N.weight``, ``layers.N.bias``, ``logit_scale``.
    """

    def __init__(
        self, prompt_size: int, objectives: int, config: GateConfig | None = None, *, masked: Sequence[int] = ()
    ) -> None:
        super().__init__()
        check_integer("prompt_size", prompt_size, low=1)
        check_integer("objectives", objectives, low=1)
        self.config = config or GateConfig()
        self.prompt_size, self.objectives = prompt_size, objectives
        if len(set(masked)) >= objectives:
            raise ConfigError(
                f"all {objectives} objectives are masked out of the gate; expected at least one to weigh."
            )
        sizes = [prompt_size, *[self.config.hidden] * self.config.layers, objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.masked_columns = tuple(sorted(set(masked)))

    @property
    def masked(self) -> Tensor:
        """(K,) bool: objectives without weight."""
        return torch.isin(torch.arange(self.objectives), torch.tensor(self.masked_columns, dtype=torch.long))

    def logits(self, prompt: Tensor) -> Tensor:
        """Before the softmax, divided by the temperature; -inf where masked. (..., prompt size) -> (..., K), float32."""
        hidden = prompt.float()
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
            if self.training and self.config.dropout:
                hidden = nn.functional.dropout(hidden, self.config.dropout)
        found: Tensor = self.layers[-1](hidden) / self.config.temperature
        return found.masked_fill(self.masked.to(found.device), -torch.inf) if self.masked_columns else found

    def distribution(self, prompt: Tensor) -> Tensor:
        """g, (..., K): positive, sums to 1."""
        return self.logits(prompt).softmax(-1)

    def forward(self, prompt: Tensor) -> Tensor:
        """logit_scale * g, (..., K)."""
        return self.logit_scale * self.distribution(prompt)

    @torch.no_grad()
    def absorb_standardisation(self, mean: Tensor, deviation: Tensor) -> None:
        """Make the first layer take raw states where it was trained on (state - mean) / deviation, both (prompt size,)."""
        first: Any = self.layers[0]
        first.bias.sub_(first.weight @ (mean / deviation))
        first.weight.div_(deviation)


def entropy_share(distribution: Tensor) -> float:
    """Mean entropy of rows (n, K) over that of equal weights on the same support: 1 is a gate that does not choose."""
    logs = torch.where(distribution > 0, distribution.clamp_min(1e-30).log(), torch.zeros_like(distribution))
    support = (distribution > 0).sum(-1).clamp_min(2)
    return float((-(distribution * logs).sum(-1) / support.log()).mean())
