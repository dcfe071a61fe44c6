"""Level 1: how well one step is predicted, on transitions that the model was not fitted on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.errors import TelltaleError
from telltale.world.metrics import bootstrap
from telltale.world.protocol import Adapted, adapt
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

NORMAL_90 = 1.6449
SAMPLES = 60
"""Draws per transition from a stochastic model over plain states."""
JUDGED = 150
"""Transitions that such a model is judged on."""


@dataclass(frozen=True)
class Prediction:
    """``gain``: held-out log-likelihood over the baseline's, in nats per transition (share of exact states over the
    baseline's, for plain states), with its one-sided 95% lower bound. ``coverage``: share of outcomes inside 90% intervals.
    ``source`` says where the intervals come from. ``finite``: no NaN under perturbed inputs. ``r_squared``: of the change
    of state, which says little about use in planning and is printed to show that.
    """

    gain: float
    gain_low: float
    coverage: float
    source: str
    finite: bool
    r_squared: float
    transitions: int
    covered: Any = None


def predict_held_out(model: Any, world: World, held_out: Transitions, *, seed: int = 0) -> Prediction:
    """Judge one-step predictions.

    The baseline predicts no change, with the deviation of the changes on the first half of the episodes. A model without
    ``predict(belief, action) -> (mean, deviation)`` gets the deviation of its own residuals there; the second half is judged.
    """
    adapted = adapt(model)
    return _plain(adapted, held_out, seed) if held_out.plain else _numeric(adapted, world, held_out, seed)


def _numeric(adapted: Adapted, world: World, held_out: Transitions, seed: int) -> Prediction:
    middle = held_out.episodes.float().median() if len(set(held_out.episodes.tolist())) > 1 else None
    first = held_out.episodes < middle if middle is not None else torch.arange(len(held_out)) < len(held_out) // 2
    if not bool(first.any()) or bool(first.all()):
        first = torch.arange(len(held_out)) < len(held_out) // 2
    mean, deviation = _forecast(adapted, held_out.before, held_out.actions)
    change = held_out.after - held_out.before
    own = deviation is not None
    residual = held_out.after - mean
    if deviation is None:
        deviation = torch.quantile(residual[first].abs(), 0.9, dim=0).expand_as(residual) / NORMAL_90
    # a column that never changes is predicted exactly by both, and has no likelihood to speak of
    moving = change[first].std(0) > 1e-9
    deviation = deviation.clamp(min=1e-9)
    test = ~first
    scale = change[first].std(0).clamp(min=1e-9)
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
    return Prediction(
        float(gains.mean()), low, float(inside[:, moving].float().mean()),
        "the model" if own else "residuals on held-out episodes (the model states no deviation)",
        _finite(adapted, world, held_out, seed), float(1 - unexplained.mean()), int(test.sum()), inside,
    )  # fmt: skip


def _forecast(adapted: Adapted, before: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
    predict = getattr(adapted.model, "predict", None)
    with torch.no_grad():
        if callable(predict):
            mean, deviation = predict(before, actions)
            return mean, deviation
        return adapted.step(before, actions, generator=torch.Generator().manual_seed(0)).belief, None


def _log_density(difference: Tensor, deviation: Tensor) -> Tensor:
    # outcomes beyond 30 deviations count as 30: one bad row must not decide the mean
    standard = (difference / deviation).clamp(-30, 30)
    return -0.5 * standard**2 - torch.log(deviation) - 0.5 * math.log(2 * math.pi)


def _plain(adapted: Adapted, held_out: Transitions, seed: int) -> Prediction:
    if getattr(adapted.model, "stochastic", False):
        return _plain_sets(adapted, held_out, seed)
    hits, still, finite = [], [], True
    generator = torch.Generator().manual_seed(seed)
    for before, action, after in zip(held_out.before, held_out.actions.tolist(), held_out.after, strict=True):
        try:
            predicted = adapted.step(before, action, generator=generator).belief
        except TelltaleError:
            raise
        except Exception:  # a crash of the user's model on a real state is a failed robustness test, not ours
            predicted, finite = None, False
        hits.append(float(predicted == after))
        still.append(float(before == after))
    gains = torch.tensor(hits) - torch.tensor(still)
    low = bootstrap(gains.numpy(), statistic=_mean, confidence=0.9, resamples=200, seed=seed).low
    accuracy = sum(hits) / len(hits)
    return Prediction(float(gains.mean()), low, accuracy, "one predicted state, exact", finite, accuracy, len(hits))


def _plain_sets(adapted: Adapted, held_out: Transitions, seed: int) -> Prediction:
    """A stochastic model over plain states: the smallest set of sampled next states with 90% of the samples."""
    generator = torch.Generator().manual_seed(seed)
    chosen = list(range(len(held_out)))[:: max(1, len(held_out) // JUDGED)][:JUDGED]
    inside, gains = [], []
    for i in chosen:
        before, action, after = held_out.before[i], int(held_out.actions[i]), held_out.after[i]
        drawn = Counter(adapted.step(before, action, generator=generator).belief for _ in range(SAMPLES))
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
    return Prediction(sum(gains) / len(gains), low, coverage, source, True, float("nan"), len(chosen))


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
        acts += [low.expand_as(actions), high.expand_as(actions)]
    with torch.no_grad():
        return all(
            bool(torch.isfinite(adapted.step(state, act, generator=torch.Generator().manual_seed(1)).belief).all())
            for state in states
            for act in acts
        )
