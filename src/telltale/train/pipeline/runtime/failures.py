"""What happens when a rank fails: every other rank stops with one sentence that names it and its last operations.

A rank that meets an error publishes it in the job's key-value store before it raises. A rank that finds a connection broken
or a time-out over looks there first. A rank that was killed or hangs can publish nothing, so every rank also writes a
heartbeat there twice a second, from a thread: what it did last and which rank it waits for. A rank that waits for no other
is the culprit. Restarting is torchrun's business (``--max-restarts``), going on from a checkpoint is
``checkpoint``'s.

A rank that is blocked in a wait cannot look for what was published. So the heartbeat's thread, once it has read a failure, ends
the trainer's gloo groups on its rank, and the wait raises. NCCL is left to its own watchdog.

The heartbeat's thread has a connection to the store of its own, so that it is never behind a call that the rank itself is
blocked in. It ends with the record that it reads from, and before the interpreter does.

The rendezvous is here as well. torch 2.13's torchrun keeps one key-value store over all restarts of a job, and gloo reads
the addresses of dead processes out of it: a plain ``init_process_group`` fails after ``--max-restarts`` has done its work.
So under torchrun the first rank draws a prefix for this attempt, and every rank uses keys under that prefix alone. A
program that joins the job before it makes a trainer needs ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from telltale.errors import TelltaleError

INTERVAL = 0.5
"""Seconds between two heartbeats."""

_FAILURE = "failure"
_numbers = itertools.count()
_ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(frozen=True)
class Status:
    """A rank's last heartbeat: its operations, and the rank it waits for (-1: several, None: none)."""

    last: str
    waiting: int | None
    beat: int = 0


class Heartbeat:
    """The heartbeats of rank ``rank``, read by ``status``, and the view of everyone else's; ``timeout`` is in seconds."""

    def __init__(self, rank: int, status: Callable[[], Status], timeout: float) -> None:
        self._store = _store(next(_numbers), timeout)
        self.message: str | None = None
        """The first failure that any rank published."""
        self.lost = self._store is None
        """Whether the store cannot be reached."""
        self.groups: list[dist.ProcessGroup] = []
        """The groups to end once a failure is published."""
        if not self.lost:
            thread = threading.Thread(
                target=_watch,
                args=(weakref.ref(self), weakref.WeakMethod(status), rank),
                name="telltale-heartbeats",
                daemon=True,
            )
            thread.start()
            _threads.add(thread)

    def publish(self, message: str) -> None:
        """Publish a failure; the first one stays."""
        if self._store is not None:
            self._store.compare_set(_FAILURE, "", message)

    def beat(self, rank: int, status: Status, number: int) -> None:
        """Send heartbeats with ``status`` for ``rank`` and read those of the others."""
        assert self._store is not None
        try:
            self._store.set(f"status/{rank}", json.dumps(asdict(status) | {"beat": number}))
            if self.message is None and self._store.check([_FAILURE]):
                self.message = self._store.get(_FAILURE).decode()
        except Exception:
            self.lost = True

    def end_groups(self) -> None:
        """Make every wait in the groups raise, on this rank and on those it is connected to."""
        while self.groups:
            end_group(self.groups.pop())

    def of_all(self, world: int) -> dict[int, Status]:
        """The last status of every rank that has given one."""
        seen: dict[int, Status] = {}
        with contextlib.suppress(Exception):
            for rank in range(world):
                if self._store is not None and self._store.check([f"status/{rank}"]):
                    seen[rank] = Status(**json.loads(self._store.get(f"status/{rank}")))
        return seen


_END_TAG = (1 << 31) - 1


def end_group(group: dist.ProcessGroup) -> None:
    """Make every wait in a gloo ``group`` of which this rank is a member raise ``RuntimeError``; from any thread.

    gloo cannot abort a group, but a receive that times out breaks all connections of its group; nothing comes under this tag.
    """
    with contextlib.suppress(Exception):
        peers = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
        if peers and dist.get_backend(group) == "gloo":
            work = dist.irecv(torch.empty(1), peers[0], group=group, tag=_END_TAG)
            if work is not None:
                work.wait(timedelta(milliseconds=1))


def _watch(heartbeats: weakref.ref[Heartbeat], status: weakref.WeakMethod[Callable[[], Status]], rank: int) -> None:
    for number in itertools.count():
        own, say = heartbeats(), status()
        if own is None or say is None or own.lost:
            return
        own.beat(rank, say(), number)
        if own.message is not None:
            own.end_groups()
        del own, say
        if _ending.wait(INTERVAL):
            return


@atexit.register
def _end() -> None:
    """A thread that is inside the store's client when the interpreter goes would take the process down with it."""
    _ending.set()
    for thread in list(_threads):
        thread.join(timeout=2.0)


def _store(number: int, timeout: float) -> dist.Store | None:
    """A connection of our own to the job's store, if it answers in ``timeout`` seconds; trainers are numbered in the order in
    which every rank makes them."""
    try:
        base = dist.distributed_c10d._get_default_store()
        usual = base.timeout  # type: ignore[attr-defined]
        base.set_timeout(timedelta(seconds=timeout))
        try:
            store = dist.PrefixStore(f"telltale/{number}", base.clone())  # type: ignore[attr-defined]
        finally:
            base.set_timeout(usual)
        store.set_timeout(timedelta(seconds=min(10.0, timeout)))
        return store
    except Exception:
        return None


