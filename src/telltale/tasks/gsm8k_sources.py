"""Which numbers may a step of a grade-school solution use? Those of the question and of earlier steps, in digits or in words.

A reading of prose, so it errs: it is kept apart from what :mod:`telltale.tasks.gsm8k_checker` can check exactly.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from telltale.tasks.arithmetic import as_number, numbers, places

_WORD = re.compile(r"[a-z]+")
_UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_WORDS = (
    dict(zip(_UNITS, range(1, 10), strict=True))
    | dict(zip(_TEENS, range(10, 20), strict=True))
    | dict(zip(_TENS, range(20, 100, 10), strict=True))
    | {"zero": 0, "no": 0, "dozen": 12, "score": 20, "hundred": 100, "thousand": 1000, "million": 10**6}
    | {"half": 2, "halves": 2, "twice": 2, "double": 2, "doubled": 2, "doubles": 2, "couple": 2, "pair": 2, "both": 2}
    | {"triple": 3, "tripled": 3, "triples": 3, "thrice": 3, "third": 3, "quadruple": 4, "fourth": 4, "quarter": 4}
    | {"fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
)
_COMMON = frozenset(
    map(Fraction, (0, 1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 24, 28, 30, 31, 36, 52, 60, 100, 365, 1000, 3600, 5280))
) | {Fraction(1, part) for part in (2, 4, 10, 20, 100)}
"""Small numbers, hours and days, inches and ounces, percent, coins: nobody has to tell them."""


class Sources:
    """The numbers that stand in a question and in the steps so far."""

    def __init__(self, question: str) -> None:
        self.numbers = mentioned(question)
        """Without signs."""
        self.last: Fraction | None = None
        """The last number that a step ended in, with its sign; None before any."""

    def copy(self) -> Sources:
        """To be added to without changing this one."""
        other = Sources("")
        other.numbers, other.last = set(self.numbers), self.last
        return other

    def add(self, step: str, last: Fraction | None) -> None:
        """Take over the numbers of an accepted step; ``last`` is what it ends in, None if that cannot be read."""
        self.numbers |= mentioned(step)
        if last is not None:
            self.numbers.add(abs(last))
            self.last = last

    def trace(self, operand: str) -> bool:
        """Whether a written number is known: as it is, rounded, as a percentage, or as what a percentage leaves or adds up to."""
        value = as_number(operand)
        if value in self.numbers or value in _COMMON:
            return True
        shapes = (value / 100, value * 100, 1 - value, value - 1, 100 - value, value - 100)
        if any(shape in self.numbers for shape in (*shapes, 100 * (1 - value), 100 * (value - 1))):
            return True
        decimals = places(operand)
        return decimals > 0 and any(abs(known - value) < Fraction(1, 10**decimals) for known in self.numbers)


def mentioned(text: str) -> set[Fraction]:
    """The numbers in ``text``, in digits and in words ("twenty-five", "half" for 2), without signs."""
    found = {as_number(written) for written in numbers(text)}
    words = [word for word in _WORD.findall(text.lower()) if word in _WORDS]
    found.update(Fraction(_WORDS[word]) for word in words)
    found.update(
        Fraction(_WORDS[tens] + _WORDS[unit]) for tens, unit in pairwise(words) if tens in _TENS and unit in _UNITS
    )
    return found
