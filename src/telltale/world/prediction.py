"""Level 1: how well one step is predicted, on transitions that the model was not fitted on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.errors import DataError
from telltale.world.metrics import bootstrap
from telltale.world.plugs import UserCodeError
from telltale.world.protocol import Adapted, adapt
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

NORMAL_90 = 1.6449
ROUNDING = 1e-6
"""What float32 leaves of an exact prediction, relative to the largest value of the column."""
SAMPLES = 60
"""Draws per transition from a stochastic model over plain states."""
JUDGED = 150
"""Transitions that such a model is judged on."""


@dataclass(frozen=True)
class Prediction:
    """``gain``: held-out log-likelihood over the baseline's, in nats per transition (share of exact states over the
    baseline's, for plain states), with its one-sided 95% lower bound. ``coverage``: share of outcomes inside 90% intervals.
    ``source`` says where the intervals come from. ``exact``: they are points, so that there is no covering too much.
    ``finite``: no NaN under perturbed inputs. ``r_squared``: of the change of state, which says little about use in planning
    and is printed to show that.
    """

    gain: float
    gain_low: float
    coverage: float
    source: str
    finite: bool
    r_squared: float
    transitions: int
    exact: bool = False


def predict_held_out(model: Any, world: World, held_out: Transitions, *, seed: int = 0) -> Prediction:
    """Judge one-step predictions.

    The baseline predicts the mean change of the first half of the episodes, with the deviation of the changes there. A model
    without ``predict(belief, action) -> (mean, deviation)`` gets the deviation of its own residuals there; the second half is
    judged. An outcome that was predicted as NaN lies in no interval and counts as 30 deviations off.

    Raises :class:`~telltale.errors.DataError` for fewer than 10 transitions, or of another world.
    """
    adapted = adapt(model)
    if held_out.world != world.id:
        raise DataError(
            f"the held-out transitions are of {held_out.world}, not of {world.id}; collect some of that world."
        )
    if len(held_out) < 10:
        raise DataError(f"{len(held_out)} held-out transitions are too few to judge a model on; collect at least 10.")
    return _plain(adapted, held_out, seed) if held_out.plain else _numeric(adapted, world, held_out, seed)


def _numeric(adapted: Adapted, world: World, held_out: Transitions, seed: int) -> Prediction:
    middle = held_out.episodes.float().median() if len(set(held_out.episodes.tolist())) > 1 else None
    first = held_out.episodes < middle if middle is not None else torch.arange(len(held_out)) < len(held_out) // 2
    if not bool(first.any()) or bool(first.all()):
        first = torch.arange(len(held_out)) < len(held_out) // 2
    mean, deviation = _forecast(adapted, held_out.before, held_out.actions)
    change = held_out.after - held_out.before
    own = deviation is not None
    # a column that never changes is predicted exactly by both, and has no likelihood to speak of
    moving = change[first].std(0) > 1e-9
    scale = change[first].std(0).clamp(min=1e-9)
    residual = held_out.after - mean
    if deviation is None:
        known = residual[first][torch.isfinite(residual[first]).all(-1)].abs()
        deviation = (torch.quantile(known, 0.9, dim=0) / NORMAL_90 if len(known) else scale).expand_as(residual)
    # a deviation below what float32 can hold is the claim that the prediction is a point
    exact = bool((deviation <= ROUNDING * held_out.after.abs().amax(0).clamp(min=1)).all())
    deviation = deviation.clamp(min=1e-9)
    if exact:
        deviation = deviation.clamp(min=2 * ROUNDING * float(held_out.after.abs().max().clamp(min=1)))
    test = ~first
    gain = (
        _log_density(residual[test], deviation[test])[:, moving]
        - _log_density(change[test] - change[first].mean(0), scale.expand_as(change[test]))[:, moving]
    )
    inside = residual[test].abs() <= NORMAL_90 * deviation[test]
    gains = gain.sum(-1)
    low = bootstrap(gains.numpy(), statistic=_mean, confidence=0.9, resamples=200, seed=seed).low
    unexplained = residual[test][:, moving].pow(2).mean(0) / change[test][:, moving].var(0, unbiased=False).clamp(
        min=1e-12
    )
    source = "the model" if own else "residuals on held-out episodes (the model states no deviation)"
    return Prediction(
        float(gains.mean()), low, float(inside[:, moving].float().mean()) if bool(moving.any()) else 1.0,
        "predictions exact to rounding" if exact else source,
        bool(torch.isfinite(mean).all()) and _finite(adapted, world, held_out, seed),
        float(1 - unexplained.mean()), int(test.sum()), exact,
    )  # fmt: skip


def _forecast(adapted: Adapted, before: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        stated = adapted.predict(adapted.infer(before), actions)
        return stated if stated is not None else (_next(adapted, before, actions, 0), None)


def _next(adapted: Adapted, before: Tensor, actions: Tensor, seed: int) -> Tensor:
    """The next observation by one step."""
    generator = torch.Generator().manual_seed(seed)
    return adapted.observed(adapted.step(adapted.infer(before), actions, generator=generator).belief)


def _log_density(difference: Tensor, deviation: Tensor) -> Tensor:
    # outcomes beyond 30 deviations count as 30: one bad row, or one that is NaN, must not decide the mean
    standard = (difference / deviation).nan_to_num(nan=30.0).clamp(-30, 30)
    return -0.5 * standard**2 - torch.log(deviation) - 0.5 * math.log(2 * math.pi)


def _plain(adapted: Adapted, held_out: Transitions, seed: int) -> Prediction:
    if getattr(adapted.model, "stochastic", False):
        return _plain_sets(adapted, held_out, seed)
    hits, still, finite = [], [], True
    generator = torch.Generator().manual_seed(seed)
    for before, action, after in zip(held_out.before, held_out.actions.tolist(), held_out.after, strict=True):
        try:
            predicted = adapted.observed(adapted.step(adapted.infer(before), action, generator=generator).belief)
        except UserCodeError:  # a crash on a real state is a failed robustness test
            predicted, finite = None, False
        hits.append(float(predicted == after))
        still.append(float(before == after))
    gains = torch.tensor(hits) - torch.tensor(still)
    low = bootstrap(gains.numpy(), statistic=_mean, confidence=0.9, resamples=200, seed=seed).low
    accuracy = sum(hits) / len(hits)
    return Prediction(
        float(gains.mean()), low, accuracy, "one predicted state, exact", finite, accuracy, len(hits), True
    )


def _plain_sets(adapted: Adapted, held_out: Transitions, seed: int) -> Prediction:
    """A stochastic model over plain states: the smallest set of sampled next states with 90% of the samples."""
    generator = torch.Generator().manual_seed(seed)
    chosen = list(range(len(held_out)))[:: max(1, len(held_out) // JUDGED)][:JUDGED]
    inside, gains = [], []
    for i in chosen:
        before, action, after = held_out.before[i], int(held_out.actions[i]), held_out.after[i]
        start = adapted.infer(before)
        drawn = Counter(
            adapted.observed(adapted.step(start, action, generator=generator).belief) for _ in range(SAMPLES)
        )
        total, members = 0, set()
        for state, count in drawn.most_common():
            if total >= 0.9 * SAMPLES:
                break
            members.add(state)
            total += count
        inside.append(float(after in members))
        gains.append(drawn[after] / SAMPLES - float(before == after))
    low = bootstrap(gains, statistic=_mean, confidence=0.9, resamples=200, seed=seed).low
    coverage = sum(inside) / len(inside)
    source = f"the smallest set with 90% of {SAMPLES} sampled states"
    return Prediction(sum(gains) / len(gains), low, coverage, source, True, float("nan"), len(chosen), True)


def _mean(values: Any) -> float:
    return float(values.mean())


def _finite(adapted: Adapted, world: World, held_out: Transitions, seed: int) -> bool:
    """Inputs noised by a tenth of their spread, states thrown out to three times their spread, and actions at their bounds."""
    generator = torch.Generator().manual_seed(seed)
    before, actions = held_out.before[:256], held_out.actions[:256]
    spread = held_out.before.std(0)
    states = [
        before + 0.1 * spread * torch.randn(before.shape, generator=generator),
        before.mean(0) + 3 * (before - before.mean(0)),
    ]
    acts = [actions]
    if actions.ndim == 2:
        low, high = (
            torch.as_tensor(bound, dtype=torch.float32).reshape(-1)
            for bound in (world.action_space.low, world.action_space.high)
        )
        acts += [
            torch.where(torch.isfinite(bound), bound, 3 * actions.abs().amax(0) * sign).expand_as(actions)
            for bound, sign in ((low, -1), (high, 1))
        ]
    try:
        with torch.no_grad():
            found = [_next(adapted, state, act, 1) for state in states for act in acts]
    except UserCodeError:
        return False
    return all(bool(torch.isfinite(after).all()) for after in found)
