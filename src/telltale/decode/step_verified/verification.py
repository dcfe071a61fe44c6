"""Is a drafted step good enough? Selection among its candidates, the target's reading, the score, and the threshold.

SpecGuard (arXiv 2604.15244, algorithm 1, between drafting and accepting). Every policy that drafts goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from telltale.decode.step_verified.encoders import Encoder
from telltale.decode.step_verified.ends import StepText
from telltale.decode.step_verified.proposals import Proposal
from telltale.decode.step_verified.records import Reading, StepRecord
from telltale.decode.step_verified.rows import Row
from telltale.decode.step_verified.scoring import Scored, Step, checked_score, read_with_target, score_of
from telltale.decode.step_verified.selection import selected
from telltale.decode.step_verified.sides import Side
from telltale.errors import ConfigError, DataError

Verifier = Callable[[Sequence[Step]], Sequence[float]]
"""Scores of steps, one each: a reward model (RSD), a judge (SpecReason), a checker (the oracle)."""


@dataclass
class Verdict:
    """The chosen candidate of a proposal, and why it was rejected (None: accepted)."""

    proposal: Proposal
    place: int
    record: StepRecord
    reason: str | None = None
    tail: Tensor | None = None
    """The target's state before the step, if it has read the step."""


class Verification:
    """Judges proposals of any rows together, so that the target reads their steps in one pass."""

    def __init__(self, target: Side, steps: StepText, *, encoder: Encoder, verifier: Verifier | None = None) -> None:
        self.target = target
        self.steps = steps
        self.encoder = encoder
        self.verifier = verifier

    def judge(self, proposals: Sequence[Proposal]) -> list[Verdict]:
        """Select, score, and decide. All candidates of ``proposals`` have ended."""
        verdicts = []
        for proposal in proposals:
            place, share = selected(proposal, self.steps, self.encoder)
            chosen = proposal.candidates[place]
            assert chosen.end is not None
            record = StepRecord(
                tuple(chosen.tokens), self.steps.text(chosen.tokens), "draft", chosen.end, agreement=share
            )
            record.draft = proposal.reading(place)
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
            # What is rejected unseen need not be read.
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
            one.record.target, one.tail = reading, base

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
                among: list[Reading] = []
                if config.normaliser.kind == "group":
                    among = [one.proposal.reading(place) for place in range(len(one.proposal.candidates))]
                score = score_of(
                    config, one.record.draft, one.record.target, one.record.agreement, history=row.history, among=among
                )
                one.record.score = checked_score(score, row)

    def _step(self, one: Verdict) -> Step:
        row = one.proposal.row
        return Step(
            prompt=row.job.prompt,
            before=list(row.tokens),
            tokens=list(one.record.tokens),
            prompt_text=self.steps.text(row.job.prompt),
            before_text=self.steps.text(row.tokens),
            text=one.record.text,
            number=len(row.steps),
            accepted=tuple(step.text for step in row.steps),
        )

    def _invalid(self, row: Row, record: StepRecord) -> str | None:
        """Why a drafted step is rejected unscored: it did not end, says nothing, or repeats the one before."""
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
