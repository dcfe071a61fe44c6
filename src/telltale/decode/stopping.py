"""When a step or a whole output is over: end-of-sequence token, stop string, length, delimiter, longest step.

Token ids are the truth, and no token is ever split: a text ends with the token that completes a stop string or a delimiter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for bytes that are no character yet."""

FINAL_REASONS = ("eos", "stop_string", "length", "repetition")
"""Reasons that end an output, not only a step."""


class TextReader:
    """Reads tokens with a tokenizer, remembering which tokens can complete a text at all. One thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._may_complete: dict[tuple[str, ...], dict[int, bool]] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def may_complete(self, token: int, wanted: tuple[str, ...]) -> bool:
        """Whether ``token`` can be the one that completes one of ``wanted``; a cheap test for every token."""
        known = self._may_complete.setdefault(wanted, {})
        found = known.get(token)
        if found is None:
            # Twice, since a decoder may drop the space in front of a text's first token.
            own = self.text([token, token])
            found = known[token] = UNREADABLE in own or any(one[-1] in own for one in wanted)
        return found

    def holds(self, tokens: Sequence[int], wanted: tuple[str, ...]) -> bool:
        """Whether one of ``wanted`` is in the text of ``tokens``."""
        text = self.text(tokens)
        return any(one in text for one in wanted)


class StepText(TextReader):
    """Reads steps, which end with ``delimiter``."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        super().__init__(tokenizer)
        self.delimiter = delimiter
        self._wanted = (delimiter,)
        # One byte a token is the longest way to write it.
        self._window = len(delimiter.encode()) + 2

    def step(self, tokens: Sequence[int], end: str | None) -> str:
        """The text of a step that ended by ``end``; the end-of-sequence token is nothing that it says."""
        return self.text(tokens[:-1] if end == "eos" else tokens)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of a step's ``tokens`` completes the delimiter."""
        return self.may_complete(tokens[-1], self._wanted) and self.holds(tokens[-self._window :], self._wanted)

    def blank(self, tokens: Sequence[int]) -> bool:
        """Whether a step is empty: its text is white space and delimiters."""
        return not self.text(tokens).replace(self.delimiter, "").strip()


@dataclass(frozen=True)
class StopConditions:
    """What ends a step or the whole output of one row.

    ``limit``: tokens of the output. ``reader`` reads ``stop_strings``, None if there are none. ``steps``: reads delimiters, None
    for outputs without steps. ``criterion`` is asked, after each token, whether the output (its tokens so far) is complete.
    """

    limit: int
    eos: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    reader: TextReader | None = None
    steps: StepText | None = None
    longest_step: int | None = None
    criterion: Callable[[list[int]], bool] | None = field(default=None, compare=False)

    @cached_property
    def window(self) -> int:
        """Tokens that may hold a stop string which the last token completes: at worst one byte a token."""
        return 8 + max((len(stop.encode()) for stop in self.stop_strings), default=0)

    @cached_property
    def looks_at_tokens(self) -> bool:
        """Whether anything but an end token and the length can end a step or the output."""
        return bool(self.stop_strings) or self.steps is not None or self.criterion is not None

    def reason(self, before: Sequence[int], step: Sequence[int]) -> str | None:
        """Why ``step`` is over with its last token, None if it is not; ``before`` are the output's tokens ahead of it.

        "eos", "stop_string" and "length" end the output, "delimiter" and "overlong" the step.
        """
        return self._reason(before, step, len(before) + len(step))

    def first_end(self, tokens: list[int], start: int, new: Sequence[int]) -> tuple[int, str | None]:
        """How many of the ``new`` tokens belong to the open step, and why it is over with the last of these.

        ``tokens`` is the output so far, whose open step begins at ``start``.
        """
        if not self.looks_at_tokens:
            count = min(len(new), self.limit - len(tokens))
            for place in range(count if self.eos else 0):
                if new[place] in self.eos:
                    return place + 1, "eos"
            return count, "length" if len(tokens) + count >= self.limit else None
        if self.criterion is not None:
            start = 0
        elif self.steps is None:
            start = max(0, len(tokens) - self.window)
        before, step = tokens[max(0, start - self.window) : start], tokens[start:]
        for place, token in enumerate(new, start=1):
            step.append(token)
            reason = self._reason(before, step, len(tokens) + place)
            if reason is not None:
                return place, reason
        return len(new), None

    def _reason(self, before: Sequence[int], step: Sequence[int], count: int) -> str | None:
        """:meth:`reason` for an output of ``count`` tokens; of those ahead of the step the last ``window`` are enough."""
        if step[-1] in self.eos:
            return "eos"
        if self.reader is not None and self.reader.may_complete(step[-1], self.stop_strings):
            ahead = self.window - len(step)
            tail = [*before[-ahead:], *step] if ahead > 0 else step[-self.window :]
            if self.reader.holds(tail, self.stop_strings):
                return "stop_string"
        if count >= self.limit:
            return "length"
        if self.criterion is not None and self.criterion([*before, *step]):
            return "stop_string"
        if self.steps is not None:
            if self.steps.ends(step):
                return "delimiter"
            if self.longest_step is not None and len(step) >= self.longest_step:
                return "overlong"
        return None
