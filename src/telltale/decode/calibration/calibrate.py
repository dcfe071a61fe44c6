"""Fit the score of a policy, then choose a threshold that bounds its risk: wrong steps accepted, or right answers lost.

Problems are split at random into three parts:

* *Pilot* problems fit the normaliser, beta and a short list of thresholds. The policy runs, is fitted to what it drafted, and
  runs again as fitted until its acceptance settles. Only pilot problems are used to fit.
* *Calibration* problems choose the threshold. The policy runs on them at each listed threshold, from the highest down, until one
  fails. So its prefixes are those of the deployed policy. Conformal risk control (arXiv 2208.02814) or learn-then-test (arXiv
  2110.01052) makes the choice; the unit is the problem.
* *Check* problems take part in neither and give the realised risk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from telltale.config import check_choice, check_integer, check_range, check_seed
from telltale.decode.calibration.calibration import METHODS, RISKS, Calibration, fingerprints_of
from telltale.decode.calibration.checks import FIRST, alone, coverage_notes, pair_notes
from telltale.decode.calibration.labelers import AnyLabeler
from telltale.decode.calibration.prompts import Encode, PromptForm, prompt_ids
from telltale.decode.calibration.risk import (
    Descent,
    Judged,
    RealisedRisk,
    Tried,
    drop_p_value,
    fixed_sequence,
    mean_p_value,
    realised_risk,
)
from telltale.decode.calibration.trials import (
    UNKNOWN,
    Coverage,
    SamplingSettings,
    StepTrial,
    Trial,
    Trials,
    TrialStore,
    described,
    run,
    with_config,
)
from telltale.decode.decoders import StepVerified
from telltale.decode.results import StepSignals
from telltale.decode.step_config import GROUNDING, LOG_PROBABILITY, Normaliser, Scale, StepVerifiedConfig
from telltale.decode.verification import grounding_of, log_probability_of, score_of
from telltale.errors import CalibrationError, ConfigError, DataError
from telltale.runs.files import strict_json
from telltale.signals.statistics import auroc

SPLIT = (0.3, 0.5, 0.2)
"""Shares of pilot, calibration and check problems."""
SETTLED = 0.02
"""Change of acceptance below which the pilot has settled."""

OnProblems = Callable[[str, int, int], None]
"""Stage, problems done, problems of the stage. May raise to stop."""


@dataclass(frozen=True)
class Runs:
    """What all runs of one calibration share."""

    decoder: StepVerified
    labeler: AnyLabeler
    sampling: SamplingSettings
    seed: int
    batch: int
    unknown: str
    loss: str
    encode: Encode
    store: TrialStore | None
    on_problems: OnProblems | None

    def run(self, stage: str, config: StepVerifiedConfig, problems: Sequence[Any]) -> Trials:
        """The trials of ``problems`` under ``config``."""
        return run(
            with_config(self.decoder, config),
            problems,
            self.labeler,
            sampling=self.sampling,
            seed=self.seed,
            batch=self.batch,
            encode=self.encode,
            store=self.store,
            on_problems=None if self.on_problems is None else partial(self.on_problems, stage),
        )


def parts(
    problems: Sequence[Any], split: tuple[float, float, float] = SPLIT, *, seed: int = 0
) -> tuple[list[Any], list[Any], list[Any]]:
    """Pilot, calibration and check problems, at random from the seed.

    Raises :class:`~telltale.errors.CalibrationError` unless the first two have at least one problem each.
    """
    if len(split) != 3 or min(split) < 0 or not math.isclose(sum(split), 1.0, abs_tol=1e-9):
        raise ConfigError(f"split={split!r} is not allowed; expected three shares that sum to 1.")
    order = np.random.default_rng(seed).permutation(len(problems))
    first = round(split[0] * len(problems))
    second = first + round(split[1] * len(problems))
    found = tuple(
        [problems[place] for place in places] for places in (order[:first], order[first:second], order[second:])
    )
    if not found[0] or not found[1]:
        raise CalibrationError(
            f"{len(problems)} problems, split {split}, leave {len(found[0])} to fit on and {len(found[1])} to calibrate on; "
            f"expected at least one of each."
        )
    return found[0], found[1], found[2]


def starting_config(
    config: StepVerifiedConfig, beta: float | str | None, normaliser: str | None, debias: str | None
) -> StepVerifiedConfig:
    """``config`` as the first round runs it. Raises :class:`~telltale.errors.ConfigError` for what cannot be calibrated."""
    if config.policy not in ("specguard", "verifier"):
        raise ConfigError(
            f"policy={config.policy!r} has no threshold to calibrate; expected 'specguard', or 'verifier' with a callable."
        )
    if normaliser is not None:
        config = replace(config, normaliser=_unfitted(normaliser))
    if beta is not None and beta != "choose":
        check_range("beta", beta, low=0.0, high=1.0)
        config = replace(config, beta=float(beta))
    if beta == "choose":
        if config.policy != "specguard" or config.score != "ensemble" or config.normaliser.kind == "group":
            raise ConfigError(
                "beta='choose' weighs recorded signals of the score 'ensemble'; expected that score, and another normaliser than "
                "'group'."
            )
        # Both signals are read only if both have a weight.
        config = replace(config, beta=0.5)
    if debias is not None:
        check_choice("debias", debias, ("none", "position-ecdf"))
        # Fitted to what the first round records; until then groundings are taken as they are.
        config = replace(config, debias="none", position_quantiles=())
    return config


def piloted(
    runs: Runs,
    config: StepVerifiedConfig,
    problems: Sequence[Any],
    *,
    alpha: float,
    beta: float | str | None,
    extremes: str,
    debias: str | None,
    rounds: int,
) -> tuple[StepVerifiedConfig, list[Trial], Coverage | None]:
    """The fitted configuration, what it recorded last, and what the labeler saw in the first round.

    That one accepts all, later ones run as fitted.
    """
    config = replace(config, threshold=-math.inf)
    before: float | None = None
    coverage: Coverage | None = None
    for turn in range(rounds):
        # A weight is chosen again every round, from both signals, whatever the last one left out.
        reading = replace(config, beta=0.5) if beta == "choose" else config
        found = runs.run(
            f"pilot {turn + 1}", replace(config, record_signals=True) if beta == "choose" else config, problems
        )
        coverage = found.coverage if turn == 0 else coverage
        scored = [step for step in found.steps if step.score is not None]
        if not scored:
            raise CalibrationError(
                "no drafted step was scored; expected the draft to finish steps within max_step_tokens."
            )
        if all(step.right is None for step in scored):
            raise CalibrationError("the labeler could judge none of the drafted steps; expected labels for some.")
        if config.policy == "specguard":
            if debias == "position-ecdf":
                reading = with_positions(scored, reading)
            fitted = with_normaliser(scored, reading, extremes=extremes)
            if beta == "choose":
                chosen = best_beta(found.trials, fitted, alpha=alpha, loss=runs.loss, unknown=runs.unknown)
                fitted = replace(fitted, beta=chosen)
            config = fitted
        judged = rejudged(found.trials, config, unknown=runs.unknown)
        threshold = thresholds_at_risk(judged, [alpha], loss=runs.loss)[0]
        config = replace(config, threshold=threshold)
        after = float(np.mean([score >= threshold for problem in judged for score in problem.scores]))
        if before is not None and abs(after - before) < SETTLED:
            break
        before = after
    return config, found.trials, coverage


def _unfitted(kind: str) -> Normaliser:
    """A normaliser of ``kind`` with wide scales, to run with until the first round has been recorded."""
    wide = {
        name: replace(scale, quantiles=(scale.low, scale.high))
        for name, scale in (("log_probability", LOG_PROBABILITY), ("grounding", GROUNDING))
    }
    return Normaliser(kind, wide["log_probability"], wide["grounding"])


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
    encode: Encode = prompt_ids,
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
        # Every loss is at most 1, so alpha = 1 leaves nothing to test.
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
    if config.compares_candidates and sampling.temperature == 0:
        raise ConfigError(config.needs_candidates("temperature=0"))
    pilot, calibration, check = parts(problems, split, seed=seed)
    early = _told(pair_notes(lambda name, reading: runs.run(f"pilot, {name}", reading, pilot[:FIRST]), config))
    config, trials, coverage = piloted(
        runs, config, pilot, alpha=alpha, beta=beta, extremes=extremes, debias=debias, rounds=rounds
    )
    early += _told(coverage_notes(coverage, unknown=unknown))
    signals, notes = _signals(trials, config, seed=seed)
    judged = rejudged(trials, config, unknown=unknown)
    if risk == "steps":
        grid = thresholds_at_risk(judged, [alpha * fraction for fraction in RISK_FRACTIONS], loss=loss)
    else:
        grid = thresholds_at_acceptance(judged, ACCEPTANCES)
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
        prompts=PromptForm.of(encode, guard.tokenizer, [encode(guard.tokenizer, problem) for problem in problems]),
        labeler=described(labeler),
        coverage=None if coverage is None else coverage.to_dict(),
        sampling=asdict(sampling),
        seed=seed,
        tried=tuple(tried),
        realised=realised,
        answers=answers,
        signals=signals,
        warnings=(*early, *notes),
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
    fixed_sequence([1.0], level=1 - confidence)  # a missing MAPIE is reported before anything runs
    target = _answers(runs.run("target alone", alone(config, "target"), problems)) if risk == "accuracy-drop" else []
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


def _told(notes: list[str]) -> list[str]:
    """``notes``, each as a warning now: what comes next may take hours."""
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def _answers(found: Trials) -> list[bool]:
    if any(trial.right is None for trial in found.trials):
        raise CalibrationError("the labeler cannot judge whether an answer is right; expected one that can.")
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
    target, policy = _answers(runs.run("check, target alone", alone(config, "target"), problems)), _answers(found)
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
            [value_of(reading_of(step, config), config) for _, step in steps],
            [bool(step.right) for _, step in steps],
            strata=[step.length for _, step in steps],
            clusters=[problem for problem, _ in steps],
            seed=seed,
        )
        found[name] = strict_json(own)
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

    Of two equal weights the larger one: log-probabilities need no attention.
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
    """For each rate, the largest observed score that at least this share of the scored steps reaches."""
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
