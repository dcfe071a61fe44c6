"""Where a step ends: with the first token whose text completes the delimiter. Token ids are the truth; no token is ever split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNREADABLE = "�"


class StepText:
    """Reads steps with a tokenizer, remembering which tokens can complete the delimiter at all. One thread at a time."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        self.tokenizer = tokenizer
        self.delimiter = delimiter
        # One byte a token is the longest way to write it.
        self._window = len(delimiter.encode()) + 2
        self._may_complete: dict[int, bool] = {}
        self._ends_with = delimiter[-1]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def completes(self, tokens: Sequence[int]) -> bool:
        """Whether the last of a step's ``tokens`` completes the delimiter."""
        last = tokens[-1]
        known = self._may_complete.get(last)
        if known is None:
            alone = self.text([last])
            known = self._ends_with in alone or UNREADABLE in alone
            self._may_complete[last] = known
        return known and self.delimiter in self.text(tokens[-self._window :])

    def blank(self, tokens: Sequence[int]) -> bool:
        """Whether a step says nothing: its text is white space and delimiters."""
        return not self.text(tokens).replace(self.delimiter, "").strip()


@dataclass(frozen=True)
class Ends:
    """What ends a step or the whole output of one row.

    ``limit``: tokens of the output. ``window``: tokens in which a stop string that the last token completes must stand.
    """

    steps: StepText
    eos: frozenset[int]
    limit: int
    longest_step: int
    stop_strings: tuple[str, ...] = ()

    @property
    def window(self) -> int:
        """Tokens of the output's end that are read for stop strings."""
        return 8 + max((len(stop.encode()) for stop in self.stop_strings), default=0)

    def why(self, before: Sequence[int], step: Sequence[int]) -> str | None:
        """Why ``step`` is over with its last token, None if it is not; ``before`` are the output's tokens ahead of it.

        "eos", "stop_string" and "length" end the output, "delimiter" and "overlong" the step.
        """
        if step[-1] in self.eos:
            return "eos"
        if self.stop_strings:
            window = self.window
            tail = [*before[max(0, len(before) - window) :], *step][-window:]
            text = self.steps.text(tail)
            if any(stop in text for stop in self.stop_strings):
                return "stop_string"
        if len(before) + len(step) >= self.limit:
            return "length"
        if self.steps.completes(step):
            return "delimiter"
        return "overlong" if len(step) >= self.longest_step else None


FINAL = ("eos", "stop_string", "length", "repetition")
"""Reasons that end an output, not only a step."""
