"""Problems decoded under one policy, with every drafted step labelled: the data of calibration, reports and benchmarks.

A trial depends on the models, the configuration, the sampling, the seed and its own problem, but not on the batch it was decoded
in (except for equal prompts in one batch). So finished trials can be kept in a folder, and an interrupted job goes on. The folder
has a file for each policy, named by everything that its trials depend on: stale trials are never reused.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from telltale.config import check_integer, check_seed
from telltale.decode.calibration.labelers import AnyLabeler, Drafted, labels_of
from telltale.decode.calibration.prompts import Encode, prompt_ids
from telltale.decode.calibration.risk import Judged
from telltale.decode.decoders import StepVerified
from telltale.decode.engine import Verifier
from telltale.decode.results import StepRecord, StepSignals, StepVerifiedResult
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.verification import Step
from telltale.errors import DataError
from telltale.models.loading import model_fingerprint, tokenizer_fingerprint
from telltale.runs.files import JsonLines

UNKNOWN = ("skip", "wrong", "right")
"""How a step without a label is counted."""


@dataclass(frozen=True)
class SamplingSettings:
    """How every row is sampled. The defaults are the paper's (arXiv 2604.15244, section 4)."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float | None = 0.8
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, low=1)


def with_config(decoder: StepVerified, config: StepVerifiedConfig, *, verifier: Verifier | None = None) -> StepVerified:
    """``decoder``'s models under another configuration."""
    if decoder.draft is None and decoder.exit_layer is not None:
        config = replace(config, exit_layer=decoder.exit_layer)
    with warnings.catch_warnings():
        # The user was warned about the number of layers when the models were opened.
        warnings.filterwarnings("ignore", message=".* layers to read attention from")
        return StepVerified(
            decoder.target,
            decoder.draft,
            decoder.tokenizer,
            config,
            verifier=verifier or decoder.verifier,
            encoder=decoder.encoder,
        )


def run(
    decoder: StepVerified,
    problems: Sequence[Any],
    labeler: AnyLabeler,
    *,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    batch: int = 32,
    name: str = "",
    encode: Encode = prompt_ids,
    store: TrialStore | None = None,
    on_problems: Callable[[int, int], None] | None = None,
) -> Trials:
    """Decode ``problems`` with ``decoder`` and label every drafted step.

    ``store`` keeps finished trials, keyed by all that they depend on, and gives them back; of the labeler and of a verifier it
    the key has kind and ``settings`` (a text), and ``name`` covers the rest. ``on_problems(done, of)`` is called after every batch,
    and may raise to stop: what is done is kept. Raises :class:`~telltale.errors.DataError` for no problems or an empty prompt.
    """
    check_integer("batch", batch, low=1)
    check_seed(seed)
    if not problems:
        raise DataError("no problems were given; expected at least one.")
    sampling = sampling or SamplingSettings()
    prompts = [encode(decoder.tokenizer, problem) for problem in problems]
    kept = None if store is None else store.opened(decoder, sampling, seed, f"{described(labeler)} {name}")
    found: dict[int, Trial] = {}
    cost: dict[str, float] = {}
    keys = _keys(prompts)
    if kept is not None:
        known = kept.trials()
        found = {place: from_dict(known[key], place) for place, key in enumerate(keys) if key in known}
        cost = kept.cost(set(keys))
    missing = [place for place in range(len(problems)) if place not in found]
    for start in range(0, len(missing), batch):
        places = missing[start : start + batch]
        trials, spent = _decoded(
            decoder, [problems[p] for p in places], [prompts[p] for p in places], labeler, sampling, seed
        )
        for place, trial in zip(places, trials, strict=True):
            found[place] = replace(trial, problem=place)
        _add(cost, spent)
        if kept is not None:
            kept.append({keys[p]: to_dict(found[p]) for p in places}, spent)
        if on_problems is not None:
            on_problems(len(found), len(problems))
    return Trials([found[place] for place in range(len(problems))], cost)


