"""From hidden states to a score that adds up: regression, decorrelation, gate.

r = W h, score = sum_i g_i (r T)_i = sum_j c_j r_j with c = g T^t (ArmoRM, arXiv 2406.12845). Always in float32: in half precision
the order of the largest coefficients changes. State-dict names and shapes are those of the official checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telltale.align.judge.gating import Gate, GateConfig
from telltale.errors import ConfigError, DataError


@dataclass(frozen=True)
class HeadOutput:
    """Of B responses and K objectives, float32 but for the score."""

    rewards: Tensor
    """r = W h, (B, K), raw."""
    weights: Tensor
    """logit_scale * g, (B, K)."""
    coefficients: Tensor
    """c = weights T^t, (B, K): what a unit of each raw reward adds to the score."""
    contributions: Tensor
    """c * r, (B, K)."""
    score: Tensor
    """(B,) float64, the sum of the contributions."""


class Head(nn.Module):
    """K named objectives on hidden states of ``hidden_size``, weighed by a gate on prompt states of ``prompt_size``.

    ``nuisances`` name objectives that T takes out; the gate gives them no weight (unless its config says otherwise).
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
        self.regression_layer = nn.Linear(hidden_size, count, bias=False)
        self.regression_layer.weight.requires_grad_(False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(count), requires_grad=False)
        masked = self.nuisance_columns if config.mask_nuisances else ()
        self.gating = Gate(prompt_size or hidden_size, count, config, masked=masked)

    @property
    def nuisance_columns(self) -> tuple[int, ...]:
        """Positions of the nuisances among the objectives."""
        return tuple(self.objectives.index(name) for name in self.nuisances)

    def rewards(self, hidden: Tensor) -> Tensor:
        """r = W h: (..., d) -> (..., K), float32."""
        return nn.functional.linear(hidden.float(), self.regression_layer.weight.float())

    def transformed(self, rewards: Tensor) -> Tensor:
        """r T: (..., K) -> (..., K)."""
        return rewards @ self.reward_transform_matrix.to(rewards.dtype)

    def weights(self, prompt: Tensor) -> Tensor:
        """logit_scale * g: (..., prompt size) -> (..., K), float32."""
        found: Tensor = self.gating(prompt)
        return found

    def coefficients(self, weights: Tensor) -> Tensor:
        """c = weights T^t: (..., K) -> (..., K)."""
        return weights @ self.reward_transform_matrix.to(weights.dtype).T

    def forward(self, hidden: Tensor, prompt: Tensor) -> HeadOutput:
        """``hidden`` (B, d) of the responses and ``prompt`` (B, prompt size) of their prompts.

        Raises :class:`~telltale.errors.DataError` unless there is one prompt state for each response.
        """
        if hidden.shape[:-1] != prompt.shape[:-1]:
            raise DataError(
                f"hidden states have shape {tuple(hidden.shape)} and prompt states {tuple(prompt.shape)}; expected one prompt "
                f"state for each response."
            )
        rewards, weights = self.rewards(hidden), self.weights(prompt)
        coefficients = self.coefficients(weights)
        # The product of two float32 numbers is exact in float64.
        contributions = coefficients.double() * rewards.double()
        return HeadOutput(rewards, weights, coefficients, contributions.float(), contributions.sum(-1))

    @torch.no_grad()
    def set_regression(self, weights: Tensor) -> None:
        """Take W (K, d) from a ridge fit."""
        self.regression_layer.weight.copy_(weights)

    @torch.no_grad()
    def set_transform(self, transform: Tensor) -> None:
        """Take T (K, K) from a decorrelation."""
        self.reward_transform_matrix.copy_(transform)
