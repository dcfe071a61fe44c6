"""What every decoder returns: the new tokens, why each row ended, and what the decoding cost.

Statistics are plain numbers, so that they can be printed, compared and written as JSON with ``dataclasses.asdict``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class DecodeStatistics:
    """What one ``generate`` call cost. Times in seconds; ``cpu_seconds`` is the process's CPU time over all threads."""

    backend: str = ""
    backend_reason: str = ""
    exactness: str = "fast"
    """``"exact"``: every token's result is bit-identical whatever the width of its pass; ``"fast"``: equal up to rounding."""
    tokens: int = 0
    """New tokens over all rows."""
    prefill_seconds: float = 0.0
    """Prompt pass and the choice of the first token."""
    decode_seconds: float = 0.0
    """Everything after the first token. While streaming, the time the consumer takes is not part of it."""
    cpu_seconds: float = 0.0
    layer_executions: list[int] = field(default_factory=list)
    """Tokens pushed through each layer, padding of ragged rows included; equal numbers mean nothing was computed twice."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall time, prefill included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.tokens / seconds if seconds > 0 else 0.0

    def record_plain(self, tokens: int, *, first: bool = False) -> None:
        """Count tokens of one row that were decoded without a draft. ``first``: from the state that is already there."""

    def record_round(self, source: str, *, exit_layer: int, drafted: int, accepted: int, kept: int) -> None:
        """Count one speculative round of one row that drafted something: ``kept`` tokens became output."""


@dataclass
class SelfSpeculativeStatistics(DecodeStatistics):
    """Also what was drafted and what of it the whole model confirmed.

    Counts are summed over rows: a round in which three rows draft is three rounds here. Every layer executes
    ``prompt + sum over rounds (k_i + 1)`` tokens, k_i being the drafts of round i, a plain step being a round with none.
    """

    rounds: int = 0
    """Verifications of a non-empty draft."""
    plain_steps: int = 0
    """Tokens decoded without a draft, the first token (from the prefill) not counted."""
    drafted: int = 0
    accepted: int = 0
    """Drafts that the whole model confirmed; those after an end-of-sequence token are not counted."""
    drafted_by_position: list[int] = field(default_factory=list)
    """Entry j: how many rounds drafted a token at position j."""
    accepted_by_position: list[int] = field(default_factory=list)
    """Entry j: how many rounds accepted the token at position j; never increases with j, as acceptance is a prefix."""
    drafted_by_source: dict[str, int] = field(default_factory=lambda: {"exit": 0, "ngram": 0})
    accepted_by_source: dict[str, int] = field(default_factory=lambda: {"exit": 0, "ngram": 0})
    exit_layer: int | str = "auto"
    """As asked for."""
    draft_length: int | str = "auto"
    """As asked for."""
    rounds_by_exit: dict[int, int] = field(default_factory=dict)
    """Which exit layers drafted, and in how many rounds."""
    planner: str = "fixed"
    """What the planner saw last, in words; ``"fixed"`` when exit layer and draft length were given."""

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens (the paper's "token acceptance"); 0.0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_verify(self) -> float:
        """Tokens that one pass of the late layers yields on average: confirmed drafts plus one."""
        passes = self.rounds + self.plain_steps
        return (self.accepted + passes) / passes if passes else 0.0

    def record_plain(self, tokens: int, *, first: bool = False) -> None:
        """See :meth:`DecodeStatistics.record_plain`."""
        if not first:
            self.plain_steps += tokens

    def record_round(self, source: str, *, exit_layer: int, drafted: int, accepted: int, kept: int) -> None:
        """See :meth:`DecodeStatistics.record_round`."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.drafted_by_source[source] += drafted
        self.accepted_by_source[source] += accepted
        if source == "exit":
            self.rounds_by_exit[exit_layer] = self.rounds_by_exit.get(exit_layer, 0) + 1
        by_position = self.drafted_by_position
        while len(by_position) < drafted:
            by_position.append(0)
            self.accepted_by_position.append(0)
        for position in range(drafted):
            by_position[position] += 1
        for position in range(accepted):
            self.accepted_by_position[position] += 1


@dataclass
class DecodeResult:
    """New tokens (batch, longest) int64, padded after each row's end; the stop token is part of them."""

    tokens: Tensor
    lengths: Tensor
    """New tokens of each row, (batch,) int64."""
    stop_reason: list[str]
    """Per row ``"eos"``, ``"length"`` or ``"stop_string"``."""
    stats: Any
    """A :class:`DecodeStatistics`; a :class:`SelfSpeculativeStatistics` from ``SelfSpeculative``."""


