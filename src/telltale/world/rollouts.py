"""The level-2 query: from a belief and an action sequence to a trajectory, with laws acting on every particle.

p(tau | z_0, a_{1:H}, c) is proportional to phi_c(tau) * prod_t p(z_t | z_{t-1}, a_t) (arXiv 2604.22748, section 4). All
rows of a rollout replay the same random numbers when ``common`` is set, so that candidates of a planner and the two
branches of a counterfactual differ by their actions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError
from telltale.world.laws.law import (
    Enforcement,
    InfeasibleLaw,
    Law,
    any_hard_violation,
    enforcement,
    project,
    violations,
)
from telltale.world.protocol import Adapted, adapt, check_finite, check_predicted
from telltale.world.randomness import copy_of, seeded

REDRAWS = 8
"""How often ``reject`` draws a step again before it gives up on a row without one lawful particle."""

RewardFunction = Callable[[Any, Any, Any], Tensor]
TerminationFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """P particles of B rows over H steps. ``beliefs`` (P, B, H + 1, D); ``rewards`` (P, B, H) or None.

    ``alive`` (P, B, H): whether the episode had not ended before that step. ``log_weights`` (P, B): log phi_c of mode
    ``penalise``, else 0. ``excess``: per law (P, B, H), as predicted, before any projection: the raw violations.
    """

    beliefs: Tensor
    rewards: Tensor | None
    alive: Tensor
    log_weights: Tensor
    excess: dict[str, Tensor] = field(default_factory=dict)

    def returns(self) -> Tensor:
        """Sum of rewards while alive plus log phi_c, mean over particles, (B,)."""
        if self.rewards is None:
            raise ConfigError(
                "the model predicts no reward and none was given; pass reward=function(before, action, after)."
            )
        return ((self.rewards * self.alive).sum(-1) + self.log_weights).mean(0)

    def violation_rate(self) -> float:
        """Share of steps, over particles and rows, on which at least one law was broken before enforcement."""
        if not self.excess:
            return 0.0
        broken = torch.stack([excess > 0 for excess in self.excess.values()]).any(0)
        return float(broken.float().mean())


def rollout(
    model: Any,
    belief: Tensor,
    actions: Tensor,
    *,
    reward: RewardFunction | None = None,
    terminated: TerminationFunction | None = None,
    laws: Sequence[Law] = (),
    mode: str | Enforcement = "report",
    generator: torch.Generator | None = None,
    common: bool = False,
    sample: bool = True,
    record: bool = True,
) -> Trajectory:
    """Imagine ``actions`` (B, H, A), or (B, H) int64 for discrete ones, from ``belief`` (B, D).

    ``reward`` and ``terminated`` are known functions; None takes what the model predicts. ``sample=False`` gives the
    model no generator: its mean, where it has one. ``record=False`` skips the report of violations that no mode needs, for
    planners. A model with ``particles`` carries that many hypotheses per row.

    Raises :class:`~telltale.errors.ConfigError` for shapes that do not fit, :class:`~telltale.errors.DataError` for NaN
    in the belief or actions, :class:`~telltale.world.protocol.DivergedError` for NaN predicted, and
    :class:`InfeasibleLaw` if ``reject`` finds no lawful particle.
    """
    adapted, enforced = adapt(model), enforcement(mode)
    check_query(belief, actions)
    noise = seeded(generator=generator) if sample else None
    if common and noise is not None and not adapted.takes_common and _needs_one_row_at_a_time(adapted, belief, actions):
        rows = [
            rollout(
                adapted,
                belief[i : i + 1],
                actions[i : i + 1],
                reward=reward,
                terminated=terminated,
                laws=laws,
                mode=enforced,
                generator=copy_of(noise),
                record=record,
            )
            for i in range(len(belief))
        ]
        return _joined(rows)
    return _Rollout(adapted, reward, terminated, tuple(laws), enforced, noise, common, record).run(belief, actions)


def check_query(belief: Tensor, actions: Tensor) -> None:
    """Raise unless ``belief`` is (B, D), ``actions`` is (B, H, A) or (B, H), and both are finite."""
    if belief.ndim != 2 or actions.ndim not in (2, 3) or len(actions) != len(belief) or actions.shape[1] < 1:
        raise ConfigError(
            f"belief {tuple(belief.shape)} and actions {tuple(actions.shape)} do not fit; expected belief (B, D) and actions "
            f"(B, H, A), or (B, H) for discrete actions, with H >= 1."
        )
    check_finite(belief, "belief")
    check_finite(actions, "actions")


def _needs_one_row_at_a_time(adapted: Adapted, belief: Tensor, actions: Tensor) -> bool:
    return len(belief) > 1 and adapted.stochastic(belief, actions[:, 0])


class _Rollout:
    """One rollout's settings and loop."""

    def __init__(
        self,
        adapted: Adapted,
        reward: RewardFunction | None,
        terminated: TerminationFunction | None,
        laws: tuple[Law, ...],
        enforced: Enforcement,
        noise: torch.Generator | None,
        common: bool,
        record: bool,
    ) -> None:
        self.adapted, self.reward, self.terminated = adapted, reward, terminated
        self.laws, self.enforced, self.noise, self.common = laws, enforced, noise, common
        self.particles = adapted.particles
        self.measured = record or enforced.mode == "penalise"

    def run(self, belief: Tensor, actions: Tensor) -> Trajectory:
        now = belief.unsqueeze(0).expand(self.particles, *belief.shape) if self.particles > 1 else belief
        shape = now.shape[:-1]
        beliefs, predicted, given_rewards, given_ends = [now], [], [], []
        weights = torch.zeros(shape, dtype=belief.dtype)
        changed = self.enforced.mode in ("project", "reject") and bool(self.laws)
        for t in range(actions.shape[1]):
            before, action = now, actions[:, t]
            now, given_reward, given_end = self._step(before, action)
            predicted.append(now)
            given_rewards.append(given_reward)
            given_ends.append(given_end)
            if changed:
                wide = self._wide(action)
                if self.enforced.mode == "project":
                    now = project(self.laws, before, wide, now)
                else:
                    now = self._resampled(before, action, wide, now)
            elif self.enforced.mode == "shield" and t == 0:
                broken = any_hard_violation(self.laws, before, self._wide(action), now)
                if broken is not None:
                    weights = weights.masked_fill(broken, -float("inf"))
            beliefs.append(now)
        return self._judged(
            torch.stack(beliefs, -2), predicted if changed else None, actions, given_rewards, given_ends, weights
        )

    def _judged(
        self,
        states: Tensor,
        predicted: list[Tensor] | None,
        actions: Tensor,
        given_rewards: list[Tensor | None],
        given_ends: list[Tensor | None],
        weights: Tensor,
    ) -> Trajectory:
        """Rewards, endings and laws of all steps at once: rows (particle, row, step) flattened to (R, D)."""
        check_predicted(states, self.adapted.name, "belief (particle, row, step, column)")
        shape = states[..., 1:, 0].shape
        before, after = (part.reshape(-1, states.shape[-1]) for part in (states[..., :-1, :], states[..., 1:, :]))
        flat = self._wide(actions).reshape(-1, *actions.shape[2:])
        rewards = None
        if self.reward is not None:
            rewards = self.reward(before, flat, after).reshape(shape)
        elif given_rewards[0] is not None:
            rewards = torch.stack(given_rewards, -1)  # type: ignore[arg-type]
        if rewards is not None:
            check_predicted(rewards, self.adapted.name, "reward (particle, row, step)")
        ended = None
        if self.terminated is not None:
            ended = self.terminated(after).reshape(shape).bool()
        elif given_ends[0] is not None:
            ended = torch.stack(given_ends, -1).bool()  # type: ignore[arg-type]
        alive = torch.ones(shape, dtype=torch.bool)
        if ended is not None:
            alive[..., 1:] = ended[..., :-1].cumsum(-1) == 0
        excess: dict[str, Tensor] = {}
        if self.measured and self.laws:
            raw = after if predicted is None else torch.stack(predicted, -2).reshape(after.shape)
            excess = {name: value.reshape(shape) for name, value in violations(self.laws, before, flat, raw).items()}
            if self.enforced.mode == "penalise":
                weights = weights - self.enforced.strength * torch.stack(list(excess.values())).sum((0, -1)).to(weights)
        return Trajectory(
            self._with_particles(states),
            None if rewards is None else self._with_particles(rewards),
            self._with_particles(alive),
            self._with_particles(weights),
            {name: self._with_particles(value) for name, value in excess.items()},
        )

    def _wide(self, action: Tensor) -> Tensor:
        return action.expand(self.particles, *action.shape) if self.particles > 1 else action

    def _step(self, before: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.particles > 1:
            made = self.adapted.step_particles(before, action, generator=self.noise, common=self.common)
        else:
            made = self.adapted.step(before, action, generator=self.noise, common=self.common)
        return made.belief, made.reward, made.terminated

    def _resampled(self, before: Tensor, action: Tensor, wide: Tensor, now: Tensor) -> Tensor:
        """Unlawful particles take the place of a lawful one of their row; rows without any are drawn again."""
        broken = any_hard_violation(self.laws, before, wide, now)
        if broken is None:
            return now
        for _ in range(REDRAWS):
            hopeless = broken.all(0) if self.particles > 1 else broken
            if not bool(hopeless.any()):
                break
            again, _, _ = self._step(before, action)
            now = torch.where(broken.unsqueeze(-1), again, now)
            broken = any_hard_violation(self.laws, before, wide, now)
            assert broken is not None
        hopeless = broken.all(0) if self.particles > 1 else broken
        if bool(hopeless.any()):
            names = ", ".join(
                name for name, value in violations(self.laws, before, wide, now).items() if bool((value > 0).any())
            )
            raise InfeasibleLaw(
                f"no particle of row {int(hopeless.nonzero()[0])} obeys the laws after {REDRAWS} draws (broken: {names}); check "
                f"that the laws can be met together, or use mode 'project' or 'penalise'."
            )
        if self.particles > 1:
            chances = (~broken).float().T  # (B, P)
            chosen = torch.multinomial(chances, self.particles, replacement=True, generator=self.noise).T
            kept = torch.arange(self.particles).unsqueeze(1).expand_as(chosen)
            source = torch.where(broken, chosen, kept)
            now = now.gather(0, source.unsqueeze(-1).expand_as(now))
        return now

    def _with_particles(self, value: Tensor) -> Tensor:
        return value if self.particles > 1 else value.unsqueeze(0)


def _joined(parts: list[Trajectory]) -> Trajectory:
    rewards = [part.rewards for part in parts if part.rewards is not None]
    return Trajectory(
        torch.cat([part.beliefs for part in parts], 1),
        torch.cat(rewards, 1) if rewards else None,
        torch.cat([part.alive for part in parts], 1),
        torch.cat([part.log_weights for part in parts], 1),
        {name: torch.cat([part.excess[name] for part in parts], 1) for name in parts[0].excess},
    )
