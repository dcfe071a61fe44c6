"""Starts one process per rank for a test, and brings back what each of them returned or raised."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass
class Outcome:
    """One rank: what it returned, or its error's class and words; nothing of either if it was killed."""

    value: Any = None
    error: str | None = None
    seconds: float = 0.0
    ended: bool = True


def run_ranks(job: Callable[..., Any], world: int, *arguments: Any, limit: float = 200.0) -> list[Outcome]:
    """``job(rank, *arguments)`` in ``world`` processes that form a gloo job; their outcomes in the order of the ranks.

    ``job`` is a function of an importable module. A rank that lives longer than ``limit`` seconds is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["telltale.train.pipeline.trainer", "telltale.train.pipeline.layers"])
        ranks = [
            context.Process(target=_rank, args=(rank, world, port, folder, job, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + limit
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        outcomes = []
        for rank, process in enumerate(ranks):
            ended = not process.is_alive()
            if not ended:
                process.kill()
                process.join()
            file = Path(folder) / str(rank)
            outcome = pickle.loads(file.read_bytes()) if file.exists() else Outcome()
            outcome.ended = ended
            outcomes.append(outcome)
        return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails with the first error if one raised."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.ended, f"rank {rank} did not end"
    return [outcome.value for outcome in outcomes]


def _rank(rank: int, world: int, port: int, folder: str, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    dist.init_process_group("gloo")
    began, outcome = time.monotonic(), Outcome()
    try:
        outcome.value = job(rank, *arguments)
    except BaseException as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - began
    aside = Path(folder) / f"{rank}.part"
    aside.write_bytes(pickle.dumps(outcome))
    aside.replace(Path(folder) / str(rank))
    if outcome.error is not None:
        sys.exit(1)
    dist.destroy_process_group()
