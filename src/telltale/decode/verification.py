"""Is a drafted step good enough? The target's reading, the score, and the threshold.

SpecGuard (arXiv 2604.15244, section 3 and algorithm 1, between drafting and accepting): r = beta * l~ + (1 - beta) * g~, l the
smallest log-probability of the step and g its smallest grounding, each normalised. A signal that is missing is an error;
no substitute is used. Every policy that drafts goes through here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.decode.model_state import ModelState, PassInput
from telltale.decode.results import StepRecord, StepSignals
from telltale.decode.rows import Row, refuse_no_distribution
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.steps import Encoder, Proposal, groundings_of, selected
from telltale.decode.stopping import StepText
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.confidence import entropy, reduced, token_log_probabilities


@dataclass
class Step:
    """A proposed step as verifiers see it: plain ids and text, nothing of caches."""

    prompt: list[int]
    before: list[int]
    """Tokens that have been committed, the prompt not included."""
    tokens: list[int]
    prompt_text: str
    before_text: str
    text: str
    number: int
    """Place of the step in its output, from 0."""
    accepted: tuple[str, ...] = ()
    """The texts of the steps that ``before_text`` is made of."""


Verifier = Callable[[Sequence[Step]], Sequence[float]]
"""Scores of steps, one each: a reward model (RSD), a judge (SpecReason), a checker (the oracle)."""


@dataclass
class Scored:
    """A row whose step the target is to read: the step, and which signals."""

    row: Row
    tokens: list[int]
    log_probabilities: bool
    entropies: bool
    grounding: bool


def read_with_target(state: ModelState, scored: Sequence[Scored]) -> tuple[list[StepSignals], list[Tensor]]:
    """One parallel pass of the target over each step, behind what it has not seen yet of the row.

    Returns the readings, and per row the state (hidden,) before the step. The step counts as processed then; ``state.truncate``
    to that state takes it back if it is rejected.
    """
    work, starts, tails = [], [], []
    for one in scored:
        known = state.rows[one.row.slot]
        pending = one.row.tokens_from(known.length)
        starts.append(len(pending))
        tails.append(known.last_hidden)
        work.append(
            PassInput(
                one.row.slot,
                [*pending, *one.tokens],
                one.row.length if one.grounding and not one.row.config.whole_rows else None,
            )
        )
        one.row.stats.scored_tokens += one.row.drafted_from(known.length) + len(one.tokens)
    passed = state.feed(work)
    readings, bases, states, owners = [], [], [], []
    for one, found, start, tail in zip(scored, passed, starts, tails, strict=True):
        base = found.states[start - 1] if start else tail
        assert base is not None
        bases.append(base)
        if one.log_probabilities or one.entropies:
            states.append(torch.cat([base.unsqueeze(0), found.states[start:-1]]))
            owners += [one.row] * len(one.tokens)
    logits = refuse_no_distribution(state.head(torch.cat(states)), owners, "target") if states else None
    place = 0
    for one, found in zip(scored, passed, strict=True):
        log_probabilities: tuple[float, ...] = ()
        entropies: tuple[float, ...] = ()
        if logits is not None and (one.log_probabilities or one.entropies):
            own = logits[place : place + len(one.tokens)]
            place += len(one.tokens)
            chosen = torch.tensor(one.tokens, device=own.device)
            log_probabilities = tuple(token_log_probabilities(own, chosen).tolist())
            if one.entropies:
                entropies = tuple(entropy(own).tolist())
        groundings: tuple[float, ...] = ()
        if one.grounding:
            groundings = groundings_of(state, [found], one.tokens, one.row, "target")
        readings.append(StepSignals(log_probabilities, entropies, groundings))
    return readings, bases


def log_probability_of(reading: StepSignals, config: StepVerifiedConfig) -> float:
    """The step's log-probability signal (LPBV), nats."""
    return _reduced("log-probabilities", reading.log_probabilities, config.log_probability_reduce)