def oracle(
    problems: Sequence[Any],
    labeler: AnyLabeler,
    tokenizer: Any,
    *,
    encode: Encode = prompt_ids,
) -> Verifier:
    """A verifier that scores 1 for steps that ``labeler`` finds right and 0 for those that it finds wrong or cannot judge.

    With an exact labeler it is the upper bound for rules that accept steps, else a checker with blind spots; no policy to deploy.
    """
    by_prompt = {tuple(encode(tokenizer, problem)): problem for problem in problems}

    def verify(steps: Sequence[Step]) -> list[float]:
        drafted = [
            Drafted(
                problem=by_prompt[tuple(step.prompt)],
                prompt=tuple(step.prompt),
                before=tuple(step.before),
                accepted=step.accepted,
                tokens=tuple(step.tokens),
                text=step.text,
            )
            for step in steps
        ]
        return [1.0 if label.right else 0.0 for label in labels_of(labeler, drafted)]

    return verify


def _decoded(
    decoder: StepVerified,
    problems: Sequence[Any],
    prompts: Sequence[list[int]],
    labeler: AnyLabeler,
    sampling: SamplingSettings,
    seed: int,
) -> tuple[list[Trial], dict[str, float]]:
    started, cpu = time.perf_counter(), time.process_time()
    result = decoder.generate(prompts, generator=torch.Generator().manual_seed(seed), **asdict(sampling))
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu} | _counts(
        result, one_model=decoder.draft is None
    )
    drafted: list[Drafted] = []
    for problem, prompt, steps in zip(problems, prompts, result.steps, strict=True):
        drafted += _drafted(problem, prompt, steps)
    labels = iter(labels_of(labeler, drafted))
    answer_right = getattr(labeler, "answer_right", None)
    trials = []
    for problem, steps, reason in zip(problems, result.steps, result.stop_reason, strict=True):
        trials.append(
            Trial(
                problem=0,
                right=None if answer_right is None else bool(answer_right(problem, _whole_text(decoder, steps))),
                stop_reason=reason,
                accepted_tokens=sum(len(step.tokens) for step in steps if step.source == "draft"),
                target_tokens=sum(len(step.tokens) for step in steps if step.source == "target"),
                steps=tuple(
                    _step_trial(place, record, next(labels))
                    for place, step in enumerate(steps)
                    if (record := _proposed(step)) is not None
                ),
            )
        )
    return trials, spent


def _whole_text(decoder: StepVerified, steps: Sequence[StepRecord]) -> str:
    """The text of an output, read as a whole: a decoder may drop the space in front of a step that is read by itself."""
    tokens = [token for step in steps for token in step.tokens]
    return decoder.steps_text.step(tokens, steps[-1].end if steps else None)


def _drafted(problem: Any, prompt: list[int], steps: Sequence[StepRecord]) -> list[Drafted]:
    found, tokens, texts = [], list[int](), list[str]()
    for step in steps:
        record = _proposed(step)
        if record is not None:
            found.append(Drafted(problem, tuple(prompt), tuple(tokens), tuple(texts), record.tokens, record.text))
        tokens += step.tokens
        texts.append(step.text)
    return found


def _proposed(step: StepRecord) -> StepRecord | None:
    """What the draft proposed at this place: the step itself, or the draft that the target's step replaced."""
    return step if step.source == "draft" else step.rejected


def _step_trial(place: int, record: StepRecord, label: Any) -> StepTrial:
    return StepTrial(
        place=place,
        length=len(record.tokens),
        accepted=record.reason is None,
        right=label.right,
        error=label.error,
        score=record.score,
        reason=record.reason,
        agreement=record.agreement,
        draft=record.draft,
        target=record.target,
    )


def _counts(result: StepVerifiedResult, *, one_model: bool) -> dict[str, float]:
    names = (
        "tokens",
        "steps",
        "drafted_tokens",
        "accepted_tokens",
        "rejected_tokens",
        "discarded_tokens",
        "target_tokens",
        "target_discarded_tokens",
        "scored_tokens",
        "draft_passes",
        "target_passes",
    )
    found = {name: float(getattr(result.stats, name)) for name in names}
    found["target_layers_passed"] = _mean(result.stats.layer_executions)
    # With one model in both roles the target's count holds the draft's layers too.
    found["draft_layers_passed"] = 0.0 if one_model else _mean(result.stats.draft_layer_executions)
    return found


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts) if counts else 0.0


