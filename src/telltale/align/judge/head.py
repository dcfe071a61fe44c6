"""From hidden states to a score that adds up: regression, decorrelation, gate.

r = W h, score = sum_i g_i (r T)_i = sum_j c_j r_j with c = g T^t (ArmoRM, arXiv 2406.12845). Always in float32: in half precision
the order of the largest coefficients changes. State-dict names and shapes are those of the official checkpoint.

The gate says which objectives count for a prompt (stage 2b): g = softmax(MLP(h_g) / tau) over the K objectives, times a learnable
scale; ReLU, three hidden layers of 1,024, tau = 10. The softmax is over the last axis. The released script takes the axis of the
pair instead, which makes every weight one half and leaves the MLP without a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.align.judge.feature_range import FeatureRange
from telltale.config import check_integer, check_range, from_mapping
from telltale.errors import ConfigError, DataError


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


@dataclass(frozen=True)
class HeadOutput:
    """What the head gives for B responses, float32: everything that a score is made of."""

    rewards: Tensor
    """r = W h, (B, K), raw."""
    weights: Tensor
    """logit_scale * g, (B, K), times the factors of objectives if there are some."""
    coefficients: Tensor
    """c = weights T^t, (B, K): what a unit of each raw reward adds to the score."""

    @property
    def score(self) -> Tensor:
        """sum_j c_j r_j, (B,) float64, in which products of float32 numbers are exact."""
        return (self.coefficients.double() * self.rewards.double()).sum(-1)


class Head(nn.Module):
    """K named objectives on hidden states of ``hidden_size``, weighed by a gate on prompt states of ``prompt_size``.

    ``nuisances`` name objectives that T takes out; the gate gives them no weight (unless its config says otherwise).
    ``intercept`` gives every objective one, and ``range_directions`` above 0 keep where the features lie that the judge was fitted
    on; the official checkpoint has neither.
    Raises :class:`~telltale.errors.ConfigError` for no or repeated objectives or an unknown nuisance.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        hidden_size: int,
        *,
        prompt_size: int | None = None,
        gate: GateConfig | None = None,
        nuisances: Sequence[str] = (),
        intercept: bool = False,
        range_directions: int = 0,
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.nuisances = tuple(nuisances)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives={list(objectives)} are not allowed; expected at least one, each once.")
        unknown = [name for name in self.nuisances if name not in self.objectives]
        if unknown:
            raise ConfigError(f"nuisance {unknown[0]!r} is no objective; expected one of {', '.join(self.objectives)}.")
        count = len(self.objectives)
        config = gate or GateConfig()
        self.regression_layer = nn.Linear(hidden_size, count, bias=intercept)
        self.regression_layer.requires_grad_(False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(count), requires_grad=False)
        self.feature_range = FeatureRange(hidden_size, range_directions) if range_directions else None
        masked = self.nuisance_columns if config.mask_nuisances else ()
        self.gating = Gate(prompt_size or hidden_size, count, config, masked=masked)

    @property
    def has_intercept(self) -> bool:
        """Whether objectives have intercepts."""
        return self.regression_layer.bias is not None

    @property
    def nuisance_columns(self) -> tuple[int, ...]:
        """Positions of the nuisances among the objectives."""
        return tuple(self.objectives.index(name) for name in self.nuisances)

    def rewards(self, hidden: Tensor) -> Tensor:
        """r = W h, or W h + b: (..., d) -> (..., K), float32."""
        bias: Tensor | None = self.regression_layer.bias
        return nn.functional.linear(
            hidden.float(), self.regression_layer.weight.float(), None if bias is None else bias.float()
        )

    def transformed(self, rewards: Tensor) -> Tensor:
        """The decorrelated rewards r T: (..., K) -> (..., K)."""
        return rewards @ self.reward_transform_matrix.to(rewards.dtype)

    def weights(self, prompt: Tensor) -> Tensor:
        """logit_scale * g: (..., prompt size) -> (..., K), float32."""
        found: Tensor = self.gating(prompt)
        return found

    def scaled_transform(self, factors: Mapping[str, float]) -> Tensor:
        """T diag(f), (K, K): f_i is the factor of objective i, 1 where ``factors`` has none.

        sum_i f_i g_i (r T)_i = sum_i g_i (r T diag(f))_i, so factors can be kept in the transform.
        """
        return self.reward_transform_matrix * self._factor_row(factors)

    def forward(self, hidden: Tensor, prompt: Tensor, *, factors: Mapping[str, float] | None = None) -> HeadOutput:
        """``hidden`` (B, d) of the responses and ``prompt`` (B, prompt size) of their prompts.

        ``factors`` multiply the gate's weights of some objectives.
        Raises :class:`~telltale.errors.DataError` unless there is one prompt state for each response.
        """
        if hidden.shape[:-1] != prompt.shape[:-1]:
            raise DataError(
                f"hidden states have shape {tuple(hidden.shape)} and prompt states {tuple(prompt.shape)}; expected one prompt "
                f"state for each response."
            )
        rewards, weights, given = self.rewards(hidden), self.weights(prompt), factors or {}
        # The factors go into the transform, so that a judge saved with them gives the same bits.
        coefficients = weights @ self.scaled_transform(given).to(weights.dtype).T
        return HeadOutput(rewards, weights * self._factor_row(given).to(weights.dtype), coefficients)

    def _factor_row(self, factors: Mapping[str, float]) -> Tensor:
        return self.reward_transform_matrix.new_tensor([factors.get(name, 1.0) for name in self.objectives])

    @torch.no_grad()
    def set_regression(self, weights: Tensor, intercept: Tensor | None = None) -> None:
        """Take W (K, d), and b (K,) where the head has intercepts, from a ridge fit."""
        self.regression_layer.weight.copy_(weights)
        if self.has_intercept and intercept is not None:
            self.regression_layer.bias.copy_(intercept)

    @torch.no_grad()
    def set_transform(self, transform: Tensor) -> None:
        """Take T (K, K) from a decorrelation."""
        self.reward_transform_matrix.copy_(transform)


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


def normalised_entropy(distribution: Tensor) -> float:
    """Mean entropy of rows (n, K) over that of equal weights on the same support: 1 is a gate that does not choose."""
    logs = torch.where(distribution > 0, distribution.clamp_min(1e-30).log(), torch.zeros_like(distribution))
    support = (distribution > 0).sum(-1).clamp_min(2)
    return float((-(distribution * logs).sum(-1) / support.log()).mean())
