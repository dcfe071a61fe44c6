"""What a planner is given, and what it returns: a model with reward, ending, laws and an action space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError
from telltale.world.laws.law import Enforcement, InfeasibleLaw, Law
from telltale.world.protocol import Adapted
from telltale.world.randomness import copy_of
from telltale.world.rollouts import RewardFunction, TerminationFunction, Trajectory, rollout


@dataclass(frozen=True)
class Problem:
    """A decision to make in imagination. ``low`` and ``high`` (A,) bound continuous actions; ``actions`` counts discrete ones.

    ``reward`` and ``terminated`` are known functions, or None for the model's own. ``goal`` and ``step_price`` serve the
    search in plain states.
    """

    model: Adapted
    horizon: int
    low: Tensor | None = None
    high: Tensor | None = None
    actions: int | None = None
    reward: RewardFunction | None = None
    terminated: TerminationFunction | None = None
    laws: Sequence[Law] = ()
    enforced: Enforcement = field(default_factory=Enforcement)
    goal: Callable[[Any], bool] | None = None

    @property
    def kind(self) -> str:
        """continuous, discrete or plain: what a planner has to cope with."""
        if self.goal is not None:
            return "plain"
        return "discrete" if self.actions is not None else "continuous"

    def score(self, belief: Tensor, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """Imagined returns (B, N) of ``candidates`` (B, N, H, A) or (B, N, H) from ``belief`` (B, D).

        Every candidate replays the state of ``generator``, which does not move. A candidate that a shield forbids, or for
        which the model's prediction breaks down, is worth -inf.

        Raises :class:`~telltale.world.protocol.DivergedError` or :class:`~telltale.world.laws.law.InfeasibleLaw` if none of a
        start's candidates is worth more.
        """
        batch, count = candidates.shape[:2]
        imagined = self._imagined(
            belief.unsqueeze(1).expand(-1, count, -1).flatten(0, 1), candidates.flatten(0, 1), generator, tolerate=True
        )
        scores = imagined.returns().reshape(batch, count)
        lost = (scores == -float("inf")).all(1)
        if bool(lost.any()):
            row = int(lost.nonzero()[0])
            self._imagined(belief[row : row + 1].expand(count, -1), candidates[row], generator, tolerate=False)
            hard = ", ".join(law.name for law in self.laws if law.hard)
            raise InfeasibleLaw(
                f"each of the {count} candidates from start {row} breaks a hard law ({hard}) under mode {self.enforced.mode}; "
                f"raise samples, or check that the laws can be met."
            )
        return scores

    def _imagined(self, belief: Tensor, actions: Tensor, generator: torch.Generator, *, tolerate: bool) -> Trajectory:
        return rollout(
            self.model,
            belief,
            actions,
            reward=self.reward,
            terminated=self.terminated,
            laws=self.laws,
            mode=self.enforced,
            generator=copy_of(generator),
            common=True,
            record=False,
            tolerate=tolerate,
        )

    def settled(self, belief: Tensor, mean: Tensor, best: Tensor, generator: torch.Generator) -> Tensor:
        """``mean`` (B, H, A) where it may be executed; under a shield ``best`` where the mean of lawful plans is not lawful."""
        if self.enforced.mode != "shield":
            return mean
        forbidden = self._imagined(belief, mean, generator, tolerate=True).log_weights.mean(0) == -float("inf")
        return torch.where(forbidden[:, None, None], best, mean)


@dataclass(frozen=True)
class Plan:
    """Actions (B, H, A), (B, H) for discrete ones, or a list of plain actions per start; ``value`` (B,) as imagined.

    ``found`` says per start whether a search reached its goal. ``steps`` counts the model transitions that planning took.
    """

    actions: Any
    value: Tensor
    steps: int
    warm: Any = None
    found: list[bool] = field(default_factory=list)

    def first(self) -> Any:
        """The first action of every start."""
        return (
            self.actions[:, 0]
            if isinstance(self.actions, Tensor)
            else [plan[0] if plan else None for plan in self.actions]
        )


def check_fits(planner: Any, problem: Problem, names: Sequence[str]) -> None:
    """Raise :class:`~telltale.errors.ConfigError` with ``names`` of planners that fit, unless ``planner`` does."""
    if problem.kind not in planner.kinds:
        raise ConfigError(
            f"planner {planner.name} plans {' and '.join(planner.kinds)} actions, but the world's are {problem.kind}; "
            f"use one of: {', '.join(names)}."
        )
