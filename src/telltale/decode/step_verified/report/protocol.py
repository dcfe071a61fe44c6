"""The measurement behind ``telltale specguard report``: which runs are made, and what is read off them.

1. *Record*: half of the drafted steps are accepted at random, every signal of both models is read. So prefixes favour no signal,
   and hold accepted mistakes as deployment does. Signals, increments and acceptance curves come from here.
2. *Frontier*: each score is run at thresholds that accept given shares of the recorded steps, beside the target alone, the draft
   alone, random acceptance at five rates and the oracle, all on the same problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from telltale.configuration import check_integer, check_range, check_seed
from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import Normaliser, StepVerifiedConfig
from telltale.decode.step_verified.calibration.calibrated import Calibration, fingerprints_of
from telltale.decode.step_verified.calibration.fitting import rejudged, thresholds_at_acceptance, with_normaliser
from telltale.decode.step_verified.calibration.risk import realised_risk
from telltale.decode.step_verified.report.acceptance import acceptance_curves
from telltale.decode.step_verified.report.findings import findings
from telltale.decode.step_verified.report.frontier import PolicyRuns, point, sizes
from telltale.decode.step_verified.report.signals import StepTable, increment, signal_reports, step_table
from telltale.decode.step_verified.trials.labelers import AnyLabeler
from telltale.decode.step_verified.trials.running import SamplingSettings, oracle, prompt_ids, run, with_config
from telltale.decode.step_verified.trials.store import TrialStore
from telltale.decode.verification import Verifier
from telltale.errors import ConfigError, DataError

SCORES: dict[str, dict[str, Any]] = {
    "target log-probability": {"score": "log-probability", "signal_model": "target"},
    "draft log-probability": {"score": "log-probability", "signal_model": "draft"},
    "target ensemble": {"score": "ensemble", "signal_model": "target", "beta": 0.3},
    "draft ensemble": {"score": "ensemble", "signal_model": "draft", "beta": 0.3},
    "draft grounding": {"score": "grounding", "signal_model": "draft"},
    "target grounding": {"score": "grounding", "signal_model": "target"},
    "agreement": {"score": "agreement"},
    "likelihood ratio": {"score": "likelihood-ratio"},
}
"""Scores by name. "draft ensemble" is the paper's: beta 0.3, the draft's signals."""
DEFAULT_SCORES = ("target log-probability", "draft log-probability", "draft ensemble")
ACCEPTANCES = (0.9, 0.75, 0.6, 0.4)
RANDOM_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
RECORD_RATE = 0.5
INCREMENTS = (
    ("draft log-probability", "draft grounding"),
    ("target log-probability", "target grounding"),
    ("draft log-probability", "target log-probability"),
)

OnProblems = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Protocol:
    """What to measure. ``acceptances``: shares of recorded steps that each score's thresholds accept."""

    scores: tuple[str, ...] = DEFAULT_SCORES
    acceptances: tuple[float, ...] = ACCEPTANCES
    random_rates: tuple[float, ...] = RANDOM_RATES
    seeds: tuple[int, ...] = (0,)
    draws: int = 1000
    """Bootstrap resamples."""
    batch: int = 32
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.scores if name not in SCORES]
        if unknown:
            raise ConfigError(f"score {unknown[0]!r} is unknown; expected some of {', '.join(SCORES)}.")
        for rate in self.acceptances:
            check_range("acceptances", rate, low=0.0, high=1.0)
        if len(self.random_rates) < 2:
            raise ConfigError(f"random_rates={self.random_rates!r}; expected at least two, to be compared in between.")
        for rate in self.random_rates:
            check_range("random_rates", rate, low=0.0, high=1.0)
        if not self.seeds:
            raise ConfigError("seeds are empty; expected at least one.")
        for seed in self.seeds:
            check_seed(seed)
        check_integer("draws", self.draws, low=1)


@dataclass(frozen=True)
class _Job:
    guard: StepVerified
    base: StepVerifiedConfig
    problems: Sequence[Any]
    labeler: AnyLabeler
    protocol: Protocol
    encode: Callable[[Any, Any], list[int]]
    store: TrialStore | None
    on_problems: OnProblems | None

    def check(self) -> None:
        """Raise :class:`~telltale.errors.ConfigError` for a score that cannot be run, before anything is."""
        for name in self.protocol.scores:
            config = replace(self.base, **SCORES[name])
            if config.compares_candidates and self.protocol.sampling.temperature == 0:
                raise ConfigError(config.needs_candidates("temperature=0"))

    def runs(self, name: str, *, verifier: Verifier | None = None, **changes: Any) -> PolicyRuns:
        """The base configuration with ``changes``, once for each seed."""
        config = replace(self.base, **changes)
        found = []
        for seed in self.protocol.seeds:
            found.append(
                run(
                    with_config(self.guard, config, verifier=verifier),
                    self.problems,
                    self.labeler,
                    sampling=self.protocol.sampling,
                    seed=seed,
                    batch=self.protocol.batch,
                    name=name if verifier is not None else "",
                    encode=self.encode,
                    store=self.store,
                    on_problems=None if self.on_problems is None else partial(self.on_problems, name),
                )
            )
        return PolicyRuns(name, found, config.threshold if config.policy == "specguard" else None)