def _keys(prompts: Sequence[list[int]]) -> list[str]:
    """A name for each prompt; equal ones are numbered."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in prompts:
        again = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        found.append(TrialStore.key(prompt, again))
    return found


def _add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


class TrialStore:
    """Trials kept in ``folder``. One process at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._models: dict[int, tuple[Any, str]] = {}
        """Models by identity, held so that an identity is not given again."""

    @staticmethod
    def key(prompt: Sequence[int], again: int) -> str:
        """The name of one problem among the trials of a policy: its prompt, and how many equal ones came before."""
        return hashlib.blake2b(f"{again} {list(prompt)}".encode(), digest_size=12).hexdigest()

    def opened(self, decoder: StepVerified, sampling: Any, seed: int, name: str) -> KeptTrials:
        """The trials of ``decoder`` under these settings; ``name`` identifies the labeler and the verifier."""
        known = {
            "target": self._fingerprint(decoder.target.model),
            "draft": None if decoder.draft is None else self._fingerprint(decoder.draft.model),
            "tokenizer": tokenizer_fingerprint(decoder.tokenizer),
            "config": asdict(decoder.config),
            "encoder": described(decoder.encoder),
            "sampling": asdict(sampling),
            "seed": seed,
            "name": name,
        }
        if decoder.verifier is not None:
            known["verifier"] = described(decoder.verifier)
        text = json.dumps(known, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return KeptTrials(JsonLines(self.folder / f"{digest}.jsonl", strict=False), known)

    def _fingerprint(self, model: Any) -> str:
        if id(model) not in self._models:
            self._models[id(model)] = (model, model_fingerprint(model))
        return self._models[id(model)][1]


def described(one: Any) -> str:
    """The kind of a labeler, a verifier or an encoder, and its ``settings`` (a text) if it has some."""
    kind, settings = getattr(one, "__qualname__", type(one).__name__), getattr(one, "settings", "")
    return f"{kind} {settings}" if settings else kind


class KeptTrials:
    """One file: a header, then a record for each batch with its trials and what they cost."""

    def __init__(self, records: JsonLines, header: dict[str, Any]) -> None:
        self.records = records
        self._header = header
        self._batches = [record for record in records if "trials" in record]

    def trials(self) -> dict[str, dict[str, Any]]:
        """Every kept trial by its problem's key."""
        return {key: trial for batch in self._batches for key, trial in batch["trials"].items()}

    def cost(self, keys: set[str]) -> dict[str, float]:
        """What the batches cost that ``keys`` were in."""
        total: dict[str, float] = {}
        for batch in self._batches:
            share = len(keys & batch["trials"].keys()) / len(batch["trials"])
            for name, value in batch["cost"].items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    def append(self, trials: dict[str, dict[str, Any]], cost: dict[str, float]) -> None:
        """Keep one batch."""
        header = [] if self.records.path.exists() else [self._header]
        self.records.append(*header, {"trials": trials, "cost": cost})


@dataclass(frozen=True)
class StepTrial:
    """One step that the draft proposed. ``right`` is None where the labeler has no label."""

    place: int
    length: int
    """Tokens."""
    accepted: bool
    right: bool | None
    error: str | None = None
    score: float | None = None
    """None for a step that was rejected unscored."""
    reason: str | None = None
    agreement: float | None = None
    draft: StepSignals | None = None
    target: StepSignals | None = None


@dataclass(frozen=True)
class Trial:
    """One problem under one policy. ``right`` is whether its final answer is, None where that is unknown."""

    problem: int
    """Place among the problems."""
    right: bool | None
    stop_reason: str
    accepted_tokens: int
    """Of the output, written by the draft."""
    target_tokens: int
    """Of the output, written by the target."""
    steps: tuple[StepTrial, ...]

    def judged(self, *, unknown: str = "skip") -> Judged:
        """Scores and labels of the drafted steps, as :mod:`telltale.decode.calibration.risk` takes them."""
        steps = [step for step in self.steps if step.right is not None or unknown != "skip"]
        return Judged(
            tuple(float("nan") if step.score is None else step.score for step in steps),
            tuple(step.right is False or (step.right is None and unknown == "wrong") for step in steps),
        )


@dataclass(frozen=True)
class Coverage:
    """What a labeler saw of mistakes where every step was the draft's: of the ``wrong`` answers ``unflagged`` have no step that it
    found wrong, and of ``steps`` it could not judge ``unknown``."""

    answers: int
    wrong: int
    unflagged: int
    steps: int
    unknown: int

    @property
    def missed(self) -> float:
        """Share of wrong answers in which no step was flagged; 0.0 if there is none."""
        return self.unflagged / self.wrong if self.wrong else 0.0

    @property
    def unknown_share(self) -> float:
        """Share of drafted steps without a label."""
        return self.unknown / self.steps if self.steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self) | {"missed": self.missed, "unknown_share": self.unknown_share}


