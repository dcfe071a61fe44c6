"""Checks of arguments, and frozen dataclass configs from YAML files and ``key=value`` overrides of a command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from telltale.errors import ConfigError

ConfigType = TypeVar("ConfigType")


def check_range(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    finite: bool = False,
) -> float:
    """``value`` as a float if it is a number with low <= value <= high and above < value < below.

    A bool is no number, NaN is in no range. Raises :class:`~telltale.errors.ConfigError` otherwise.
    """
    bounds = ((f">= {low}", low), (f"> {above}", above), (f"<= {high}", high), (f"< {below}", below))
    allowed = " and ".join(text for text, bound in bounds if bound is not None)
    expected = f"expected a {'finite ' if finite else ''}number {allowed}".rstrip()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} is not a number; {expected}.")
    within = (
        not math.isnan(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    if not within or (finite and math.isinf(value)):
        raise ConfigError(f"{name}={value!r} is out of range; {expected}.")
    return float(value)


def check_integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer >= low, and <= high if there is one; a bool or a float is no integer.

    Raises :class:`~telltale.errors.ConfigError` otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r} is not allowed; expected an integer {allowed}.")
    return value


LARGEST_SEED = 2**63 - 1
"""The largest seed that every random number generator in use takes."""


def check_seed(value: Any) -> int:
    """``value`` if it is an integer from 0 to :data:`LARGEST_SEED`, else :class:`~telltale.errors.ConfigError`."""
    return check_integer("seed", value, low=0, high=LARGEST_SEED)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise :class:`~telltale.errors.ConfigError` unless ``value`` is one of ``choices``."""
    options = list(choices)
    if value not in options:
        raise ConfigError(f"{name}={value!r} is unknown; expected one of {', '.join(map(repr, options))}.")


def from_mapping(kind: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Build the dataclass ``kind``; an unknown key raises ConfigError with the nearest field's name."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_key(key, names))
    return kind(**{key: _as_declared(kind, key, value) for key, value in values.items()})


def from_yaml(kind: type[ConfigType], path: str | Path) -> ConfigType:
    """Read the dataclass ``kind`` from a YAML file of its fields."""
    return from_mapping(kind, read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; raises ConfigError for a missing file, bad YAML or anything but a mapping."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # YAML's own runs over several lines
        raise ConfigError(f"config file {path} is not valid YAML: {reason}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} holds {type(loaded).__name__}; expected a mapping of field: value.")
    return dict(loaded or {})


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["steps=200", "betas=[0.9, 0.95]"]`` as a mapping; values are read as YAML."""
    parsed: dict[str, Any] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {item!r} is not understood; expected key=value.")
        try:
            parsed[key.strip()] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r} has a value that is not valid YAML: {error}") from error
    return parsed


def unknown_key(key: str, names: Iterable[str]) -> str:
    """The sentence that refuses ``key`` and suggests the nearest of ``names``."""
    known = sorted(names)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown config field {key!r}; expected one of {', '.join(known)}.{hint}"


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as a string; users mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_declared(kind: Any, key: str, value: Any) -> Any:
    declared = {field.name: field for field in dataclasses.fields(kind)}[key]
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(declared.default, float):
        return float(value)
    return _number(value)
