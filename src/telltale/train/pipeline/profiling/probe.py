"""What the links between the ranks of a job carry, measured: the topology that the planner needs (SOSP'19, section 3.1).

Every rank of a ``torchrun`` job calls :func:`probe`. Ranks of one host form the inner level, hosts the outer one. Of each level
two things are measured on idle links, medians over the repetitions: a message from one rank to the next, and an all-reduce of
the level. The planner knows one bandwidth per level, so the topology gets the smaller of the two (gloo's all-reduce is often
the slower one); both are in :attr:`ProbeResult.measurements` for who wants to edit the file. Contention between levels, and
asymmetric links, are not measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from telltale.configuration import check_integer, check_range
from telltale.errors import ConfigError
from telltale.train.pipeline.profiling.topology import Level, Topology
from telltale.train.pipeline.runtime.faults import FlightRecord
from telltale.train.pipeline.runtime.joining import default_device, join

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
    ranks, and :class:`~telltale.train.pipeline.runtime.faults.RankFailure` if a rank does not answer.
    """
    check_integer("message_bytes", message_bytes, low=4096)
    check_integer("repeats", repeats, low=1)
    check_integer("warm_up", warm_up, low=0)
    check_range("timeout", timeout, low=1.0)
    rank, world = join(timeout)
    if world == 1:
        raise ConfigError("a job of one process has no links to measure; expected at least two, under torchrun.")
    record = FlightRecord(rank, timeout, world=world)
    with record.published():
        hosts = hosts_of(_told_by_all(int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), world, record))
        prober = _Prober(rank, record, default_device(), message_bytes, repeats, warm_up)
        found = [prober.message(0, pair) for host in hosts for pair in pairwise(host)]
        found += [prober.all_reduce(0, host) for host in hosts if len(host) > 1]
        leaders = tuple(host[0] for host in hosts)
        if len(hosts) > 1:
            found += [prober.message(1, pair) for pair in pairwise(leaders)]
            found.append(prober.all_reduce(1, leaders))
    return ProbeResult(topology_of(found, hosts, device_memory=_memory(device_memory)), tuple(found))


def hosts_of(local_sizes: list[int]) -> list[tuple[int, ...]]:
    """The ranks of every host, from how many ranks each rank says that its host has; torchrun numbers them host by host.

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
    """Measures between some ranks while the others wait; results are told to all."""

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
        told = _told_by_all(tuple(medians), dist.get_world_size(), self.record)
        small, large = told[ranks[0]]
        return small, large


def _told_by_all(value: object, world: int, record: FlightRecord) -> list[Any]:
    told: list[Any] = [None] * world
    with record.waiting("word from all ranks", None):
        dist.all_gather_object(told, value)
    return told


def _memory(given: float | str | None) -> float | str | None:
    if given is None and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(default_device()).total_memory)
    return given
