"""The machines: workers in levels, each joined by links of one bandwidth (PipeDream, SOSP'19, section 3.1, figure 7).

``Topology((Level(4, 10e9), Level(2, 1.25e9)))`` is two servers with four workers each, 10 GB/s inside a server and
1.25 GB/s between servers. A plan needs nothing else of the machines than this and the memory of one worker.

:func:`probe` measures the links between the ranks of a ``torchrun`` job; every rank calls it. Ranks of one host form the
inner level, hosts the outer one. Of each level two things are measured on idle links, medians over the repetitions: a message
from one rank to the next, and an all-reduce of the level. The planner knows one bandwidth per level, so the topology gets the
smaller of the two (gloo's all-reduce is often the slower one); both are in :attr:`ProbeResult.measurements` for editing the
file. Contention between levels, and asymmetric links, are not measured.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from telltale.config import check_choice, check_integer, check_range, read_yaml, unknown_key
from telltale.errors import ConfigError
from telltale.runs.files import write_atomically
from telltale.train.pipeline.runtime.failures import FlightRecord, default_device, rendezvous

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Level:
    """``count`` components of the level below (single workers in the first level), joined at ``bandwidth`` bytes/s."""

    count: int
    bandwidth: float

    def __post_init__(self) -> None:
        check_integer("count", self.count, low=1)
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
        """Whether there is a single level."""
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


_SMALL = 8
"""Bytes of the message whose time is the latency."""


@dataclass(frozen=True)
class Measurement:
    """One kind of traffic between some ranks."""

    level: int
    """0 inside a host, 1 between hosts."""
    kind: str
    """"message" (from one rank to another) or "all-reduce" (2 (m-1)/m of the bytes leave every one of m ranks)."""
    ranks: tuple[int, ...]
    bandwidth: float
    """Bytes per second that leave a rank."""
    latency: float
    """Seconds of a message of 8 bytes, or of an all-reduce of as many."""


@dataclass(frozen=True)
class ProbeResult:
    """What was found; the same on every rank."""

    topology: Topology
    measurements: tuple[Measurement, ...]


def probe(
    *,
    message_bytes: int = 2**24,
    repeats: int = 9,
    warm_up: int = 2,
    device_memory: float | str | None = None,
    timeout: float = 120.0,
) -> ProbeResult:
    """Measure the links between all ranks of this job; every rank calls it, under ``torchrun``.

    ``message_bytes`` is the size of the messages that bandwidth is computed from. ``device_memory`` goes into the topology; None
    is the GPU's memory, or no limit on CPU. ``timeout`` is in seconds. Takes a few seconds per host.

    Raises :class:`~telltale.errors.ConfigError` on every rank for a job of one process or hosts with different numbers of
    ranks, and :class:`~telltale.train.pipeline.runtime.failures.RankFailure` if a rank does not answer.
    """
    check_integer("message_bytes", message_bytes, low=4096)
    check_integer("repeats", repeats, low=1)
    check_integer("warm_up", warm_up, low=0)
    check_range("timeout", timeout, low=1.0)
    rank, world = rendezvous(timeout)
    if world == 1:
        raise ConfigError("a job of one process has no links to measure; expected at least two, under torchrun.")
    record = FlightRecord(rank, timeout, world=world)
    with record.published():
        hosts = hosts_of(_all_gather_object(int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), world, record))
        prober = _Prober(rank, record, default_device(), message_bytes, repeats, warm_up)
        found = [prober.message(0, pair) for host in hosts for pair in pairwise(host)]
        found += [prober.all_reduce(0, host) for host in hosts if len(host) > 1]
        leaders = tuple(host[0] for host in hosts)
        if len(hosts) > 1:
            found += [prober.message(1, pair) for pair in pairwise(leaders)]
            found.append(prober.all_reduce(1, leaders))
    return ProbeResult(topology_of(found, hosts, device_memory=_memory(device_memory)), tuple(found))


def hosts_of(local_sizes: list[int]) -> list[tuple[int, ...]]:
    """The ranks of every host, from the number of ranks that each rank reports for its host; torchrun numbers them host by host.

    Raises :class:`~telltale.errors.ConfigError` if hosts have different numbers of ranks: a level has one count.
    """
    size = local_sizes[0]
    if set(local_sizes) != {size} or len(local_sizes) % size:
        raise ConfigError(
            f"the ranks' hosts have {sorted(set(local_sizes))} ranks each; expected the same --nproc-per-node on every host."
        )
    return [tuple(range(first, first + size)) for first in range(0, len(local_sizes), size)]


def topology_of(
    measurements: list[Measurement], hosts: list[tuple[int, ...]], *, device_memory: float | str | None = None
) -> Topology:
    """Levels whose bandwidth is the least that was measured at them, and the latency of a message on the slowest one."""
    counts = [len(hosts[0]), len(hosts)]
    levels = []
    for level, count in enumerate(counts):
        bandwidths = [found.bandwidth for found in measurements if found.level == level]
        if count > 1:
            levels.append(Level(count, min(bandwidths)))
    latency = max(found.latency for found in measurements if found.kind == "message")
    return Topology(tuple(levels), device_memory=device_memory, latency=latency)  # type: ignore[arg-type]


class _Prober:
    """Measures between some ranks while the others wait; results go to all ranks."""

    def __init__(
        self, rank: int, record: FlightRecord, device: torch.device, message_bytes: int, repeats: int, warm_up: int
    ) -> None:
        self.rank, self.record, self.device = rank, record, device
        self.repeats, self.warm_up = repeats, warm_up
        self.sizes = (_SMALL, message_bytes)

    def message(self, level: int, pair: tuple[int, int]) -> Measurement:
        """Half a round trip between the two ranks."""
        first, second = pair

        def exchange(buffer: Tensor) -> None:
            if self.rank == first:
                dist.send(buffer, second)
                dist.recv(buffer, second)
            elif self.rank == second:
                dist.recv(buffer, first)
                dist.send(buffer, first)

        small, large = self._seconds(exchange, pair)
        # What the latency takes is not the link's rate.
        transfer = max(large / 2 - small / 2, 1e-9)
        return Measurement(level, "message", pair, self.sizes[1] / transfer, small / 2)

    def all_reduce(self, level: int, ranks: tuple[int, ...]) -> Measurement:
        """A sum over ``ranks``; its rate as that of a ring, 2 (m-1)/m of the bytes per rank (SOSP'19, section 3.1)."""
        group = dist.new_group(list(ranks))
        small, large = self._seconds(
            lambda buffer: dist.all_reduce(buffer, group=group) if self.rank in ranks else None, ranks
        )
        traffic = 2 * (len(ranks) - 1) / len(ranks) * self.sizes[1]
        return Measurement(level, "all-reduce", ranks, traffic / large, small)

    def _seconds(self, exchange: Callable[[Tensor], object], ranks: tuple[int, ...]) -> tuple[float, float]:
        """Median seconds of ``exchange`` with a small and with a large buffer, as the first of ``ranks`` saw it."""
        medians = []
        for size in self.sizes:
            buffer = torch.zeros(size // 4, dtype=torch.float32, device=self.device)
            durations = []
            with self.record.waiting(f"the probe of ranks {', '.join(map(str, ranks))}", None):
                dist.barrier()
                for _ in range(self.warm_up + self.repeats):
                    began = time.perf_counter()
                    exchange(buffer)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    durations.append(time.perf_counter() - began)
            medians.append(statistics.median(durations[self.warm_up :]))
        everyone = _all_gather_object(tuple(medians), dist.get_world_size(), self.record)
        small, large = everyone[ranks[0]]
        return small, large


def _all_gather_object(value: object, world: int, record: FlightRecord) -> list[Any]:
    gathered: list[Any] = [None] * world
    with record.waiting("word from all ranks", None):
        dist.all_gather_object(gathered, value)
    return gathered


def _memory(given: float | str | None) -> float | str | None:
    if given is None and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(default_device()).total_memory)
    return given
