"""A threshold at which accepted steps are wrong, or answers lost, no more often than asked for, on the policy's own prefixes.

Problems are split at random. *Pilot* problems fit the normaliser, beta and a short list of thresholds: the policy runs, is fitted
to what it drafted, and runs again as fitted, until its acceptance settles. On the *calibration* problems the policy is then run as
it would be deployed at each of these thresholds, from the highest down, until one fails: its prefixes are those of the
deployed policy, because it is the deployed policy. Conformal risk control (arXiv 2208.02814) or learn-then-test (arXiv
2110.01052) make the choice, a problem being the unit. *Check* problems, which nothing was chosen on, give the realised risk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from telltale.configuration import check_choice, check_integer, check_range, check_seed
from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import Normaliser, StepVerifiedConfig
from telltale.decode.step_verified.calibration import fitting
from telltale.decode.step_verified.calibration.calibrated import METHODS, RISKS, Calibration, fingerprints_of
from telltale.decode.step_verified.calibration.pilot import SPLIT, OnProblems, Runs, parts, piloted, starting_config
from telltale.decode.step_verified.calibration.risk import (
    Descent,
    RealisedRisk,
    Tried,
    drop_p_value,
    fixed_sequence,
    mean_p_value,
    realised_risk,
)
from telltale.decode.step_verified.report.discrimination import auroc
from telltale.decode.step_verified.trials.labelers import AnyLabeler
from telltale.decode.step_verified.trials.running import UNKNOWN, SamplingSettings, prompt_ids
from telltale.decode.step_verified.trials.store import TrialStore
from telltale.decode.step_verified.trials.trial import Trial, Trials
from telltale.decode.verification import grounding_of, log_probability_of
from telltale.errors import CalibrationError

RISK_FRACTIONS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2)
"""Thresholds to try: where the pilot's risk is these multiples of alpha."""
ACCEPTANCES = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)
"""Thresholds to try for the accuracy: where the pilot accepts these shares of steps."""


def calibrate(
    guard: StepVerified,
    problems: Sequence[Any],
    labeler: AnyLabeler,
    *,
    alpha: float = 0.05,
    method: str = "crc",
    risk: str | None = None,
    confidence: float = 0.9,
    loss: str = "mean",
    unknown: str = "skip",
    beta: float | str | None = None,
    normaliser: str | None = None,
    extremes: str = "robust",
    debias: str | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    split: tuple[float, float, float] = SPLIT,
    rounds: int = 3,
    batch: int = 32,
    encode: Callable[[Any, Any], list[int]] = prompt_ids,
    store: TrialStore | None = None,
    on_problems: OnProblems | None = None,
) -> Calibration:
    """Fit ``guard``'s score and choose its threshold on ``problems`` that ``labeler`` can judge.

    ``method`` "crc": the expected loss of a new problem is at most ``alpha``; the loss is the share of its drafted steps that are
    accepted and wrong (``loss`` "mean"), or whether there is any ("any"). "ltt": with ``confidence``, over the draw of the
    calibration problems, ``risk`` is at most ``alpha``: "accuracy-drop" (the default; right answers lost against the target alone)
    or "steps". An ``alpha`` that so many problems cannot show, 1/(n + 1) for "crc", gives the threshold inf, with a
    warning.

    ``beta`` "choose" takes the weight that accepts most at the risk; None keeps the config's, and so does ``normaliser`` (a kind).
    ``extremes`` of "minmax" are "robust" (1% and 99% quantiles) or "exact". ``debias`` "position-ecdf" fits groundings by place.
    ``unknown``: whether steps that the labeler cannot judge are left out ("skip"), "wrong" or "right". ``split``: shares of
    pilot, calibration and check problems. ``store`` keeps finished trials, so that an interrupted calibration goes on.

    Raises :class:`~telltale.errors.CalibrationError` for a signal that is the same for all steps ("degenerate"), too few
    problems, or answers that cannot be judged; :class:`~telltale.errors.ConfigError` for settings out of range.
    """
    config = starting_config(guard.config, beta, normaliser, debias)
    check_choice("method", method, METHODS)
    check_range("alpha", alpha, low=0.0, high=1.0)
    if method == "ltt":
        # That a risk is below all it can be needs no test.
        check_range("alpha", alpha, below=1.0)
    risk = risk or ("steps" if method == "crc" else "accuracy-drop")
    check_choice("risk", risk, RISKS if method == "ltt" else ("steps",))
    check_range("confidence", confidence, low=0.0, below=1.0)
    check_choice("loss", loss, ("mean", "any"))
    check_choice("unknown", unknown, UNKNOWN)
    check_integer("rounds", rounds, low=1)
    check_seed(seed)
    sampling = sampling or SamplingSettings()
    runs = Runs(guard, labeler, sampling, seed, batch, unknown, loss, encode, store, on_problems)
    if risk == "accuracy-drop" and not hasattr(labeler, "answer_right"):
        raise CalibrationError(
            f"risk='accuracy-drop' needs to know which answers are right, and a {type(labeler).__name__} does not; take a task's "
            f"checker, or risk='steps'."
        )
    pilot, calibration, check = parts(problems, split, seed=seed)
    config, trials = piloted(
        runs, config, pilot, alpha=alpha, beta=beta, extremes=extremes, debias=debias, rounds=rounds
    )
    signals, notes = _signals(trials, config, seed=seed)
    judged = fitting.rejudged(trials, config, unknown=unknown)
    if risk == "steps":
        grid = fitting.thresholds_at_risk(judged, [alpha * fraction for fraction in RISK_FRACTIONS], loss=loss)
    else:
        grid = fitting.thresholds_at_acceptance(judged, ACCEPTANCES)
    grid = sorted(set(grid), reverse=True)
    if method == "crc":
        threshold, tried = _descended(runs, config, calibration, grid, alpha)
    else:
        threshold, tried = _tested(runs, config, calibration, grid, alpha, confidence, risk)
    if not threshold < math.inf:
        notes.append(_infeasible(method, alpha, len(calibration), tried))
    config = replace(config, threshold=threshold)
    realised, answers = _realised(runs, config, check, risk)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Calibration(
        config=config,
        method=method,
        risk=risk,
        alpha=float(alpha),
        loss=loss,
        unknown=unknown,
        confidence=confidence if method == "ltt" else None,
        n=len(calibration),
        fingerprints=fingerprints_of(guard),
        sampling=asdict(sampling),
        seed=seed,
        tried=tuple(tried),
        realised=realised,
        answers=answers,
        signals=signals,
        warnings=tuple(notes),
    )


