"""From recorded steps to the constants of a score: the normaliser's scales, groundings by place, and the weight beta.

Everything here may look at labels or not, but only at pilot problems: what is fitted is fixed before the problems that a
threshold is calibrated on are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from telltale.configuration import check_choice
from telltale.decode.results import StepSignals
from telltale.decode.step_config import GROUNDING, LOG_PROBABILITY, Normaliser, Scale, StepVerifiedConfig
from telltale.decode.step_verified.calibration.risk import Judged
from telltale.decode.step_verified.trials.trial import StepTrial, Trial
from telltale.decode.verification import grounding_of, log_probability_of, score_of
from telltale.errors import CalibrationError, DataError

EXTREMES = ("robust", "exact")
"""What l_min and l_max are: the 1% and 99% quantiles of the pilot's steps, or their smallest and largest."""
ROBUST = (0.01, 0.99)
BETAS = (0.0, 0.3, 0.5, 0.7, 1.0)
QUANTILES = 257
"""Points of an empirical distribution that a calibration keeps."""
FEWEST = 20
"""Tokens that a place in a step needs for a distribution of its own."""


def reading_of(step: StepTrial, config: StepVerifiedConfig) -> StepSignals:
    """The signals that ``config`` scores by. Raises :class:`~telltale.errors.DataError` if they were not read."""
    found = step.draft if config.signal_model == "draft" else step.target
    if found is None:
        raise DataError(f"a recorded step has no signals of the {config.signal_model} model; expected them to be read.")
    return found


def with_positions(steps: Sequence[StepTrial], config: StepVerifiedConfig) -> StepVerifiedConfig:
    """``config`` with debias="position-ecdf" and the groundings of the recorded tokens at each place of a step.

    Places with fewer than 20 tokens are put together.
    """
    by_place: list[list[float]] = []
    for step in steps:
        for place, value in enumerate(reading_of(step, config).groundings):
            while len(by_place) <= place:
                by_place.append([])
            by_place[place].append(value)
    if not by_place:
        raise CalibrationError("debias='position-ecdf' needs groundings, and none were recorded.")
    while len(by_place) > 1 and len(by_place[-1]) < FEWEST:
        last = by_place.pop()
        by_place[-1] += last
    tables = tuple(_quantiles(values) for values in by_place)
    return replace(config, debias="position-ecdf", position_quantiles=tables)


def with_normaliser(
    steps: Sequence[StepTrial], config: StepVerifiedConfig, *, extremes: str = "robust"
) -> StepVerifiedConfig:
    """``config`` with scales fitted on recorded steps, for the signals that it reads. Running extremes need none.

    Raises :class:`~telltale.errors.CalibrationError` ("degenerate") if a signal is the same for all of them.
    """
    check_choice("extremes", extremes, EXTREMES)
    kind = config.normaliser.kind
    if kind in ("running", "group"):
        return replace(config, normaliser=replace(config.normaliser, fitted=True))
    scales = {}
    for name, reads, value_of, wide in (
        ("log_probability", config.reads_log_probability, log_probability_of, LOG_PROBABILITY),
        ("grounding", config.reads_grounding, grounding_of, GROUNDING),
    ):
        if not reads or config.score == "likelihood-ratio":
            scales[name] = Scale(wide.low, wide.high, (wide.low, wide.high) if kind == "ecdf" else ())
            continue
        values = [value_of(reading_of(step, config), config) for step in steps]
        scales[name] = _scale(name, values, kind, extremes)
    return replace(config, normaliser=Normaliser(kind=kind, fitted=True, **scales))


def rescored(trial: Trial, config: StepVerifiedConfig) -> list[float | None]:
    """What ``config`` scores the recorded steps of ``trial``, in order; None for steps that are rejected unscored.

    Scores of a verifier, of agreement and of extremes over the candidates are taken as they were recorded.
    """
    if config.policy != "specguard" or config.normaliser.kind == "group":
        return [step.score for step in trial.steps]
    history: dict[str, list[float]] = {}
    return [
        None if step.score is None else score_of(config, step.draft, step.target, step.agreement, history=history)
        for step in trial.steps
    ]


def rejudged(trials: Sequence[Trial], config: StepVerifiedConfig, *, unknown: str = "skip") -> list[Judged]:
    """Recorded trials as ``config`` would have scored them."""
    found = []
    for trial in trials:
        scores = rescored(trial, config)
        steps = tuple(replace(step, score=score) for step, score in zip(trial.steps, scores, strict=True))
        found.append(replace(trial, steps=steps).judged(unknown=unknown))
    return found


def best_beta(
    trials: Sequence[Trial], config: StepVerifiedConfig, *, alpha: float, loss: str = "mean", unknown: str = "skip"
) -> float:
    """The weight among 0, 0.3, 0.5, 0.7 and 1 that accepts most recorded steps at an empirical risk of ``alpha``.

    The larger of two that are equal: log-probability is had without attention.
    """
    accepted = {}
    for beta in BETAS:
        judged = rejudged(trials, replace(config, beta=beta), unknown=unknown)
        threshold = thresholds_at_risk(judged, [alpha], loss=loss)[0]
        accepted[beta] = sum(score >= threshold for problem in judged for score in problem.scores)
    return max(accepted, key=lambda beta: (accepted[beta], beta))


def thresholds_at_risk(problems: Sequence[Judged], levels: Sequence[float], *, loss: str = "mean") -> list[float]:
    """For each level the smallest observed score whose empirical risk is at most that; the highest score if none is."""
    kind = "mean" if loss == "one" else loss
    candidates = observed(problems)
    risks = np.array([np.mean([problem.loss(tau, kind) for problem in problems]) for tau in candidates])
    found = []
    for level in levels:
        passing = np.flatnonzero(risks <= level + 1e-12)
        found.append(float(candidates[passing[0]] if len(passing) else candidates[-1]))
    return found


def thresholds_at_acceptance(problems: Sequence[Judged], rates: Sequence[float]) -> list[float]:
    """For each rate the largest observed score that at least that share of the scored steps reach."""
    scores = np.sort([s for problem in problems for s in problem.scores if not np.isnan(s)])[::-1]
    if not len(scores):
        raise CalibrationError("no drafted step was scored; expected the draft to finish steps.")
    return [float(scores[min(len(scores), max(1, int(np.ceil(rate * len(scores))))) - 1]) for rate in rates]


def observed(problems: Sequence[Judged]) -> list[float]:
    """The distinct scores, rising."""
    found = sorted({score for problem in problems for score in problem.scores if not np.isnan(score)})
    if not found:
        raise CalibrationError("no drafted step was scored; expected the draft to finish steps.")
    return found


def _scale(name: str, values: Sequence[float], kind: str, extremes: str) -> Scale:
    known = np.asarray(values, dtype=np.float64)
    if not len(known):
        raise CalibrationError(
            f"no recorded step has a {name.replace('_', '-')}; expected at least two different ones."
        )
    low, high = np.quantile(known, ROBUST) if extremes == "robust" else (known.min(), known.max())
    if not low < high:
        low, high = known.min(), known.max()
    if not low < high:
        raise CalibrationError(
            f"degenerate: all {len(known)} recorded steps have the same {name.replace('_', '-')} {float(low)!r}, so there is no "
            f"scale; calibrate on more varied problems, or leave the signal out."
        )
    return Scale(float(low), float(high), _quantiles(values) if kind == "ecdf" else ())


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    known = np.sort(np.asarray(values, dtype=np.float64))
    if len(known) > QUANTILES:
        known = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return tuple(known.tolist())
