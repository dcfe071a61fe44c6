"""The measurement behind ``telltale specguard report``: which runs are made, and what is read off them.

1. *Record*: half of the drafted steps are accepted at random, every signal of both models is read. So prefixes favour no signal,
   and hold accepted mistakes as deployment does. Signals, increments and acceptance curves come from here.
2. *Frontier*: each score is run at thresholds that accept given shares of the recorded steps, beside the target alone, the draft
   alone, random acceptance at five rates and the oracle, all on the same problems.

Each policy is compared with random acceptance at its own share of target tokens: random acceptance costs nothing and needs no
signal, so only the gain over it *at equal share* counts. The matched policy mixes the two random rates whose shares enclose the
score's. The findings are sentences: each states one figure with its interval, and what it does or does not show.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telltale.config import check_integer, check_range, check_seed
from telltale.decode.calibration.calibrate import rejudged, thresholds_at_acceptance, with_normaliser
from telltale.decode.calibration.calibration import Calibration, fingerprints_of
from telltale.decode.calibration.checks import FIRST, coverage_notes, name_of, pair_notes
from telltale.decode.calibration.labelers import AnyLabeler
from telltale.decode.calibration.prompts import Encode, PromptForm, prompt_ids
from telltale.decode.calibration.risk import realised_risk
from telltale.decode.calibration.signal_quality import (
    LENGTH,
    StepTable,
    acceptance_curves,
    increment,
    signal_reports,
    step_table,
)
from telltale.decode.calibration.trials import (
    Coverage,
    SamplingSettings,
    Trials,
    TrialStore,
    described,
    oracle,
    run,
    with_config,
)
from telltale.decode.decoders import StepVerified
from telltale.decode.engine import Verifier
from telltale.decode.step_config import Normaliser, StepVerifiedConfig
from telltale.errors import ConfigError, DataError
from telltale.runs.files import strict_json
from telltale.signals.statistics import mcnemar, mean_with_interval

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
    decoder: StepVerified
    base: StepVerifiedConfig
    problems: Sequence[Any]
    labeler: AnyLabeler
    protocol: Protocol
    encode: Encode
    store: TrialStore | None
    on_problems: OnProblems | None

    def check(self) -> None:
        """Raise :class:`~telltale.errors.ConfigError` for a score that cannot be run, before anything is."""
        for name in self.protocol.scores:
            config = replace(self.base, **SCORES[name])
            if config.compares_candidates and self.protocol.sampling.temperature == 0:
                raise ConfigError(config.needs_candidates("temperature=0"))

    def one_run(
        self,
        name: str,
        config: StepVerifiedConfig,
        *,
        seed: int,
        count: int | None = None,
        verifier: Verifier | None = None,
    ) -> Trials:
        """The first ``count`` problems (None: all) under one configuration and seed."""
        return run(
            with_config(self.decoder, config, verifier=verifier),
            self.problems[:count],
            self.labeler,
            sampling=self.protocol.sampling,
            seed=seed,
            batch=self.protocol.batch,
            name=name if verifier is not None else "",
            encode=self.encode,
            store=self.store,
            on_problems=None if self.on_problems is None else partial(self.on_problems, name),
        )

    def first_look(self) -> list[str]:
        """What is said about the pair before anything else is run."""
        seed = self.protocol.seeds[0]
        notes = pair_notes(lambda stage, config: self.one_run(stage, config, seed=seed, count=FIRST), self.base)
        for note in notes:
            warnings.warn(note, stacklevel=4)
        return notes

    def runs(self, name: str, *, verifier: Verifier | None = None, **changes: Any) -> PolicyRuns:
        """The base configuration with ``changes``, once for each seed."""
        config = replace(self.base, **changes)
        found = [self.one_run(name, config, seed=seed, verifier=verifier) for seed in self.protocol.seeds]
        return PolicyRuns(name, found, config.threshold if config.policy == "specguard" else None)


def measure(
    decoder: StepVerified,
    problems: Sequence[Any],
    labeler: AnyLabeler,
    protocol: Protocol | None = None,
    *,
    calibration: Calibration | None = None,
    encode: Encode = prompt_ids,
    store: TrialStore | None = None,
    on_problems: OnProblems | None = None,
) -> dict[str, Any]:
    """The report of ``decoder``'s pair of models as plain values; :mod:`telltale.decode.calibration.page` draws it.

    Candidates, fallback, selector and step length are those of ``decoder.config``. ``calibration`` adds the calibrated policy and
    its realised risk here. Raises :class:`~telltale.errors.DataError` if the labeler cannot judge answers or any step.
    """
    protocol = protocol or Protocol()
    if not hasattr(labeler, "answer_right"):
        raise DataError(
            f"a {type(labeler).__name__} cannot judge which answers are right; expected a labeler that can."
        )
    base = replace(decoder.config, policy="specguard", score="ensemble", normaliser=Normaliser(), record_signals=False)
    base = replace(base, debias="none", position_quantiles=(), threshold=-math.inf)
    job = _Job(decoder, base, problems, labeler, protocol, encode, store, on_problems)
    job.check()
    form = PromptForm.of(encode, decoder.tokenizer, [encode(decoder.tokenizer, problem) for problem in problems])
    if calibration is not None and calibration.prompts is not None:
        calibration.prompts.check(form)
    alarms = job.first_look()
    recorded = job.runs("record", policy="random", accept_rate=RECORD_RATE, record_signals=True)
    # A problem under several seeds is one unit of the bootstrap.
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
        "fingerprints": fingerprints_of(decoder),
        "candidates": base.candidates,
        "fallback": base.fallback,
        "exit_layer": decoder.exit_layer,
        "prompts": form.describe(),
        "recorded": _recorded(table),
        "signals": strict_json(signals),
        "increments": strict_json(increments),
        "acceptance": strict_json(acceptance_curves(table)),
    }
    deployed = None
    if calibration is not None and calibration.feasible:
        deployed = job.runs("calibrated", **vars(calibration.config))
    draft = job.runs("draft alone", policy="draft")
    document["checker"] = _checker(labeler, draft)
    document["frontier"] = _frontier(job, recorded, draft, deployed)
    document["alarms"] = [*alarms, *_blind(draft), *_below_target(document)]
    if calibration is not None:
        document["calibration"] = _calibrated(calibration, deployed, seed=seed)
    document["findings"] = findings(document)
    return document


def _checker(labeler: AnyLabeler, draft: PolicyRuns) -> dict[str, Any]:
    """Who labelled, and what of the draft's own mistakes that labeler saw."""
    coverage = _coverage(draft)
    found = {} if coverage is None else coverage.to_dict()
    return {"called": name_of(labeler), "labeler": described(labeler)} | found


