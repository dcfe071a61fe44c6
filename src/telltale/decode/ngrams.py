"""N-grams of the text as a source of drafts: what followed the last time that the newest tokens occurred."""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (4, 3, 2)
"""Lengths of the suffix looked up, the longest first: a longer match is the more reliable one."""


class NgramIndex:
    """Where every n-gram of a growing text occurred last. ``match`` is the size of the current match, 0 for none."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.match = 0
        self._distance = 0
        self._last: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` and look up the new suffix: O(len(tokens))."""
        text = self.tokens
        last = self._last
        self.match = 0
        end = len(text) + len(tokens)
        for token in tokens:
            text.append(token)
            here = len(text)
            for size in SIZES:
                if here < size:
                    continue
                key = tuple(text[-size:])
                if here == end and not self.match:
                    seen = last.get(key)
                    if seen is not None:
                        self.match = size
                        self._distance = here - seen
                last[key] = here

    def draft(self, length: int) -> list[int]:
        """The ``length`` tokens that followed the last match; a match that overlaps the end goes on periodically."""
        if not self.match:
            return []
        text = self.tokens
        start = len(text) - self._distance
        found = text[start : start + length]
        while len(found) < length:
            found.append(found[len(found) - self._distance])
        return found
