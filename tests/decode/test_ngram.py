"""The incremental index against a search through the whole text."""

from __future__ import annotations

import random

import pytest

from telltale.decode.ngrams import SIZES, NgramIndex


def searched(text: list[int], length: int) -> tuple[int, list[int]]:
    """The longest suffix that occurred before, last occurrence first, and what followed it."""
    for size in SIZES:
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                found = list(text)
                while len(found) < end + length:
                    found.append(found[len(found) - (len(text) - end)])
                return size, found[end : end + length]
    return 0, []


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_search(seed):
    draw = random.Random(seed)
    index, text = NgramIndex([]), []
    for _ in range(60):
        new = [draw.randrange(4) for _ in range(draw.randint(1, 4))]
        text += new
        index.extend(new)
        length = draw.randint(1, 9)
        assert (index.match, index.draft(length)) == searched(text, length)


def test_periodic_text_is_continued():
    assert NgramIndex([1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert NgramIndex([1, 2, 3]).draft(4) == []