def _coverage(draft: PolicyRuns) -> Coverage | None:
    return Trials([trial for one in draft.runs for trial in one.trials]).coverage


def _blind(draft: PolicyRuns) -> list[str]:
    return coverage_notes(_coverage(draft), unknown="skip")


def _below_target(document: dict[str, Any]) -> list[str]:
    """An alarm where accepting what the labels call right costs answers: then the labels, or the problems, are too few to trust."""
    oracle, target = document["frontier"]["oracle"], document["frontier"]["target"]
    lost = -oracle["over_target"]["value"]
    if lost <= 0:
        return []
    return [
        f"accepting exactly what the {document['checker']['called']} finds right loses answers: {_percent(oracle['accuracy'])} "
        f"against {_percent(target['accuracy'])} of the target alone{_interval(oracle['over_target'], 100)}. Wrong steps pass as "
        f"right, or chance did it with so few problems; no figure here that rests on these labels can be trusted. Label by "
        f"roll-outs, or look at accepted steps of wrong answers."
    ]


def _frontier(job: _Job, recorded: PolicyRuns, draft: PolicyRuns, deployed: PolicyRuns | None) -> dict[str, Any]:
    target = job.runs("target alone", policy="target")
    random = [job.runs(f"random {rate:g}", policy="random", accept_rate=rate) for rate in job.protocol.random_rates]
    verifier = oracle(job.problems, job.labeler, job.decoder.tokenizer, encode=job.encode)
    best = job.runs(name_of(job.labeler), policy="verifier", threshold=0.5, verifier=verifier)
    size = sizes(job.decoder)

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
    """What was promised, and what was measured on these problems under the first seed."""
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


