"""What a round of speculation drafts with: an exit and a length, the n-grams of the text, a second model, or nothing.

A :class:`Plan` chooses before every round and learns from its outcome. :class:`FixedPlan` does what it was told;
the one that chooses by itself is in ``planner``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from telltale.decode.acceptance import Acceptance
from telltale.decode.ngrams import SIZES

DRAFTERS = ("exit", "ngram", "both")
"""Who may draft for a model without a second one: its early layers, the n-grams of the text, or whichever pays."""
_COPIES = 0.7
"""How often copies must be accepted, over drafts of the fixed exit: they save all draft passes."""


class Choice(NamedTuple):
    """What to do in a round: ``source`` is "exit", "ngram", "model" (a second model drafts) or "plain"."""

    source: str
    exit_layer: int
    length: int

    @property
    def words(self) -> str:
        """The choice, for people."""
        if self.source == "plain":
            return "plain decoding"
        drafter = (
            f"exit {self.exit_layer}" if self.source == "exit" else "n-grams" if self.source == "ngram" else "draft"
        )
        return f"{drafter}, draft {self.length}"


PLAIN = Choice("plain", 0, 0)


class Plan:
    """Chooses what to do in a round, and learns from its outcome. ``confidence``: an exit stops drafting before a token whose
    probability is below it."""

    drafter = "exit"
    """Who may draft: "exit", "ngram", "both" or "model"."""
    confidence: float | None = None

    def at(self, rows: int) -> Plan:
        """The plan for rounds of so many rows."""
        return self

    def begin(self, rows: int) -> None:
        """One of so many rows begins with its text."""

    def next(self, match: int) -> Choice:
        """What to do, given the size of the current n-gram match (0 for none)."""
        raise NotImplementedError

    def learn(
        self, choice: Choice, match: int, drafted: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """Learn from a round that took so long: tokens drafted and accepted in each of its rows."""

    def learn_plain(self, steps: int, seconds: float) -> None:
        """Learn how long so many plain steps took, together."""

    def describe(self) -> str:
        """The planner's state, in words."""
        return "fixed"


class FixedPlan(Plan):
    """Exit layer and draft length as given; no clock. With both drafters, n-grams go first while they are accepted as well."""

    def __init__(self, exit_layer: int, draft_length: int, drafter: str, confidence: float | None = None) -> None:
        self.drafter = drafter
        self.confidence = confidence
        self._exit = Choice("model" if drafter == "model" else "exit", exit_layer, draft_length)
        self._ngram = Choice("ngram", 0, draft_length)
        self._exits = Acceptance(1)
        self._ngrams = {size: Acceptance(1) for size in SIZES}
        self._tokens = 0

    def next(self, match: int) -> Choice:
        """See :meth:`Plan.next`."""
        if self._exit.length == 0:
            return PLAIN
        if self.drafter in ("exit", "model"):
            return self._exit
        if self.drafter == "ngram":
            return self._ngram if match else PLAIN
        good = match and self._ngrams[match].first >= _COPIES * self._exits.first
        return self._ngram if good else self._exit

    def learn(
        self, choice: Choice, match: int, drafted: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """See :meth:`Plan.learn`."""
        if self.drafter != "both":
            return
        known = self._ngrams[match] if choice.source == "ngram" else self._exits
        for count, stood in zip(drafted, accepted, strict=True):
            if count:
                self._tokens += 1 + stood
                known.record(count, stood, self._tokens)