def grounding_of(reading: StepSignals, config: StepVerifiedConfig) -> float:
    """The step's grounding signal (ABGV), in [0, 1]; a rank among calibrated tokens with debias="position-ecdf"."""
    values = reading.groundings
    if config.debias == "position-ecdf":
        tables = config.position_quantiles
        values = tuple(
            bisect_right(tables[min(place, len(tables) - 1)], value) / len(tables[min(place, len(tables) - 1)])
            for place, value in enumerate(values)
        )
    return _reduced("groundings", values, config.grounding_reduce)


def score_of(
    config: StepVerifiedConfig,
    draft: StepSignals | None,
    target: StepSignals | None,
    agreement: float | None,
    *,
    history: dict[str, list[float]],
    among: Sequence[StepSignals] = (),
) -> float:
    """The score of a step. ``history``: earlier values of the same row, for running extremes; this step's are appended.

    ``among``: the readings of all candidates, for extremes over the group.
    """
    reading = draft if config.signal_model == "draft" else target
    if config.score == "agreement":
        if agreement is None:
            raise DataError("score='agreement' was given a step without candidates; expected at least one.")
        return agreement
    if config.score == "likelihood-ratio":
        if draft is None or target is None:
            raise DataError("score='likelihood-ratio' needs the log-probabilities of both models.")
        return sum(target.log_probabilities) - sum(draft.log_probabilities)
    if reading is None:
        raise DataError(f"the step has no signals of the {config.signal_model} model; expected them to be read.")
    if config.score == "entropy":
        return _reduced("entropies", [-value for value in reading.entropies], config.log_probability_reduce)
    if config.score == "log-probability":
        return log_probability_of(reading, config)
    if config.score == "grounding":
        return grounding_of(reading, config)
    score = 0.0
    for weight, name, value_of in (
        (config.beta, "log_probability", log_probability_of),
        (1 - config.beta, "grounding", grounding_of),
    ):
        if weight:
            value = value_of(reading, config)
            seen = history.setdefault(name, [])
            seen.append(value)
            pool = [value_of(other, config) for other in among] if config.normaliser.kind == "group" else seen
            score += weight * config.normaliser.normalised(name, value, among=pool)
    return score


def checked_score(value: object, row: Row) -> float:
    """``value`` as a number; the row fails if it is NaN. Raises :class:`~telltale.errors.DataError` if it is none."""
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"the verifier gave {type(value).__name__} for step {len(row.steps)} of prompt {row.number}; expected a number."
        ) from None
    if math.isnan(score):
        row.fail(
            NumericalError(f"the score of step {len(row.steps)} of prompt {row.number} is NaN; expected a number.")
        )
        return -math.inf
    return score


def _reduced(name: str, values: Sequence[float], how: str) -> float:
    if not values:
        raise DataError(f"the step has no {name}; expected the model to give them.")
    return float(reduced(torch.tensor(values, dtype=torch.float64), how))


@dataclass
class Verdict:
    """The chosen candidate of a proposal, and why it was rejected (None: accepted)."""

    proposal: Proposal
    place: int
    record: StepRecord
    reason: str | None = None
    last_hidden: Tensor | None = None
    """The target's state before the step, if it has read the step."""