Floats = NDArray[np.float64]


@dataclass
class PolicyRuns:
    """One policy over all problems, once for each sampling seed."""

    name: str
    runs: list[Trials]
    threshold: float | None = None

    @property
    def right(self) -> Floats:
        """For each problem, the share of seeds with a right answer, (n,). Raises DataError if the labeler cannot judge answers."""
        rows = [[trial.right for trial in run.trials] for run in self.runs]
        if any(value is None for row in rows for value in row):
            raise DataError("the labeler cannot judge whether answers are right; expected one that can.")
        return np.asarray(rows, dtype=np.float64).mean(0)

    @property
    def share(self) -> float:
        """Target tokens over all tokens of the output."""
        return float(np.mean([run.target_share for run in self.runs]))

    @property
    def risk(self) -> float:
        """Mean over problems of the share of drafted steps that were accepted and wrong."""
        losses = []
        for policy_run in self.runs:
            for trial in policy_run.trials:
                labels = [step for step in trial.steps if step.right is not None]
                losses.append(
                    sum(step.accepted and step.right is False for step in labels) / len(labels) if labels else 0.0
                )
        return float(np.mean(losses))

    def cost(self, name: str) -> float:
        """A count or time, per token of the output."""
        total = sum(run.cost.get("tokens", 0.0) for run in self.runs)
        return sum(run.cost.get(name, 0.0) for run in self.runs) / total if total else 0.0

    @property
    def wrong_among_accepted(self) -> float | None:
        """Of accepted steps with a label, those that are wrong."""
        labels = [s.right for run in self.runs for s in run.steps if s.accepted and s.right is not None]
        return labels.count(False) / len(labels) if labels else None


@dataclass(frozen=True)
class Sizes:
    """Weights of the draft and of the target, the embedding not counted."""

    draft: int
    target: int


def sizes(decoder: StepVerified) -> Sizes:
    """Of ``decoder``'s models; a draft of the target's first layers has their share."""
    target = _body(decoder.target.model)
    if decoder.draft is not None:
        return Sizes(_body(decoder.draft.model), target)
    return Sizes(round(target * (decoder.exit_layer or 0) / decoder.target.layers), target)


def random_at(random: Sequence[PolicyRuns], share: float) -> tuple[Floats, float]:
    """Right answers (n,) that accepting at random gives at a target ``share``, and the share itself.

    A mixture of the two policies whose shares enclose it; beyond the ends, the end.
    """
    ordered = sorted(random, key=lambda policy: policy.share)
    shares = [policy.share for policy in ordered]
    if share <= shares[0]:
        return ordered[0].right, shares[0]
    if share >= shares[-1]:
        return ordered[-1].right, shares[-1]
    above = int(np.searchsorted(shares, share))
    low, high = ordered[above - 1], ordered[above]
    weight = (share - low.share) / (high.share - low.share)
    return (1 - weight) * low.right + weight * high.right, share