def measure(
    guard: StepVerified,
    problems: Sequence[Any],
    labeler: AnyLabeler,
    protocol: Protocol | None = None,
    *,
    calibration: Calibration | None = None,
    encode: Callable[[Any, Any], list[int]] = prompt_ids,
    store: TrialStore | None = None,
    on_problems: OnProblems | None = None,
) -> dict[str, Any]:
    """The report of ``guard``'s pair of models as plain values; :mod:`telltale.decode.step_verified.report.page` draws it.

    Candidates, fallback, selector and step length are those of ``guard.config``. ``calibration`` adds the calibrated policy and its
    realised risk here. Raises :class:`~telltale.errors.DataError` if the labeler cannot judge answers or any step.
    """
    protocol = protocol or Protocol()
    if not hasattr(labeler, "answer_right"):
        raise DataError(f"a {type(labeler).__name__} cannot tell which answers are right; expected a labeler that can.")
    base = replace(guard.config, policy="specguard", score="ensemble", normaliser=Normaliser(), record_signals=False)
    base = replace(base, debias="none", position_quantiles=(), threshold=-math.inf)
    job = _Job(guard, base, problems, labeler, protocol, encode, store, on_problems)
    job.check()
    recorded = job.runs("record", policy="random", accept_rate=RECORD_RATE, record_signals=True)
    # A problem under another seed stays the same problem: its place is what is resampled.
    trials = [trial for one in recorded.runs for trial in one.trials]
    table = step_table(trials, base)
    seed = protocol.seeds[0]
    signals = signal_reports(table, draws=protocol.draws, seed=seed)
    increments = [
        found
        for first, second in INCREMENTS
        if first in table.signals and second in table.signals
        for found in [increment(table, first, second, draws=protocol.draws, seed=seed)]
        if found is not None
    ]
    document: dict[str, Any] = {
        "problems": len(problems),
        "seeds": list(protocol.seeds),
        "sampling": asdict(protocol.sampling),
        "fingerprints": fingerprints_of(guard),
        "candidates": base.candidates,
        "fallback": base.fallback,
        "exit_layer": guard.exit_layer,
        "recorded": _recorded(table),
        "signals": [one.to_dict() for one in signals],
        "increments": [one.to_dict() for one in increments],
        "acceptance": {name: [p.to_dict() for p in curve] for name, curve in acceptance_curves(table).items()},
    }
    deployed = None
    if calibration is not None and calibration.feasible:
        deployed = job.runs("calibrated", **vars(calibration.config))
    document["frontier"] = _frontier(job, recorded, deployed)
    if calibration is not None:
        document["calibration"] = _calibrated(calibration, deployed, seed=seed)
    document["findings"] = findings(document)
    return document


def _frontier(job: _Job, recorded: PolicyRuns, deployed: PolicyRuns | None) -> dict[str, Any]:
    target = job.runs("target alone", policy="target")
    draft = job.runs("draft alone", policy="draft")
    random = [job.runs(f"random {rate:g}", policy="random", accept_rate=rate) for rate in job.protocol.random_rates]
    verifier = oracle(job.problems, job.labeler, job.guard.tokenizer, encode=job.encode)
    best = job.runs("oracle", policy="verifier", threshold=0.5, verifier=verifier)
    size = sizes(job.guard)

    def described(policy: PolicyRuns) -> dict[str, Any]:
        return point(policy, target=target, random=random, sizes=size, seed=job.protocol.seeds[0])

    scores = {}
    trials = [trial for one in recorded.runs for trial in one.trials]
    steps = [step for trial in trials for step in trial.steps if step.score is not None]
    for name in job.protocol.scores:
        config = replace(job.base, **SCORES[name])
        if config.score == "ensemble":
            config = with_normaliser(steps, config)
        thresholds = thresholds_at_acceptance(rejudged(trials, config), job.protocol.acceptances)
        scores[name] = [
            described(job.runs(name, **(vars(config) | {"threshold": tau})))
            for tau in sorted(set(thresholds), reverse=True)
        ]
    found: dict[str, Any] = {
        "sizes": asdict(size),
        "target": described(target),
        "draft": described(draft),
        "oracle": described(best),
        "random": [described(policy) for policy in random],
        "scores": scores,
    }
    if deployed is not None:
        found["calibrated"] = described(deployed)
    return found


def _calibrated(calibration: Calibration, deployed: PolicyRuns | None, *, seed: int) -> dict[str, Any]:
    """What was promised, and what these problems say under the first seed."""
    found: dict[str, Any] = {
        "method": calibration.method,
        "risk": calibration.risk,
        "alpha": calibration.alpha,
        "threshold": calibration.threshold if calibration.feasible else None,
        "n": calibration.n,
    }
    if deployed is None:
        return found
    judged = deployed.runs[0].judged(unknown=calibration.unknown)
    realised = realised_risk(judged, calibration.threshold, loss=calibration.loss, seed=seed)
    return found | {"realised": realised.to_dict()}


def _recorded(table: StepTable) -> dict[str, Any]:
    return {
        "steps": len(table),
        "problems": len(set(table.problem.tolist())),
        "right": float(table.right.mean()),
        "errors": dict(Counter(error for error in table.error if error is not None)),
        "lengths": {str(length): count for length, count in sorted(Counter(table.length.tolist()).items())},
    }
