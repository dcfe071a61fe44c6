"""Plain arithmetic as people write it (``1,200*.5``, ``50%``, ``2(3+4)``), evaluated exactly and without running anything.

Numbers are fractions, so 0.1+0.2 is 0.3. There are no names, no powers and no functions.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from telltale.errors import DataError

LONGEST = 1000
"""Characters of the longest expression that is read."""
DEEPEST = 50
"""Parentheses inside one another."""

_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+", re.ASCII)
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_TOKEN = re.compile(rf"\s*(?:(?P<number>{_NUMBER.pattern})|(?P<vulgar>[{_VULGAR}])|(?P<sign>//|[-+*/()%]))", re.ASCII)
_SPELLINGS = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/", "$": " "})


def evaluate(expression: str) -> Fraction:
    """The exact value of ``expression``: numbers with + - * / // (rounded down) and parentheses.

    Commas group thousands, a dollar sign is skipped, ``%`` divides by a hundred, ``½`` is a number, and a parenthesis right after
    a number multiplies, before any other product. Raises :class:`~telltale.errors.DataError` for anything else, and
    ``ZeroDivisionError``.
    """
    return _Reader(expression).whole()


def number(text: str) -> Fraction | None:
    """The first number in ``text`` (``-1,234.5``, ``$3``, ``3/4``), or None if there is none.

    A fraction bar counts between two whole numbers that touch it.
    """
    found = re.search(
        rf"(-\s*)?\$?\s*(-)?({_NUMBER.pattern})(?:/(\d{{1,18}})(?![\d.,/]*\d))?", text.translate(_DASHES), re.ASCII
    )
    if found is None or len(found[3]) > LONGEST:
        return None
    value = as_number(found[3])
    if found[4] is not None and "." not in found[3] and int(found[4]) != 0:
        value /= int(found[4])
    return -value if found[1] or found[2] else value


def numbers(text: str) -> list[str]:
    """Every number written in digits in ``text``, as it is written, without signs."""
    return [written for written in _NUMBER.findall(text) if len(written) <= LONGEST]


def as_number(written: str) -> Fraction:
    """The value of one number as :func:`numbers` finds them: digits, commas, a point."""
    return Fraction(written.replace(",", "").rstrip(".") or "0")


def places(written: str) -> int:
    """How many decimals a number is written with; 0 for anything but a single number."""
    return len(written.partition(".")[2]) if _NUMBER.fullmatch(written) else 0


_DASHES = str.maketrans({"−": "-", "–": "-"})


class _Reader:
    """Recursive descent: sum -> product -> signed -> primary."""

    def __init__(self, expression: str) -> None:
        if len(expression) > LONGEST:
            raise DataError(f"the expression {expression[:40]!r}... is longer than {LONGEST} characters.")
        self.expression = expression
        self.tokens = self._split(expression.translate(_SPELLINGS))
        self.place = 0
        self.depth = 0

    def whole(self) -> Fraction:
        value = self._sum()
        if self.place < len(self.tokens):
            raise self._refusal()
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while (sign := self._next("+", "-")) is not None:
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while (sign := self._next("*", "/", "//")) is not None:
            other = self._signed()
            if sign == "*":
                value *= other
            else:
                value = value / other if sign == "/" else Fraction(value // other)
        return value

    def _signed(self) -> Fraction:
        negative = False
        while (sign := self._next("+", "-")) is not None:
            negative ^= sign == "-"
        value = self._primary()
        while self._next("%") is not None:
            value /= 100
        while self._peek() == "(":
            value *= self._primary()
        return -value if negative else value

    def _primary(self) -> Fraction:
        if self._next("(") is not None:
            self.depth += 1
            if self.depth > DEEPEST:
                raise DataError(f"the expression {self.expression[:40]!r}... nests deeper than {DEEPEST} parentheses.")
            value = self._sum()
            if self._next(")") is None:
                raise self._refusal()
            self.depth -= 1
            return value
        token = self._peek()
        if token is None or not (token[0] in _VULGAR or token[0] in ".0123456789"):
            raise self._refusal()
        self.place += 1
        if token in _VULGAR:
            return _vulgar(token)
        follower = self._peek()
        if follower is not None and follower in _VULGAR:
            self.place += 1
            return as_number(token) + _vulgar(follower)
        return as_number(token)

    def _peek(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _next(self, *wanted: str) -> str | None:
        token = self._peek()
        if token not in wanted:
            return None
        self.place += 1
        return token

    def _split(self, text: str) -> list[str]:
        tokens, place, text = [], 0, text.strip()
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise self._refusal()
            tokens.append(found[0].strip())
            place = found.end()
        return tokens

    def _refusal(self) -> DataError:
        return DataError(f"{self.expression!r} is not arithmetic; expected numbers with + - * / and parentheses.")


def _vulgar(character: str) -> Fraction:
    above, _, below = unicodedata.normalize("NFKC", character).partition("\N{FRACTION SLASH}")
    return Fraction(int(above), int(below))