REMEMBERED = 12
"""Operations that the flight record of a rank keeps."""

_GRACE = 4 * INTERVAL
"""Seconds to wait for another rank's heartbeat; a rank that sends none in that time counts as dead."""


class RankFailure(TelltaleError):
    """Another rank of the pipeline died, failed or did not answer in time; names it and the last operations."""


class FlightRecord:
    """The last operations of this rank, and the place where any rank publishes its failure. ``timeout`` is in seconds."""

    def __init__(self, rank: int, timeout: float, *, world: int = 1) -> None:
        self.rank, self.timeout, self.world = rank, timeout, world
        self._last: deque[str] = deque(maxlen=REMEMBERED)
        self._waiting: int | None = None
        self._heartbeat = Heartbeat(rank, self._status, timeout) if world > 1 else None

    def ends(self, group: dist.ProcessGroup | None) -> None:
        """End ``group`` once a rank has published a failure; None, or one that this rank is not in, is left alone."""
        if self._heartbeat is not None and isinstance(group, dist.ProcessGroup):
            self._heartbeat.groups.append(group)

    def note(self, operation: str) -> None:
        """Remember ``operation`` as begun."""
        self._last.append(operation)

    @property
    def last(self) -> str:
        """The remembered operations, oldest first, in one line."""
        return ", ".join(self._last) or "none yet"

    @contextmanager
    def waiting(self, what: str, peer: int | None) -> Iterator[None]:
        """Around a call that waits for the global rank ``peer``, or for several (None): its errors become
        :class:`RankFailure`."""
        self._waiting = -1 if peer is None else peer
        try:
            yield
        except RuntimeError as error:
            raise self.failure(what, peer, error) from error
        finally:
            self._waiting = None

    @contextmanager
    def published(self) -> Iterator[None]:
        """Around whatever may fail on this rank alone: the error is published to the other ranks before it is raised."""
        try:
            yield
        except BaseException as error:
            self.publish(error)
            raise

    def publish(self, error: BaseException) -> None:
        """Publish to the other ranks that this one stops because of ``error``; the first rank to publish is the one named."""
        if self._heartbeat is None or isinstance(error, RankFailure):
            return
        self._publish(f"rank {self.rank} stopped: {type(error).__name__}: {error} (its last operations: {self.last})")

    def failure(self, waiting_for: str, peer: int | None, error: BaseException) -> RankFailure:
        """The error to raise where waiting for ``peer`` (a global rank, None for several) has failed with ``error``."""
        before = self._heartbeat.of_all(self.world) if self._heartbeat is not None else {}
        message = self._published()
        if message is None:
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            message = self._diagnosis(peer, late, before)
            self._publish(message)
        return RankFailure(
            f"{message}. Rank {self.rank} was waiting for {waiting_for}; its own last operations: {self.last}. "
            f"torchrun --max-restarts goes on from the newest checkpoint."
        )

    def _status(self) -> Status:
        return Status(self.last, self._waiting)

    def _publish(self, message: str) -> None:
        if self._heartbeat is None:
            return
        with contextlib.suppress(Exception):
            self._heartbeat.publish(message)
        if self.rank == 0 and not store_outlives_ranks():
            time.sleep(3 * INTERVAL)

    def _published(self) -> str | None:
        """What a failing rank has published; it may need a moment to do so after its connections broke."""
        deadline = time.monotonic() + _GRACE
        while self._heartbeat is not None and time.monotonic() < deadline:
            message = self._heartbeat.message
            if message or self._heartbeat.lost:
                return message
            time.sleep(INTERVAL / 5)
        return None

    def _diagnosis(self, peer: int | None, late: bool, before: dict[int, Status]) -> str:
        """Who it was, from the heartbeats of all ranks now and a moment before."""
        what = f"did not answer within {self.timeout:g} s" if late else "is gone (its connection closed)"
        if self._heartbeat is None or self._heartbeat.lost:
            if not store_outlives_ranks() and self.rank != 0:
                return "rank 0 is gone, and with it the job's store"
            return f"{'another rank' if peer is None else f'rank {peer}'} {what}"
        seen = self._heartbeat.of_all(self.world)
        culprit = self._culprit(peer, late, before, seen)
        if culprit is None:
            return f"another rank {what}"
        status = seen.get(culprit)
        return f"rank {culprit} {what} (its last operations: {status.last if status else 'it never started'})"

    def _culprit(self, peer: int | None, late: bool, before: dict[int, Status], seen: dict[int, Status]) -> int | None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        absent = [rank for rank in others if rank not in seen]
        if absent:
            return absent[0]
        if not late and peer is not None:
            return peer
        silent = [rank for rank in others if rank in before and before[rank].beat == seen[rank].beat]
        idle = [rank for rank in others if seen[rank].waiting is None]
        suspects = (idle or silent) if late else (silent or idle)
        if suspects:
            return suspects[0]
        return peer


_POLL = 0.02


def rendezvous(timeout: float) -> tuple[int, int]:
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
            name = attempt_prefix(store, rank, world, timeout)
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


def attempt_prefix(store: dist.Store, rank: int, world: int, timeout: float) -> str:
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
