"""Before a threshold is calibrated: problems split, the score fitted, and thresholds to try found on pilot problems alone.

The policy runs on the pilot problems, is fitted to what it drafted, and runs again as fitted, until its acceptance settles. Nothing
here is promised anything; what it fits is fixed before the calibration problems are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from telltale.configuration import check_choice, check_range
from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import GROUNDING, LOG_PROBABILITY, Normaliser, StepVerifiedConfig
from telltale.decode.step_verified.calibration import fitting
from telltale.decode.step_verified.trials.labelers import AnyLabeler
from telltale.decode.step_verified.trials.running import SamplingSettings, run, with_config
from telltale.decode.step_verified.trials.store import TrialStore
from telltale.decode.step_verified.trials.trial import Trial, Trials
from telltale.errors import CalibrationError, ConfigError

SPLIT = (0.3, 0.5, 0.2)
"""Shares of pilot, calibration and check problems."""
SETTLED = 0.02
"""Change of acceptance below which the pilot has settled."""

OnProblems = Callable[[str, int, int], None]
"""Stage, problems done, problems of the stage. May raise to stop."""


@dataclass(frozen=True)
class Runs:
    """What all runs of one calibration share."""

    guard: StepVerified
    labeler: AnyLabeler
    sampling: SamplingSettings
    seed: int
    batch: int
    unknown: str
    loss: str
    encode: Callable[[Any, Any], list[int]]
    store: TrialStore | None
    on_problems: OnProblems | None

    def run(self, stage: str, config: StepVerifiedConfig, problems: Sequence[Any]) -> Trials:
        """The trials of ``problems`` under ``config``."""
        return run(
            with_config(self.guard, config),
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
) -> tuple[StepVerifiedConfig, list[Trial]]:
    """The fitted configuration, and what it recorded last. The first round accepts all; later ones run as fitted."""
    config = replace(config, threshold=-math.inf)
    before: float | None = None
    for turn in range(rounds):
        # A weight is chosen again every round, from both signals, whatever the last one left out.
        reading = replace(config, beta=0.5) if beta == "choose" else config
        found = runs.run(
            f"pilot {turn + 1}", replace(config, record_signals=True) if beta == "choose" else config, problems
        )
        scored = [step for step in found.steps if step.score is not None]
        if not scored:
            raise CalibrationError(
                "no drafted step was scored; expected the draft to finish steps within max_step_tokens."
            )
        if all(step.right is None for step in scored):
            raise CalibrationError("the labeler could judge none of the drafted steps; expected labels for some.")
        if config.policy == "specguard":
            if debias == "position-ecdf":
                reading = fitting.with_positions(scored, reading)
            fitted = fitting.with_normaliser(scored, reading, extremes=extremes)
            if beta == "choose":
                chosen = fitting.best_beta(found.trials, fitted, alpha=alpha, loss=runs.loss, unknown=runs.unknown)
                fitted = replace(fitted, beta=chosen)
            config = fitted
        judged = fitting.rejudged(found.trials, config, unknown=runs.unknown)
        threshold = fitting.thresholds_at_risk(judged, [alpha], loss=runs.loss)[0]
        config = replace(config, threshold=threshold)
        after = float(np.mean([score >= threshold for problem in judged for score in problem.scores]))
        if before is not None and abs(after - before) < SETTLED:
            break
        before = after
    return config, found.trials


def _unfitted(kind: str) -> Normaliser:
    """A normaliser of ``kind`` with wide scales, to run with until the first round has been recorded."""
    wide = {
        name: replace(scale, quantiles=(scale.low, scale.high))
        for name, scale in (("log_probability", LOG_PROBABILITY), ("grounding", GROUNDING))
    }
    return Normaliser(kind, wide["log_probability"], wide["grounding"])
