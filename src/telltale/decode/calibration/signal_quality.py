"""Does a signal separate right steps from wrong ones beyond what their length does? From steps with all signals of both models.

Grounding falls with the position in a step by construction, so its smallest value is low in long steps. Without control for
length no verdict on it is valid. So every signal is compared with length alone, and evaluated at fixed length.

The acceptance curve: as the threshold falls, how many drafted steps are accepted, and how many of these are wrong.

Recorded steps keep the prefixes they were recorded on. :mod:`telltale.decode.calibration.calibration_report` runs the policy at
its thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telltale.decode.calibration.calibrate import with_positions
from telltale.decode.calibration.trials import StepTrial, Trial
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.verification import grounding_of, log_probability_of, score_of
from telltale.errors import DataError, MissingExtraError
from telltale.signals.statistics import Auroc, auroc, auroc_statistic, bootstrap

LENGTH = "length alone"
"""The baseline: minus the number of tokens."""
FOLDS = 5

Floats = NDArray[np.float64]
SignalOf = Callable[[StepTrial], float]


@dataclass
class StepTable:
    """Labelled steps as columns. ``signals`` holds one value a step under each name, higher meaning more trusted."""

    problem: NDArray[np.int64]
    length: NDArray[np.int64]
    right: NDArray[np.bool_]
    error: list[str | None]
    signals: dict[str, Floats]

    def __len__(self) -> int:
        """Steps."""
        return len(self.right)


def step_table(trials: Sequence[Trial], config: StepVerifiedConfig) -> StepTable:
    """The drafted steps of ``trials`` that were scored and have a label. They must have been recorded with ``record_signals``.

    ``config`` says how tokens are reduced to steps. Raises :class:`~telltale.errors.DataError` for no such step.
    """
    steps = [
        (trial.problem, step)
        for trial in trials
        for step in trial.steps
        if step.right is not None and step.score is not None
    ]
    if not steps:
        raise DataError("no drafted step was both scored and labelled; expected a labeler that can judge some.")
    return StepTable(
        problem=np.array([problem for problem, _ in steps]),
        length=np.array([step.length for _, step in steps]),
        right=np.array([bool(step.right) for _, step in steps]),
        error=[step.error for _, step in steps],
        signals={
            name: np.array([of(step) for _, step in steps], dtype=np.float64)
            for name, of in _signals([step for _, step in steps], config).items()
        },
    )


@dataclass(frozen=True)
class SignalReport:
    """One signal: AUROC over all steps, at fixed length, and at fixed length against the wrong steps of each error type."""

    name: str
    raw: Auroc
    fixed_length: Auroc
    by_error: dict[str, Auroc]


def signal_reports(table: StepTable, *, draws: int = 1000, seed: int = 0) -> list[SignalReport]:
    """A report for every signal of ``table``, and for the length alone, which is first."""
    columns = {LENGTH: -table.length.astype(np.float64)} | table.signals
    errors = sorted({error for error in table.error if error is not None})
    kinds = np.array([error or "" for error in table.error])
    found = []
    for name, values in columns.items():

        def of(places: NDArray[np.bool_], *, fixed: bool, values: Floats = values) -> Auroc:
            return auroc(
                values[places],
                table.right[places],
                strata=table.length[places] if fixed else None,
                clusters=table.problem[places],
                resamples=draws,
                seed=seed,
            )

        every = np.ones(len(table), dtype=bool)
        found.append(
            SignalReport(
                name,
                of(every, fixed=False),
                of(every, fixed=True),
                {error: of(table.right | (kinds == error), fixed=True) for error in errors},
            )
        )
    return found


@dataclass(frozen=True)
class Increment:
    """What ``extra`` adds to ``base``: AUROC at fixed length of held-out predictions without and with it, and the difference."""

    base: str
    extra: str
    without: float
    with_extra: float
    difference: float
    low: float
    high: float
    steps: int


def increment(table: StepTable, base: str, extra: str, *, draws: int = 1000, seed: int = 0) -> Increment | None:
    """Does ``extra`` add to ``base`` at fixed length? By a cross-validated logistic regression, whole problems held out.

    Signals are standardised within each step length first, so that the regression cannot read the length off them. None if
    there are too few problems of either kind to hold some out.
    """
    linear, selection = _sklearn("sklearn.linear_model"), _sklearn("sklearn.model_selection")
    keep = _in_large_groups(table)
    right, problem, length = table.right[keep], table.problem[keep], table.length[keep]
    folds = min(FOLDS, len(np.unique(problem)))
    if folds < 2 or min(right.sum(), (~right).sum()) < 2 * folds:
        return None
    columns = {name: _within(table.signals[name][keep], length) for name in (base, extra)}
    predictions = []
    for names in ((base,), (base, extra)):
        features = np.column_stack([columns[name] for name in names])
        held_out = np.full(len(right), np.nan)
        # Folds balanced in labels, or a fold of right steps alone could not be fitted against.
        splits = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train, test in splits.split(features, right, problem):
            if right[train].all() or not right[train].any():
                return None
            model = linear.LogisticRegression(C=100.0).fit(features[train], right[train])
            held_out[test] = model.decision_function(features[test])
        predictions.append(held_out)
    without, with_extra = (auroc_statistic(one, right, length) for one in predictions)
    first, second, added = bootstrap(
        [without, with_extra, lambda weights: with_extra(weights) - without(weights)],
        problem,
        resamples=draws,
        seed=seed,
    )
    return Increment(base, extra, first.value, second.value, added.value, added.low, added.high, int(keep.sum()))


def _signals(steps: Sequence[StepTrial], config: StepVerifiedConfig) -> dict[str, SignalOf]:
    found: dict[str, SignalOf] = {}
    for role in ("draft", "target"):
        own = replace(config, signal_model=role, debias="none", position_quantiles=(), policy="specguard")
        if any(getattr(step, role) is None for step in steps):
            continue
        found[f"{role} log-probability"] = _reading_signal(role, own, log_probability_of)
        found[f"{role} entropy"] = _score_signal(replace(own, score="entropy"))
        found[f"{role} grounding"] = _reading_signal(role, own, grounding_of)
        placed = with_positions(steps, own)
        found[f"{role} grounding by place"] = _reading_signal(role, placed, grounding_of)
    if all(step.draft is not None and step.target is not None for step in steps):
        found["likelihood ratio"] = _score_signal(replace(config, score="likelihood-ratio", policy="specguard"))
    if len({step.agreement for step in steps}) > 1:
        found["agreement"] = lambda step: float(step.agreement or 0.0)
    return found


def _reading_signal(role: str, config: StepVerifiedConfig, of: Callable[..., float]) -> SignalOf:
    return lambda step: of(getattr(step, role), config)


def _score_signal(config: StepVerifiedConfig) -> SignalOf:
    return lambda step: score_of(config, step.draft, step.target, step.agreement, history={})


def _in_large_groups(table: StepTable) -> NDArray[np.bool_]:
    """Steps of lengths at which there is something to compare: both labels, and enough steps to standardise among."""
    keep = np.zeros(len(table), dtype=bool)
    for length in np.unique(table.length):
        own = table.length == length
        if own.sum() >= 10 and table.right[own].any() and not table.right[own].all():
            keep |= own
    return keep


def _within(values: Floats, length: NDArray[np.int64]) -> Floats:
    found = np.zeros_like(values)
    for one in np.unique(length):
        own = length == one
        spread = values[own].std()
        found[own] = (values[own] - values[own].mean()) / (spread if spread > 0 else 1.0)
    return found


def _sklearn(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("the signal report needs scikit-learn: pip install 'telltale[calibrate]'") from error


POINTS = 40
"""Points of a curve that has more."""


@dataclass(frozen=True)
class AcceptancePoint:
    """Accepting what scores ``threshold`` or more: shares of the recorded steps."""

    threshold: float
    accepted: float
    accepted_and_wrong: float
    wrong_among_accepted: float
    right_steps_accepted: float
    """Of the right steps; 0 if there is none."""


def acceptance_curve(
    scores: NDArray[np.float64], right: NDArray[np.bool_], *, points: int = POINTS
) -> list[AcceptancePoint]:
    """At most ``points`` points from the strictest threshold to the laxest; equal scores are accepted together."""
    order = np.argsort(-scores, kind="stable")
    ordered, labels = scores[order], right[order]
    # The last of equal scores: accepting one of them accepts all.
    ends = np.flatnonzero(np.diff(ordered, append=-np.inf) != 0)
    if len(ends) > points:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, points).round().astype(int))]
    good = np.cumsum(labels)
    total, all_good = len(scores), int(labels.sum())
    found = []
    for end in ends:
        accepted = int(end) + 1
        wrong = accepted - int(good[end])
        found.append(
            AcceptancePoint(
                threshold=float(ordered[end]),
                accepted=accepted / total,
                accepted_and_wrong=wrong / total,
                wrong_among_accepted=wrong / accepted,
                right_steps_accepted=int(good[end]) / all_good if all_good else 0.0,
            )
        )
    return found


def acceptance_curves(table: StepTable) -> dict[str, list[AcceptancePoint]]:
    """The curve of every signal of ``table``."""
    return {name: acceptance_curve(values, table.right) for name, values in table.signals.items()}