@dataclass(frozen=True)
class StepSignals:
    """One model's signals of a step, token by token; empty where a signal was not read.

    Nats for ``log_probabilities`` (raw logits, temperature 1) and ``entropies``; ``groundings`` in [0, 1].
    """

    log_probabilities: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    groundings: tuple[float, ...] = ()


@dataclass
class StepRecord:
    """One committed step, or in ``rejected`` one that was not."""

    tokens: tuple[int, ...]
    text: str
    """What the tokens say; the end-of-sequence token, where it ends the step, says nothing."""
    source: str
    """"draft" or "target"."""
    end: str
    """"delimiter", "eos", "stop_string", "length" or "overlong" (cut at the longest step: ``truncated``)."""
    score: float | None = None
    """What was compared with the threshold; None for the target's steps and where nothing was scored."""
    draft: StepSignals | None = None
    target: StepSignals | None = None
    agreement: float | None = None
    """Share of candidates equal to the most frequent one."""
    reason: str | None = None
    """Why a draft was rejected: "score", "overlong", "blank" or "repeated"."""
    rejected: StepRecord | None = None
    """The rejected draft that the target's step replaces."""

    @property
    def truncated(self) -> bool:
        """Whether the step was cut at the longest step."""
        return self.end == "overlong"

    def to_dict(self) -> dict[str, Any]:
        """As telemetry writes it: no token's signals, only the step's."""
        found: dict[str, Any] = {
            "source": self.source,
            "tokens": len(self.tokens),
            "end": self.end,
            "score": self.score,
        }
        if self.agreement is not None:
            found["agreement"] = self.agreement
        if self.rejected is not None:
            found["rejected"] = {
                "tokens": len(self.rejected.tokens),
                "score": self.rejected.score,
                "reason": self.rejected.reason,
            }
        return found


@dataclass
class StepVerifiedStatistics(DecodeStatistics):
    """Summed over rows. ``drafted_tokens`` = ``accepted_tokens`` + ``rejected_tokens`` + ``discarded_tokens``.

    ``backend``, ``layer_executions`` and ``exactness`` are the target's.
    """

    steps: int = 0
    accepted_steps: int = 0
    rejected_steps: int = 0
    target_steps: int = 0
    """Steps of the output that the target wrote; a rejection leads to one, and so does every step of the policy "target"."""
    accepted_tokens: int = 0
    """Tokens of the output that the draft wrote as accepted steps."""
    target_tokens: int = 0
    """Tokens of the output that the target wrote, or verified one by one in token-level speculation."""
    drafted_tokens: int = 0
    rejected_tokens: int = 0
    """Of chosen candidates that were rejected."""
    discarded_tokens: int = 0
    """Of candidates that were not chosen."""
    target_discarded_tokens: int = 0
    """Of the target's own candidates that were not chosen."""
    scored_tokens: int = 0
    """Tokens of the draft's steps that the target read: to score a step, or to catch up with accepted ones."""
    speculated: int = 0
    """Tokens proposed in token-level speculation."""
    speculated_accepted: int = 0
    draft_passes: int = 0
    """Forward passes of the draft over all rows that took part at the time."""
    target_passes: int = 0
    draft_layer_executions: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    """Tokens of the prompt that a cache of prefixes had; an engine without one has none."""
    calibrated: bool = False
    """Whether scores are on a calibrated scale."""

    def record_plain(self, tokens: int, *, first: bool = False) -> None:
        """See :meth:`DecodeStatistics.record_plain`; the target wrote them."""
        self.target_tokens += tokens

    def record_round(self, source: str, *, exit_layer: int, drafted: int, accepted: int, kept: int) -> None:
        """See :meth:`DecodeStatistics.record_round`."""
        self.speculated += drafted
        self.speculated_accepted += accepted
        self.target_tokens += kept

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted steps; 0.0 if none was drafted."""
        drafted = self.accepted_steps + self.rejected_steps
        return self.accepted_steps / drafted if drafted else 0.0

    @property
    def target_share(self) -> float:
        """Share of the output's tokens that the target decoded."""
        total = self.accepted_tokens + self.target_tokens
        return self.target_tokens / total if total else 0.0


@dataclass
class StepVerifiedResult(DecodeResult):
    """Also the steps of each row, in order."""

    steps: list[list[StepRecord]] = field(default_factory=list)
