"""How a process finds the others of its job.

torch 2.13's torchrun keeps one key-value store over all restarts of a job, and gloo reads the addresses of dead processes out
of it: a plain ``init_process_group`` fails after ``--max-restarts`` has done its work. So under torchrun the first rank draws a
name for this attempt, and every rank uses keys under that name alone. A program that joins by itself before it makes a
trainer needs ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` instead.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_POLL = 0.02


def join(timeout: float) -> tuple[int, int]:
    """(rank, number of processes) of the job that torchrun describes; alone without one. ``timeout`` is in seconds."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        backend, wait = "gloo", timedelta(seconds=timeout)
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not store_outlives_ranks():
            dist.init_process_group(backend, timeout=wait)
        else:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, wait)
            name = attempt_name(store, rank, world, timeout)
            dist.init_process_group(
                backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=wait
            )
    return dist.get_rank(), dist.get_world_size()


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def store_outlives_ranks() -> bool:
    """Under torchrun its agent keeps the store; otherwise the first rank does, and it dies with it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt_name(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """A name that the ``world`` processes of this attempt share and no earlier one had, whatever is left in ``store``.

    Every rank leaves a number of its own; the first rank answers with its name and the numbers that it saw, again whenever one
    of them has changed, until all have confirmed. An answer to dead processes does not hold the number of a living one.
    Raises ``TimeoutError`` after ``timeout`` seconds.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"telltale/hello/{rank}", own)
    answered: list[str | None] = []
    while time.monotonic() < deadline:
        if rank == 0:
            seen = [_read(store, f"telltale/hello/{other}") for other in range(world)]
            if seen != answered:
                store.set("telltale/answer", json.dumps({"name": own, "seen": seen}))
                answered = seen
            if all(_read(store, f"telltale/confirmed/{other}") == own for other in range(1, world)):
                return own
        else:
            answer = json.loads(_read(store, "telltale/answer") or "{}")
            if own in answer.get("seen", ()):
                store.set(f"telltale/confirmed/{rank}", answer["name"])
                return answer["name"]
        time.sleep(_POLL)
    raise TimeoutError(f"{world} processes were to join and not all of them came within {timeout:g} s.")


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
