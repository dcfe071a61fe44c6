"""The level-2 query: from a belief and an action sequence to a trajectory, with laws acting on every particle.

p(tau | z_0, a_{1:H}, c) is proportional to phi_c(tau) * prod_t p(z_t | z_{t-1}, a_t) (arXiv 2604.22748, section 4). All
rows of a rollout replay the same random numbers when ``common`` is set, so that candidates of a planner and the two
branches of a counterfactual differ by their actions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from telltale.world.plugs import called
from telltale.world.protocol import Adapted, adapt, all_finite, check_finite, check_predicted
from telltale.world.randomness import copy_of, seeded

REDRAWS = 8
"""How often ``reject`` draws a step again before it gives up on a row without one lawful particle."""

RewardFunction = Callable[[Any, Any, Any], Tensor]
TerminationFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """P particles of B rows over H steps. ``beliefs`` (P, B, H + 1, D); ``rewards`` (P, B, H) or None.

    ``alive`` (P, B, H): whether the episode had not ended before that step. ``log_weights`` (P, B): log phi_c of mode
    ``penalise``, -inf where a shield or a tolerated failure rules a row out, else 0. ``excess``: per law (P, B, H), as
    predicted, before any projection: the raw violations. ``observed``: the beliefs as the model decodes them.
    ``not_finite`` (P, B, H + 1): where ``tolerate`` let a prediction pass.
    """

    beliefs: Tensor
    rewards: Tensor | None
    alive: Tensor
    log_weights: Tensor
    excess: dict[str, Tensor]
    observed: Tensor
    not_finite: Tensor | None = None

    def broke_down(self) -> Tensor:
        """Where a prediction was not finite, (P, B, H + 1); only ``tolerate`` lets one pass, as 0."""
        if self.not_finite is None:
            return torch.zeros(self.beliefs.shape[:-1], dtype=torch.bool)
        return self.not_finite.cummax(-1).values

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
    tolerate: bool = False,
) -> Trajectory:
    """Imagine ``actions`` (B, H, A), or (B, H) int64 for discrete ones, from ``belief`` (B, D).

    ``reward`` and ``terminated`` are known functions; None takes what the model predicts. ``sample=False`` gives the
    model no generator: its mean, where it has one. ``record=False`` skips the report of violations that no mode needs, for
    planners. ``tolerate`` gives a row whose prediction is not finite, or for which ``reject`` finds no lawful particle, the
    weight -inf instead of raising: one bad candidate is no reason to give up on the others. A model with ``particles`` carries
    that many hypotheses per row.

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
                tolerate=tolerate,
            )
            for i in range(len(belief))
        ]
        return _joined(rows)
    return _Rollout(adapted, reward, terminated, tuple(laws), enforced, noise, common, record, tolerate).run(
        belief, actions
    )


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


