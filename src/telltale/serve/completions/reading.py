"""Reading a JSON object field by field: each is checked where it is read, and what nobody read is refused by name."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from telltale.serve.completions.errors import ApiError, refused

_SHOWN = 80
"""Characters of an unknown field's name that an error repeats."""


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises :class:`~telltale.serve.completions.errors.ApiError` (400) if it is none."""
    try:
        value = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON; expected a JSON object in UTF-8.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {kind(value)}; expected a JSON object.", code="invalid_json")
    return value


class Fields:
    """The fields of one object. ``path`` is where it stands in the body, "" for the body itself.

    ``null`` reads like a field that is not there. Every method raises :class:`~telltale.serve.completions.errors.ApiError`
    (400) that names the field.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path
        self._read: set[str] = set()

    def name(self, field: str) -> str:
        """The field's name as errors tell it."""
        return f"{self.path}.{field}" if self.path else field

    def get(self, field: str) -> Any:
        """The raw value, None if it is not there."""
        self._read.add(field)
        return self.values.get(field)

    def required(self, field: str) -> Any:
        """The raw value of a field that has to be there."""
        value = self.get(field)
        if value is None:
            raise refused(self.name(field), "the field is missing.", code="missing_required_parameter")
        return value

    def integer(self, field: str, *, low: int, high: int | None = None) -> int | None:
        """A whole number in low..high."""
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise refused(self.name(field), f"expected an integer, got {kind(value)}.", code="invalid_type")
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise refused(self.name(field), f"expected an integer {wanted}.")
        return value

    def number(
        self, field: str, *, low: float, high: float, above: bool = False, infinite: bool = False
    ) -> float | None:
        """A number in low..high; ``above``: low itself is not allowed; ``infinite``: "inf" and "-inf" are."""
        value = self.get(field)
        if value is None:
            return None
        if infinite and value in ("inf", "-inf"):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refused(self.name(field), f"expected a number, got {kind(value)}.", code="invalid_type")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf if value > 0 else -math.inf
        if not low <= number <= high or (above and number == low):
            wanted = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
            raise refused(self.name(field), f"expected a number {wanted}.")
        return number

    def boolean(self, field: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise refused(self.name(field), f"expected true or false, got {kind(value)}.", code="invalid_type")
        return value

    def choice(self, field: str, choices: Sequence[str]) -> str | None:
        """One of a few words."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, str) or value not in choices:
            raise refused(self.name(field), f"expected one of {', '.join(choices)}.")
        return value

    def inner(self, field: str) -> Fields | None:
        """An object within this one."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise refused(self.name(field), f"expected an object, got {kind(value)}.", code="invalid_type")
        return Fields(value, self.name(field))

    def refuse_unread(self, known: Iterable[str] = ()) -> None:
        """Raise for a field that no one has read; ``known``: names that exist, beside those read, for the hint."""
        for field in self.values:
            if field in self._read:
                continue
            shown = field[:_SHOWN]
            near = difflib.get_close_matches(shown, sorted(self._read | set(known)), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise refused(self.name(shown), f"the field is not known here.{hint}", code="unknown_parameter")


def text(value: Any, name: str) -> str:
    """``value`` as a string that can be written in UTF-8."""
    if not isinstance(value, str):
        raise refused(name, f"expected a string, got {kind(value)}.", code="invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(
            name, "the text has half of a surrogate pair; expected text that UTF-8 can write.", code="invalid_value"
        ) from None
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            # JSON leaves open which one counts, and whoever looked at the body before may have read the other.
            raise refused(name[:_SHOWN], "the field is given twice.", code="duplicate_parameter")
        found[name] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
