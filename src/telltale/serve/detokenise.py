"""From tokens to text that is never taken back: the pieces that were sent, joined, are the whole text.

A token may end within a character, a decoder may drop the space at a text's beginning, and a stop string may begin at the end of
what is known. So text is held back until nothing that follows can change it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from telltale.decode.stopping import UNREADABLE

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"
"""How SentencePiece writes a space."""


class Detokeniser:
    """Text of one output as its tokens come; special tokens are hidden.

    All pieces together are ``tokenizer.decode(tokens, skip_special_tokens=True)``. ``continues``: the output goes on from visible
    text; the space that a SentencePiece decoder drops at the beginning of a text then stays.
    """

    def __init__(self, tokenizer: Any, *, continues: bool = False) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        """First token of the window. A decoder that needs the text before gets at least that much."""
        self._read = 0
        """Tokens whose text has been given out."""
        self._given = ""
        """The window's text that has been given out."""
        self._continues = continues

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become final with these tokens; may be empty."""
        self._tokens += tokens
        text = self._text()
        if text.endswith(UNREADABLE) or self._within_bytes() or not text.startswith(self._given):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What was held back; the output is over."""
        text = self._text()
        kept = 0
        while kept < min(len(text), len(self._given)) and text[kept] == self._given[kept]:
            kept += 1
        self._given = self._given[:kept]
        return self._give(text)

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        if not new:
            return ""
        space = self._dropped_space() if self._read == 0 else ""
        # The last visible piece is the context of the next one; hidden tokens alone would be none.
        self._start, self._read = self._read, len(self._tokens)
        self._given = self._text()
        return space + new

    def _text(self) -> str:
        return self._decoded(self._tokens[self._start :])

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _within_bytes(self) -> bool:
        """Whether the output ends in bytes of a byte-fallback tokenizer, whose decoder reads a run of them all or nothing."""
        for token in reversed(self._tokens[self._read :]):
            piece = self.tokenizer.convert_ids_to_tokens(token)
            if piece is not None and _BYTE.fullmatch(piece):
                return True
            if self._decoded([token]):
                return False
        return False

    def _dropped_space(self) -> str:
        if not self._continues:
            return ""
        for token in self._tokens:
            piece = self.tokenizer.convert_ids_to_tokens(token) or ""
            alone = self._decoded([token])
            if piece.startswith(_SPACE):
                meant = len(piece) - len(piece.lstrip(_SPACE))
                return " " * (meant - (len(alone) - len(alone.lstrip(" "))))
            if alone:
                return ""
        return ""


class StopStrings:
    """Cuts a text before the first of ``stops``, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        """Whether a stop string has come; nothing follows then."""
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far is certain to be in front of every stop string."""
        if self.found or not self.stops:
            return "" if self.found else text
        self._held += text
        places = [place for place in map(self._held.find, self.stops) if place >= 0]
        if places:
            self.found = True
            return self._take(min(places), drop=True)
        return self._take(len(self._held) - self._beginning())

    def finish(self) -> str:
        """What was held back; no stop string came of it."""
        return self._take(len(self._held))

    def _take(self, count: int, *, drop: bool = False) -> str:
        given, self._held = self._held[:count], "" if drop else self._held[count:]
        return given

    def _beginning(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stops)) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self.stops):
                return count
        return 0


class OutputText:
    """The text of one answer: tokens in, pieces that are final out."""

    def __init__(self, tokenizer: Any, *, stops: Sequence[str] = (), continues: bool = False) -> None:
        self._detokeniser = Detokeniser(tokenizer, continues=continues)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become final with these tokens."""
        return self._stops.push(self._detokeniser.push(tokens))

    def push_counted(self, tokens: Sequence[int]) -> tuple[int, str]:
        """How many of ``tokens`` belong to the answer, up to the one that completes a stop string, and the text of these."""
        if not self._stops.stops:
            return len(tokens), self.push(tokens)
        text = ""
        for count, token in enumerate(tokens, start=1):
            text += self.push([token])
            if self.stopped:
                return count, text
        return len(tokens), text

    def finish(self) -> str:
        """The rest of the text; the output is over."""
        return self._stops.push(self._detokeniser.finish()) + self._stops.finish()


def output_text(tokenizer: Any, tokens: Sequence[int], *, stops: Sequence[str] = (), continues: bool = False) -> str:
    """The whole text of an output: what the pieces of :class:`OutputText` make together."""
    whole = OutputText(tokenizer, stops=stops, continues=continues)
    return whole.push(tokens) + whole.finish()