@dataclass
class Trials:
    """All problems under one policy, in order."""

    trials: list[Trial]
    cost: dict[str, float] = field(default_factory=dict)
    """Summed over batches: seconds, CPU seconds, counts of ``StepVerifiedStatistics``, and tokens through each model's layers
    (prompts, dropped candidates and padding of the batch included; the mean over layers)."""

    @property
    def steps(self) -> list[StepTrial]:
        """All drafted steps."""
        return [step for trial in self.trials for step in trial.steps]

    @property
    def accuracy(self) -> float | None:
        """Share of problems whose answer is right; None if unknown."""
        known = [trial.right for trial in self.trials if trial.right is not None]
        return sum(known) / len(known) if known else None

    @property
    def target_share(self) -> float:
        """Share of the output's tokens that the target decoded."""
        target = sum(trial.target_tokens for trial in self.trials)
        total = target + sum(trial.accepted_tokens for trial in self.trials)
        return target / total if total else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted over drafted steps; 0.0 if none was drafted."""
        steps = self.steps
        return sum(step.accepted for step in steps) / len(steps) if steps else 0.0

    @property
    def wrong_among_accepted(self) -> float | None:
        """Share of accepted steps with a label that are wrong."""
        labels = [step.right for step in self.steps if step.accepted and step.right is not None]
        return labels.count(False) / len(labels) if labels else None

    @property
    def coverage(self) -> Coverage | None:
        """How much of what went wrong the labeler saw; None where answers were not judged."""
        if any(trial.right is None for trial in self.trials):
            return None
        wrong = [trial for trial in self.trials if not trial.right]
        flagged = sum(any(step.right is False for step in trial.steps) for trial in wrong)
        unknown = sum(step.right is None for step in self.steps)
        return Coverage(len(self.trials), len(wrong), len(wrong) - flagged, len(self.steps), unknown)

    def judged(self, *, unknown: str = "skip") -> list[Judged]:
        """:meth:`Trial.judged` of each."""
        return [trial.judged(unknown=unknown) for trial in self.trials]


def to_dict(trial: Trial) -> dict[str, Any]:
    """``trial`` in plain values, its place among the problems left out."""
    found = asdict(trial)
    del found["problem"]
    return found


def from_dict(values: dict[str, Any], place: int) -> Trial:
    """The trial of problem ``place`` that :func:`to_dict` wrote down."""
    steps = tuple(
        StepTrial(**(step | {role: _reading(step[role]) for role in ("draft", "target")})) for step in values["steps"]
    )
    return Trial(**(values | {"steps": steps, "problem": place}))


def _reading(values: dict[str, Any] | None) -> StepSignals | None:
    return None if values is None else StepSignals(**{name: tuple(numbers) for name, numbers in values.items()})