def point(
    policy: PolicyRuns,
    *,
    target: PolicyRuns,
    random: Sequence[PolicyRuns],
    sizes: Sizes,
    strata: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of a policy, in plain values. ``strata``: groups that problems are resampled within."""

    def estimate(values: Floats) -> dict[str, Any]:
        found: dict[str, Any] = strict_json(mean_with_interval(values, strata=strata, seed=seed))
        return found

    matched, matched_share = random_at(random, policy.share)
    steps = [step for run in policy.runs for step in run.steps]
    return {
        "policy": policy.name,
        "threshold": policy.threshold,
        "accuracy": estimate(policy.right),
        "target_share": policy.share,
        "acceptance": sum(step.accepted for step in steps) / len(steps) if steps else None,
        "wrong_among_accepted": policy.wrong_among_accepted,
        "accepted_and_wrong": policy.risk,
        "over_target": estimate(policy.right - target.right),
        "over_random": estimate(policy.right - matched) | {"random_share": matched_share},
        "mcnemar_target": mcnemar(*_first(policy, target)),
        "compute": compute(policy, target, sizes),
        "scored_per_token": policy.cost("scored_tokens"),
        "drafted_per_token": policy.cost("drafted_tokens"),
        "milliseconds_per_token": 1e3 * policy.cost("seconds"),
        "cpu_milliseconds_per_token": 1e3 * policy.cost("cpu_seconds"),
    }


def compute(policy: PolicyRuns, target: PolicyRuns, sizes: Sizes) -> float:
    """Weights passed per token of the output, in units of what the target alone passes; from the engine's own counters.

    Prompts, dropped candidates and padding are part of it. Where weights are read once for many tokens, time is less.
    """
    alone = target.cost("target_layers_passed")
    passed = policy.cost("target_layers_passed") + policy.cost("draft_layers_passed") * sizes.draft / sizes.target
    return passed / alone if alone else 0.0


def _first(policy: PolicyRuns, target: PolicyRuns) -> tuple[list[bool], list[bool]]:
    """Answers under the first seed, which both have."""
    return [bool(t.right) for t in policy.runs[0].trials], [bool(t.right) for t in target.runs[0].trials]


def _body(model: Any) -> int:
    embedding = model.get_input_embeddings().weight
    return sum(parameter.numel() for parameter in model.parameters() if parameter is not embedding)


def findings(document: dict[str, Any]) -> list[str]:
    """The sentences of a report, from its figures alone."""
    signals = {one["name"]: one for one in document["signals"]}
    found = [f"Alarm: {alarm}" for alarm in document.get("alarms", ())]
    found += [_length(signals[LENGTH])]
    judged = [one for name, one in signals.items() if name != LENGTH and _is_main(name)]
    found += [_signal(one) for one in judged if one["fixed_length"]["value"] is not None]
    blind = [one["name"] for one in judged if one["fixed_length"]["value"] is None]
    if blind and signals[LENGTH]["raw"]["value"] is not None:
        found.append(
            f"At fixed length no two steps differ in label, so nothing is known there of the {', '.join(blind)}."
        )
    found += [_increment(one) for one in document["increments"]]
    frontier = document["frontier"]
    scored = {name: points for name, points in frontier["scores"].items() if points}
    every = [frontier[name] for name in ("target", "draft", "oracle")]
    every += [point for points in scored.values() for point in points]
    reached = {one["accuracy"]["value"] for one in every}
    if len(reached) == 1:
        found.append(
            f"Every policy answers {_percent(every[0]['accuracy'])} of the problems right: no score can be compared."
        )
    else:
        found += [_score(name, points) for name, points in scored.items()]
    found.append(_bound(document))
    calibration = document.get("calibration")
    if calibration is not None:
        found.append(_calibration(calibration))
    return found


def _bound(document: dict[str, Any]) -> str:
    """What accepting by the labels themselves reaches, and under which name."""
    frontier, checker = document["frontier"], document["checker"]
    best, target = frontier["oracle"], frontier["target"]
    reach = (
        f"{_percent(best['accuracy'])} at a target share of {best['target_share']:.2f}; the target alone reaches "
        f"{_percent(target['accuracy'])}, the draft alone {_percent(frontier['draft']['accuracy'])}."
    )
    seen = ""
    if checker.get("wrong"):
        seen = f" In {checker['unflagged']} of the draft's {checker['wrong']} wrong answers it flagged no step"
        seen += f", and {checker['unknown_share']:.0%} of the steps it could not judge." if checker["unknown"] else "."
    if checker["called"] == "oracle":
        return f"An oracle that knows right steps from wrong ones would reach {reach}{seen}"
    return f"Accepting exactly what the {checker['called']} finds right reaches {reach} It is no oracle.{seen}"


def _is_main(name: str) -> bool:
    return name.endswith(("log-probability", "grounding")) or name in ("agreement", "likelihood ratio")


def _length(one: dict[str, Any]) -> str:
    raw = one["raw"]["value"]
    if raw is None:
        return "All recorded steps have the same label, so no signal can be judged on them."
    if abs(raw - 0.5) < 0.05:
        return f"Step length alone predicts little about correctness here (AUROC {raw:.2f})."
    side = "Shorter" if raw > 0.5 else "Longer"
    return (
        f"{side} steps are more often right here: length alone has an AUROC of {max(raw, 1 - raw):.2f}, which any signal "
        f"that follows length inherits. Read the fixed-length column."
    )


def _signal(one: dict[str, Any]) -> str:
    fixed, raw = one["fixed_length"], one["raw"]
    figures = f"AUROC {fixed['value']:.2f} at fixed step length{_interval(fixed)}, {raw['value']:.2f} over all lengths"
    if fixed["low"] is None:
        return f"The {one['name']}: {figures}; too few problems for an interval."
    if fixed["low"] > 0.5:
        return f"The {one['name']} ranks right steps above wrong ones: {figures}."
    if fixed["high"] < 0.5:
        return f"The {one['name']} points the wrong way: {figures}."
    return f"The {one['name']} shows nothing: {figures}."


def _increment(one: dict[str, Any]) -> str:
    figures = (
        f"{one['without']:.3f} to {one['with_extra']:.3f}, a difference of {one['difference']:+.3f}{_interval(one)}"
    )
    if one["low"] is not None and one["low"] > 0:
        verdict = "adds to"
    elif one["high"] is not None and one["high"] < 0:
        verdict = "takes away from"
    else:
        verdict = "is not shown to add to"
    return f"At fixed length the {one['extra']} {verdict} the {one['base']}: AUROC {figures}."


def _score(name: str, points: list[dict[str, Any]]) -> str:
    best = max(points, key=lambda one: one["over_random"]["value"])
    gain, against = best["over_random"], best["over_target"]
    if gain["low"] > 0:
        verdict = "beats random acceptance at the same target share"
    elif gain["high"] < 0:
        verdict = "is worse than random acceptance at the same target share"
    else:
        verdict = "is not shown to beat random acceptance at the same target share"
    return (
        f"Accepting by {name} {verdict}: {100 * gain['value']:+.1f} points{_interval(gain, 100)} at a share of "
        f"{best['target_share']:.2f}, the best of {len(points)} thresholds, so read it with care; against the target alone "
        f"{100 * against['value']:+.1f} points{_interval(against, 100)}."
    )


def _calibration(one: dict[str, Any]) -> str:
    if one["threshold"] is None:
        return f"The calibration found no threshold for alpha = {one['alpha']}: the target writes every step."
    realised = one["realised"]
    held = realised["low"] <= one["alpha"]
    return (
        f"At the calibrated threshold {realised['rate']:.3f} of a problem's drafted steps were accepted and wrong "
        f"({realised['low']:.3f} to {realised['high']:.3f}, Clopper-Pearson on one step a problem), "
        + (
            f"which agrees with alpha = {one['alpha']}."
            if held and one["risk"] == "steps"
            else f"which exceeds alpha = {one['alpha']}: the promise did not carry over to these problems."
            if one["risk"] == "steps"
            else f"alpha = {one['alpha']} being about answers lost."
        )
    )


def _percent(one: dict[str, Any]) -> str:
    return f"{100 * one['value']:.1f}%"


def _interval(one: dict[str, Any], factor: float = 1.0) -> str:
    if one["low"] is None or one["high"] is None:
        return ""
    digits = 1 if factor == 100 else 2
    return f" (95% interval {factor * one['low']:.{digits}f} to {factor * one['high']:.{digits}f})"
