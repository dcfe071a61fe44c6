"""The cross-entropy method over discrete actions: one categorical distribution per step of the horizon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from telltale.config import check_integer, check_range
from telltale.errors import ConfigError
from telltale.world.planners.problem import Plan, Problem
from telltale.world.planners.sampling import check_horizon, elites_of


@dataclass(frozen=True)
class CategoricalCEM:
    """Sample sequences, keep the elites, move the probabilities towards their frequencies by ``1 - alpha``.

    ``floor`` is the least probability of any action. The executed plan is the best sequence seen.
    """

    samples: int = 96
    iterations: int = 3
    elites: float = 0.1
    alpha: float = 0.1
    floor: float = 0.02
    horizon: int | None = None
    name: ClassVar[str] = "categorical_cem"
    kinds: ClassVar[tuple[str, ...]] = ("discrete",)

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, low=2)
        check_integer("iterations", self.iterations, low=1)
        check_range("elites", self.elites, low=0.0, high=1.0)
        check_range("alpha", self.alpha, low=0.0, below=1.0)
        check_range("floor", self.floor, low=0.0, below=0.5)
        check_horizon(self.horizon)
        if self.samples * self.elites < 1:
            raise ConfigError(f"elites={self.elites} of samples={self.samples} is less than one; raise either.")

    def plan(self, problem: Problem, belief: Tensor, *, generator: torch.Generator, warm: Tensor | None = None) -> Plan:
        """A plan (B, H) int64 for every row of ``belief`` (B, D). ``warm``: probabilities (B, H, actions)."""
        assert problem.actions is not None
        count, horizon = problem.actions, problem.horizon
        chances = warm if warm is not None else belief.new_full((len(belief), horizon, count), 1.0 / count)
        keep = max(1, int(self.samples * self.elites))
        noise_of_model = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        best_plan = torch.zeros((len(belief), horizon), dtype=torch.int64)
        value = belief.new_full((len(belief),), -float("inf"))
        for _ in range(self.iterations):
            # one draw of Gumbel noise serves every start, as in the continuous planners
            uniform = torch.rand((self.samples, horizon, count), generator=generator).clamp(1e-12, 1 - 1e-7)
            gumbel = -torch.log(-torch.log(uniform))
            candidates = (chances.clamp(min=1e-12).log().unsqueeze(1) + gumbel).argmax(-1)
            scores = problem.score(belief, candidates, noise_of_model)
            best, elite = elites_of(scores, candidates, keep)
            frequency = functional.one_hot(elite, count).to(chances.dtype).mean(1)
            chances = self.alpha * chances + (1 - self.alpha) * frequency
            chances = chances.clamp(min=self.floor) / chances.clamp(min=self.floor).sum(-1, keepdim=True)
            better = best[:, 0] > value
            best_plan = torch.where(better.unsqueeze(1), elite[:, 0], best_plan)
            value = torch.maximum(best[:, 0], value)
        warm_next = torch.cat([chances[:, 1:], chances.new_full((len(chances), 1, count), 1.0 / count)], 1)
        return Plan(best_plan, value, self.iterations * self.samples * horizon, warm_next)
