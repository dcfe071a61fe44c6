"""The machines: workers in levels, each joined by links of one bandwidth (PipeDream, SOSP'19, section 3.1, figure 7).

``Topology((Level(4, 10e9), Level(2, 1.25e9)))`` is two servers with four workers each, 10 GB/s inside a server and
1.25 GB/s between servers. A plan needs nothing else of the machines than this and the memory of one worker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from telltale.configuration import check_choice, read_yaml, unknown_key
from telltale.errors import ConfigError
from telltale.runs.atomic import write_atomically

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Level:
    """``count`` components of the level below (single workers in the first level), joined at ``bandwidth`` bytes/s."""

    count: int
    bandwidth: float

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConfigError(f"count={self.count!r} is not allowed; expected an integer >= 1.")
        object.__setattr__(self, "bandwidth", parse_bytes("bandwidth", self.bandwidth))
        if self.bandwidth <= 0:
            raise ConfigError(f"bandwidth={self.bandwidth!r} is not allowed; expected bytes per second > 0.")


@dataclass(frozen=True)
class Topology:
    """Levels from the innermost out. Wrong values raise :class:`~telltale.errors.ConfigError` naming the field."""

    levels: tuple[Level, ...]
    device_memory: float | None = None
    """Bytes of one worker; None for no limit. Strings such as "16GB" and "16GiB" are read too."""
    latency: float = 0.0
    """Seconds per message; used by the simulator."""
    shared_link: bool = False
    """All traffic shares one pipe, as on a loopback with a bandwidth limit; used by the simulator."""

    def __post_init__(self) -> None:
        if isinstance(self.levels, list):
            object.__setattr__(self, "levels", tuple(self.levels))
        levels = self.levels
        if not isinstance(levels, tuple) or not levels or not all(isinstance(level, Level) for level in levels):
            raise ConfigError(f"levels={self.levels!r} is not allowed; expected at least one Level(count, bandwidth).")
        if self.device_memory is not None:
            object.__setattr__(self, "device_memory", parse_bytes("device_memory", self.device_memory))
            if self.device_memory <= 0:
                raise ConfigError(f"device_memory={self.device_memory!r} is not allowed; expected bytes > 0.")
        # YAML reads 1e-4, without a point, as text.
        number = _float(self.latency) if isinstance(self.latency, str) else None
        latency = self.latency if number is None else number
        if isinstance(latency, bool) or not isinstance(latency, (int, float)) or not 0 <= latency < math.inf:
            raise ConfigError(f"latency={latency!r} is not allowed; expected seconds >= 0.")
        object.__setattr__(self, "latency", float(latency))
        check_choice("shared_link", self.shared_link, (True, False))

    @classmethod
    def flat(cls, workers: int, *, bandwidth: float | str, **fields: Any) -> Topology:
        """``workers`` that all reach each other at ``bandwidth`` bytes/s."""
        return cls((Level(workers, bandwidth),), **fields)  # type: ignore[arg-type]

    @property
    def workers(self) -> int:
        """Product of the counts."""
        return math.prod(level.count for level in self.levels)

    @property
    def is_flat(self) -> bool:
        """Whether one level says it all."""
        return len(self.levels) == 1

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read YAML: ``levels`` as a list of ``{count, bandwidth}``, innermost first, and the other fields by name."""
        document = read_yaml(path)
        known = ("levels", "device_memory", "latency", "shared_link")
        for key in document:
            if key not in known:
                raise ConfigError(f"topology {path}: {unknown_key(key, known)}")
        entries = document.pop("levels", None)
        if not isinstance(entries, list):
            raise ConfigError(
                f"topology {path} has no list of levels; expected levels: [{{count: 4, bandwidth: 10e9}}]."
            )
        try:
            return cls(tuple(_level(entry, number) for number, entry in enumerate(entries)), **document)
        except ConfigError as error:
            raise ConfigError(f"topology {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the YAML that :meth:`load` reads, aside and then renamed."""
        document: dict[str, Any] = {
            "levels": [{"count": level.count, "bandwidth": level.bandwidth} for level in self.levels],
            "latency": self.latency,
            "shared_link": self.shared_link,
        }
        if self.device_memory is not None:
            document["device_memory"] = self.device_memory
        write_atomically(Path(path), yaml.safe_dump(document, sort_keys=False))


def parse_bytes(name: str, value: Any) -> float:
    """A number of bytes, or a string with a unit: "1.25GB" (10^9), "16GiB" (2^30), "10Gbit" (10^9 / 8).

    A trailing "/s" is allowed. Raises ConfigError naming ``name`` for anything else, NaN included.
    """
    if isinstance(value, str):
        text = value.strip().lower().removesuffix("/s")
        match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?i?)(b|bit|bits)?", text)
        number = _float(match.group(1)) if match else None
        if match is None or number is None or match.group(2) not in _UNITS:
            raise ConfigError(f'{name}={value!r} is not a size; expected a number of bytes or a text such as "16GB".')
        value = number * _UNITS[match.group(2)] / (8 if (match.group(3) or "").startswith("bit") else 1)
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ConfigError(f'{name}={value!r} is not a size; expected a number of bytes or a text such as "16GB".')
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name} is an integer beyond the largest float; expected a number of bytes.") from error


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _level(entry: Any, number: int) -> Level:
    if not isinstance(entry, Mapping) or set(entry) != {"count", "bandwidth"}:
        raise ConfigError(f"levels[{number}]={entry!r} is not allowed; expected count and bandwidth.")
    try:
        return Level(entry["count"], entry["bandwidth"])
    except ConfigError as error:
        raise ConfigError(f"levels[{number}]: {error}") from error