def _descended(
    runs: Runs, config: StepVerifiedConfig, problems: Sequence[Any], grid: Sequence[float], alpha: float
) -> tuple[float, list[Tried]]:
    descent = Descent(alpha=alpha)
    if not descent.feasible(len(problems)):
        return math.inf, []
    for turn, threshold in enumerate(grid):
        found = runs.run(f"threshold {turn + 1} of at most {len(grid)}", replace(config, threshold=threshold), problems)
        losses = [problem.loss(threshold, runs.loss) for problem in found.judged(unknown=runs.unknown)]
        if not descent.try_at(threshold, losses, acceptance=found.acceptance):
            break
    return descent.threshold, descent.tried


def _tested(
    runs: Runs,
    config: StepVerifiedConfig,
    problems: Sequence[Any],
    grid: Sequence[float],
    alpha: float,
    confidence: float,
    risk: str,
) -> tuple[float, list[Tried]]:
    """Learn-then-test by fixed-sequence testing: from the highest threshold down, the first that is not shown ends it."""
    fixed_sequence([1.0], level=1 - confidence)  # a missing MAPIE is told before anything runs
    target = _answers(runs.run("target alone", _alone(config), problems)) if risk == "accuracy-drop" else []
    tried: list[Tried] = []
    for turn, threshold in enumerate(grid):
        found = runs.run(f"threshold {turn + 1} of at most {len(grid)}", replace(config, threshold=threshold), problems)
        if risk == "steps":
            losses = [problem.loss(threshold, runs.loss) for problem in found.judged(unknown=runs.unknown)]
            value, p_value = float(np.mean(losses)), mean_p_value(losses, alpha)
        else:
            drops = [int(a) - int(b) for a, b in zip(target, _answers(found), strict=True)]
            value, p_value = float(np.mean(drops)), drop_p_value(drops, alpha)
        passed = p_value <= 1 - confidence
        tried.append(Tried(threshold, value, alpha, passed, found.acceptance, p_value))
        if not passed:
            break
    shown = fixed_sequence([one.p_value for one in tried if one.p_value is not None], level=1 - confidence)
    return min((tried[place].threshold for place in shown), default=math.inf), tried


def _alone(config: StepVerifiedConfig) -> StepVerifiedConfig:
    """The target alone, one sample a step."""
    return replace(config, policy="target", normaliser=Normaliser(), record_signals=False)


def _answers(found: Trials) -> list[bool]:
    if any(trial.right is None for trial in found.trials):
        raise CalibrationError("the labeler cannot tell whether an answer is right; expected one that can.")
    return [bool(trial.right) for trial in found.trials]


def _realised(
    runs: Runs, config: StepVerifiedConfig, problems: Sequence[Any], risk: str
) -> tuple[RealisedRisk | None, dict[str, float] | None]:
    if not problems or not config.threshold < math.inf:
        return None, None
    found = runs.run("check", config, problems)
    realised = realised_risk(found.judged(unknown=runs.unknown), config.threshold, loss=runs.loss, seed=runs.seed)
    if risk == "steps":
        return realised, None
    target, policy = _answers(runs.run("check, target alone", _alone(config), problems)), _answers(found)
    answers = {"target": float(np.mean(target)), "policy": float(np.mean(policy)), "problems": float(len(problems))}
    return realised, answers | {"drop": answers["target"] - answers["policy"]}


def _signals(
    trials: Sequence[Trial], config: StepVerifiedConfig, *, seed: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """AUROC at fixed length of the signals that the score reads, and warnings about those that point the wrong way."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    steps = [(t.problem, s) for t in trials for s in t.steps if s.right is not None and s.score is not None]
    for name, reads, value_of in (
        ("log-probability", config.reads_log_probability and config.score != "likelihood-ratio", log_probability_of),
        ("grounding", config.reads_grounding, grounding_of),
    ):
        if not reads or not steps:
            continue
        own = auroc(
            [value_of(fitting.reading_of(step, config), config) for _, step in steps],
            [bool(step.right) for _, step in steps],
            strata=[step.length for _, step in steps],
            clusters=[problem for problem, _ in steps],
            seed=seed,
        )
        found[name] = own.to_dict()
        if own.value < 0.5:
            notes.append(
                f"the {config.signal_model}'s {name} ranks right steps below wrong ones of the same length (AUROC {own.value:.2f}, "
                f"95% interval {own.low:.2f} to {own.high:.2f}); consider a beta that leaves it out."
            )
    return found, notes


def _infeasible(method: str, alpha: float, count: int, tried: Sequence[Tried]) -> str:
    if method == "crc" and not tried:
        needed = f"it takes {math.ceil(1 / alpha) - 1}" if alpha else "no number is enough"
        reason = f"alpha={alpha} cannot be shown with {count} calibration problems ({needed})"
    else:
        reason = f"no threshold that was tried keeps the risk at alpha={alpha} on {count} calibration problems"
    return f"{reason}; the threshold is inf, and the target writes every step."