class Verification:
    """Judges proposals of any rows together, so that the target reads their steps in one pass."""

    def __init__(
        self, target: ModelState, steps: StepText, *, encoder: Encoder, verifier: Verifier | None = None
    ) -> None:
        self.target = target
        self.steps = steps
        self.encoder = encoder
        self.verifier = verifier

    def verify(self, proposals: Sequence[Proposal]) -> list[Verdict]:
        """Select, score, and decide. All candidates of ``proposals`` have ended."""
        verdicts = []
        for proposal in proposals:
            place, share = selected(proposal, self.steps, self.encoder)
            chosen = proposal.candidates[place]
            assert chosen.end is not None
            text = self.steps.step(chosen.tokens, chosen.end)
            record = StepRecord(tuple(chosen.tokens), text, "draft", chosen.end, agreement=share)
            record.draft = proposal.signals(place)
            row = proposal.row
            row.stats.drafted_tokens += sum(len(candidate.tokens) for candidate in proposal.candidates)
            row.stats.discarded_tokens += sum(len(c.tokens) for c in proposal.candidates) - len(chosen.tokens)
            verdicts.append(Verdict(proposal, place, record, self._invalid(row, record)))
        self._read_with_target(verdicts)
        self._score([one for one in verdicts if one.reason is None])
        for one in verdicts:
            config, score = one.proposal.row.config, one.record.score
            if one.reason is None and config.policy != "draft" and not config.accepts(score):
                one.reason = "score"
        return verdicts

    def _read_with_target(self, verdicts: Sequence[Verdict]) -> None:
        asked, scored = [], []
        for one in verdicts:
            config = one.proposal.row.config
            # The target need not read what is rejected unscored.
            if not config.target_scores or (one.reason is not None and not config.record_signals):
                continue
            every = config.record_signals
            scored.append(
                Scored(
                    one.proposal.row,
                    list(one.record.tokens),
                    log_probabilities=every or config.reads_log_probability,
                    entropies=every or config.score == "entropy",
                    grounding=every or config.reads_grounding,
                )
            )
            asked.append(one)
        if not asked:
            return
        # With one model in both roles the target goes on from the chosen candidate's states, so it has to be in place.
        for one in asked:
            one.proposal.keep(one.place)
        readings, bases = read_with_target(self.target, scored)
        for one, reading, base in zip(asked, readings, bases, strict=True):
            one.record.target, one.last_hidden = reading, base

    def _score(self, verdicts: Sequence[Verdict]) -> None:
        judged = [one for one in verdicts if one.proposal.row.config.policy == "verifier"]
        if judged:
            assert self.verifier is not None
            steps = [self._step(one) for one in judged]
            given = self.verifier(steps)
            if not isinstance(given, Iterable):
                raise DataError(
                    f"the verifier gave {type(given).__name__} for {len(steps)} steps; expected a score each."
                )
            scores = list(given)
            if len(scores) != len(steps):
                raise ConfigError(f"the verifier gave {len(scores)} scores for {len(steps)} steps; expected one each.")
            for one, score in zip(judged, scores, strict=True):
                one.record.score = checked_score(score, one.proposal.row)
        for one in verdicts:
            row, config = one.proposal.row, one.proposal.row.config
            if config.policy == "random":
                one.record.score = float(row.uniforms("policy", 1))
            elif config.policy == "specguard":
                among: list[StepSignals] = []
                if config.normaliser.kind == "group":
                    among = [one.proposal.signals(place) for place in range(len(one.proposal.candidates))]
                score = score_of(
                    config, one.record.draft, one.record.target, one.record.agreement, history=row.history, among=among
                )
                one.record.score = checked_score(score, row)

    def _step(self, one: Verdict) -> Step:
        row = one.proposal.row
        return Step(
            prompt=row.prompt,
            before=list(row.tokens),
            tokens=list(one.record.tokens),
            prompt_text=self.steps.text(row.prompt),
            before_text=self.steps.text(row.tokens),
            text=one.record.text,
            number=len(row.steps),
            accepted=tuple(step.text for step in row.steps),
        )

    def _invalid(self, row: Row, record: StepRecord) -> str | None:
        """Why a drafted step is rejected unscored: it did not end, is empty, or repeats the one before."""
        if row.config.policy == "draft":
            return None
        if record.end == "overlong":
            return "overlong"
        if record.end == "delimiter":
            if self.steps.blank(record.tokens):
                return "blank"
            if row.steps and row.steps[-1].tokens == record.tokens:
                return "repeated"
        return None