class Predicted(NamedTuple):
    """What one step predicted: ``belief`` (..., D), ``reward`` and ``terminated`` (...) or None."""

    belief: Tensor
    reward: Tensor | None
    terminated: Tensor | None

    def where(self, condition: Tensor, other: Predicted) -> Predicted:
        """``other`` where the condition holds."""
        belief = torch.where(condition.unsqueeze(-1), other.belief, self.belief)
        rest = (
            mine if mine is None or its is None else torch.where(condition, its, mine)
            for mine, its in zip(self[1:], other[1:], strict=True)
        )
        return Predicted(belief, *rest)

    def taken(self, source: Tensor) -> Predicted:
        """Particle ``source[p, b]`` in the place of particle p of row b."""
        rest = (None if value is None else value.gather(0, source) for value in self[1:])
        return Predicted(self.belief.gather(0, source.unsqueeze(-1).expand_as(self.belief)), *rest)


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
        tolerate: bool,
    ) -> None:
        self.adapted, self.reward, self.terminated = adapted, reward, terminated
        self.laws, self.enforced, self.noise, self.common = laws, enforced, noise, common
        self.particles = adapted.particles
        self.measured = record or enforced.mode == "penalise"
        self.tolerate = tolerate
        if (
            enforced.mode == "project"
            and laws
            and adapted.decodes
            and not callable(getattr(adapted.model, "infer", None))
        ):
            raise ConfigError(
                f"{adapted.name} decodes but does not infer, so that a projected observation has no belief; add infer, or use "
                f"another law mode than project."
            )

    def run(self, belief: Tensor, actions: Tensor) -> Trajectory:
        now = belief.unsqueeze(0).expand(self.particles, *belief.shape) if self.particles > 1 else belief
        taken = _columns(actions.movedim(1, 0))
        beliefs, predicted, given_rewards, given_ends = [now], [], [], []
        weights = torch.zeros(now.shape[:-1], dtype=belief.dtype)
        changed = self.enforced.mode in ("project", "reject") and bool(self.laws)
        for t, action in enumerate(taken):
            before = now
            now, given_reward, given_end = self._step(before, action)
            predicted.append(now)
            given_rewards.append(given_reward)
            given_ends.append(given_end)
            if changed:
                wide = self._wide(action)
                if self.enforced.mode == "project":
                    now = self._projected(before, wide, now)
                else:
                    made = Predicted(now, given_reward, given_end)
                    made, hopeless = self._resampled(before, action, wide, made)
                    now, given_rewards[-1], given_ends[-1] = made.belief, made.reward, made.terminated
                    weights = weights.masked_fill(hopeless, -float("inf"))
            elif self.enforced.mode == "shield" and t == 0:
                broken = self._broken(before, self._wide(action), now)
                if broken is not None:
                    weights = weights.masked_fill(broken, -float("inf"))
            beliefs.append(now)
        return self._judged(beliefs, predicted if changed else None, taken, given_rewards, given_ends, weights)

    def _judged(
        self,
        beliefs: list[Tensor],
        predicted: list[Tensor] | None,
        taken: Tensor,
        given_rewards: list[Tensor | None],
        given_ends: list[Tensor | None],
        weights: Tensor,
    ) -> Trajectory:
        """Rewards, endings and laws of all steps at once: rows (step, particle, row) flattened to (R, D).

        Rows are views of columns: reward functions and laws read states column by column, and these are contiguous.
        """
        states = _stacked(beliefs).movedim(0, -2)
        bad = None if not self.tolerate or all_finite(states) else ~torch.isfinite(states).all(-1)
        states, weights = self._finite(states, weights, "belief (particle, row, step, column)")
        observed = self.adapted.observed(states)
        observed, weights = self._finite(observed, weights, "observation (particle, row, step, column)")
        steps = observed.movedim(-2, 0)
        before, after, flat = _rows(steps[:-1]), _rows(steps[1:]), _rows_of_actions(taken, self.particles)
        shape = steps[1:].shape[:-1]
        rewards = None
        if self.reward is not None:
            rewards = _per_row("the known reward", self.reward, before, flat, after).reshape(shape).movedim(0, -1)
        elif given_rewards[0] is not None:
            rewards = torch.stack(given_rewards, -1)  # type: ignore[arg-type]
        if rewards is not None:
            rewards, weights = self._finite(rewards, weights, "reward (particle, row, step)")
        ended = None
        if self.terminated is not None:
            ended = _per_row("the known termination", self.terminated, after).reshape(shape).movedim(0, -1).bool()
        elif given_ends[0] is not None:
            ended = torch.stack(given_ends, -1).bool()  # type: ignore[arg-type]
        alive = torch.ones((*shape[1:], shape[0]), dtype=torch.bool)
        if ended is not None:
            alive[..., 1:] = ended[..., :-1].cumsum(-1) == 0
        excess: dict[str, Tensor] = {}
        if self.measured and self.laws:
            raw = after
            if predicted is not None:
                raw = _rows(self.adapted.observed(_stacked(predicted)))
            found = violations(self.laws, before, flat, raw)
            excess = {name: value.reshape(shape).movedim(0, -1) for name, value in found.items()}
            if self.enforced.mode == "penalise":
                weights = weights - self.enforced.strength * torch.stack(list(excess.values())).sum((0, -1)).to(weights)
        return Trajectory(
            self._with_particles(states),
            None if rewards is None else self._with_particles(rewards),
            self._with_particles(alive),
            self._with_particles(weights),
            {name: self._with_particles(value) for name, value in excess.items()},
            self._with_particles(observed),
            None if bad is None else self._with_particles(bad),
        )

    def _finite(self, values: Tensor, weights: Tensor, field: str) -> tuple[Tensor, Tensor]:
        """``values`` as they are where they are finite; else an error, or the rows' weight is -inf and their values 0."""
        if not self.tolerate or all_finite(values):
            check_predicted(values, self.adapted.name, field)
            return values, weights
        bad = ~torch.isfinite(values)
        weights = weights.masked_fill(bad.flatten(weights.ndim).any(-1), -float("inf"))
        return values.masked_fill(bad, 0.0), weights

    def _projected(self, before: Tensor, wide: Tensor, now: Tensor) -> Tensor:
        if not self.adapted.decodes:
            return project(self.laws, before, wide, now)
        seen = self.adapted.observed(now)
        put = project(self.laws, self.adapted.observed(before), wide, seen)
        return self.adapted.infer(put) if not torch.equal(put, seen) else now

    def _broken(self, before: Tensor, wide: Tensor, now: Tensor) -> Tensor | None:
        return any_hard_violation(self.laws, self.adapted.observed(before), wide, self.adapted.observed(now))

    def _wide(self, action: Tensor) -> Tensor:
        return action.expand(self.particles, *action.shape) if self.particles > 1 else action

    def _step(self, before: Tensor, action: Tensor) -> Predicted:
        step = self.adapted.step_particles if self.particles > 1 else self.adapted.step
        made = step(before, action, generator=self.noise, common=self.common)
        return Predicted(made.belief, made.reward, made.terminated)

    def _resampled(self, before: Tensor, action: Tensor, wide: Tensor, made: Predicted) -> tuple[Predicted, Tensor]:
        """Unlawful particles take the place of a lawful one of their row; rows without any are drawn again.

        With the particles (state, reward and end together) comes where a row has no lawful one, which only ``tolerate`` allows.
        """
        broken = self._broken(before, wide, made.belief)
        if broken is None:
            return made, torch.zeros(made.belief.shape[:-1], dtype=torch.bool)
        for _ in range(REDRAWS):
            hopeless = broken.all(0) if self.particles > 1 else broken
            if not bool(hopeless.any()):
                break
            made = made.where(broken, self._step(before, action))
            broken = self._broken(before, wide, made.belief)
            assert broken is not None
        hopeless = broken.all(0) if self.particles > 1 else broken
        if bool(hopeless.any()) and not self.tolerate:
            found = violations(self.laws, self.adapted.observed(before), wide, self.adapted.observed(made.belief))
            names = ", ".join(name for name, value in found.items() if bool((value > 0).any()))
            raise InfeasibleLaw(
                f"no particle of row {int(hopeless.nonzero()[0])} obeys the laws after {REDRAWS} draws (broken: {names}); check "
                f"that the laws can be met together, or use mode 'project' or 'penalise'."
            )
        if self.particles > 1:
            chances = (~broken | hopeless).float().T  # (B, P)
            chosen = torch.multinomial(chances, self.particles, replacement=True, generator=self.noise).T
            kept = torch.arange(self.particles).unsqueeze(1).expand_as(chosen)
            made = made.taken(torch.where(broken & ~hopeless, chosen, kept))
        return made, hopeless.expand(made.belief.shape[:-1])

    def _with_particles(self, value: Tensor) -> Tensor:
        return value if self.particles > 1 else value.unsqueeze(0)


