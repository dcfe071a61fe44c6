"""Worlds of processes for the pipeline benchmarks: each script spawns its ranks once and runs every contestant in them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(function: Callable[..., Any], world: int, *arguments: Any) -> Any:
    """Run ``function(rank, world, *arguments)`` in ``world`` processes of one thread; returns what rank 0 returned."""
    with mp.get_context("spawn").Manager() as manager:
        box = manager.dict()
        mp.spawn(_enter, (function, world, _free_port(), box, arguments), nprocs=world)
        return box.get("result")


def _enter(rank: int, function: Any, world: int, port: int, box: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo")
    result = function(rank, world, *arguments)
    if rank == 0:
        box["result"] = result
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(action: Callable[[], Any]) -> tuple[float, float]:
    """(wall seconds from a common start until the last rank is done, CPU seconds of all ranks)."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.barrier()
    wall = time.perf_counter() - wall
    dist.all_reduce(used)
    return wall, used.item()


def load_average() -> float:
    """Running processes per the kernel's one-minute average; reported beside every wall time."""
    return os.getloadavg()[0]


def limited_loopback(rate: str) -> None:
    """Give this process (root, in a network namespace of its own) a loopback of ``rate``, e.g. "1gbit"."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    shape = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
    subprocess.run(shape, check=True)
