"""What is known of every step afterwards, and what the decoding of a batch cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from telltale.decode.result import DecodeResult, DecodeStatistics


@dataclass(frozen=True)
class Reading:
    """What one model's signals say of a step, token by token; empty where a signal was not asked for.

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
    source: str
    """"draft" or "target"."""
    end: str
    """"delimiter", "eos", "stop_string", "length" or "overlong" (cut at the longest step: ``truncated``)."""
    score: float | None = None
    """What was compared with the threshold; None for the target's steps and where nothing was scored."""
    draft: Reading | None = None
    target: Reading | None = None
    agreement: float | None = None
    """Share of candidates equal to the most frequent one."""
    reason: str | None = None
    """Why a draft was rejected: "score", "overlong", "blank" or "repeated"."""
    rejected: StepRecord | None = None
    """The draft that the target's step stands in for."""

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
    calibrated: bool = False
    """Whether scores are on a calibrated scale."""

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
