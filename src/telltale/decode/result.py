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

    def record(self, source: str, *, exit_layer: int, drafted: int, accepted: int) -> None:
        """Count one round of one row."""
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