def _columns(value: Tensor) -> Tensor:
    """``value`` (..., D) in the same shape, laid out in memory column by column; one without columns as it is."""
    return value if value.ndim < 3 else value.movedim(-1, 0).contiguous().movedim(0, -1)


def _stacked(steps: list[Tensor]) -> Tensor:
    """Steps of (..., D) as (H, ..., D), laid out column by column."""
    return torch.stack([step.movedim(-1, 0) for step in steps], 1).movedim(0, -1)


def _rows(states: Tensor) -> Tensor:
    """(H, ..., D) as rows (R, D); without a copy where they are laid out by columns."""
    return states.movedim(-1, 0).flatten(1).T


def _rows_of_actions(taken: Tensor, particles: int) -> Tensor:
    """Actions (H, B, A) or (H, B) as rows (R, A) or (R,) beside those of the states."""
    if particles > 1:
        taken = taken.unsqueeze(1).expand(taken.shape[0], particles, *taken.shape[1:])
    return _rows(taken) if taken.ndim == (4 if particles > 1 else 3) else taken.flatten()


def _joined(parts: list[Trajectory]) -> Trajectory:
    rewards = [part.rewards for part in parts if part.rewards is not None]
    return Trajectory(
        torch.cat([part.beliefs for part in parts], 1),
        torch.cat(rewards, 1) if rewards else None,
        torch.cat([part.alive for part in parts], 1),
        torch.cat([part.log_weights for part in parts], 1),
        {name: torch.cat([part.excess[name] for part in parts], 1) for name in parts[0].excess},
        torch.cat([part.observed for part in parts], 1),
        torch.cat([part.not_finite for part in parts if part.not_finite is not None], 1)
        if parts[0].not_finite is not None
        else None,
    )


def _per_row(what: str, function: Callable[..., Any], *rows: Tensor) -> Tensor:
    """A user's function of rows (R, D). Raises :class:`~telltale.errors.ConfigError` unless it gives one value per row."""
    found = called(what, function, *rows)
    if not isinstance(found, Tensor) or found.numel() != len(rows[0]):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"{what} returned {shape} for {len(rows[0])} rows; expected a tensor with one value per row, ({len(rows[0])},)."
        )
    return found.reshape(-1)
