"""What happens when a rank fails: every other rank stops with one sentence that names it and its last operations.

A rank that meets an error publishes it in the job's key-value store before it raises. A rank that finds a connection broken
or a time-out over looks there first. A rank that was killed or hangs can publish nothing, so every rank also leaves a sign of
life there twice a second, from a thread: what it did last and whom it is waiting for. Whoever waits for nobody is who the
others wait for. Restarting is torchrun's business (``--max-restarts``), going on from a checkpoint is ``checkpoint``'s.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from telltale.errors import TelltaleError
from telltale.train.pipeline.runtime.joining import store_outlives_ranks
from telltale.train.pipeline.runtime.signs import INTERVAL, Sign, SignsOfLife

REMEMBERED = 12
"""Operations that the flight record of a rank keeps."""

_GRACE = 4 * INTERVAL
"""Seconds to wait for another rank's word; whoever gives no sign of life in them is dead."""


class RankFailure(TelltaleError):
    """Another rank of the pipeline died, failed or did not answer in time; names it and the last operations."""


class FlightRecord:
    """The last operations of this rank, and where failures of any rank are told. ``timeout`` is in seconds."""

    def __init__(self, rank: int, timeout: float, *, world: int = 1) -> None:
        self.rank, self.timeout, self.world = rank, timeout, world
        self._last: deque[str] = deque(maxlen=REMEMBERED)
        self._waiting: int | None = None
        self._signs = SignsOfLife(rank, self._sign, timeout) if world > 1 else None

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
        """Around whatever may fail on this rank alone: the error is told to the others before it leaves."""
        try:
            yield
        except BaseException as error:
            self.publish(error)
            raise

    def publish(self, error: BaseException) -> None:
        """Tell the other ranks that this one stops because of ``error``; the first rank to say so is the one named."""
        if self._signs is None or isinstance(error, RankFailure):
            return
        self._tell(f"rank {self.rank} stopped: {type(error).__name__}: {error} (its last operations: {self.last})")

    def failure(self, waiting_for: str, peer: int | None, error: BaseException) -> RankFailure:
        """The error to raise where waiting for ``peer`` (a global rank, None for several) has failed with ``error``."""
        before = self._signs.of_all(self.world) if self._signs is not None else {}
        told = self._told()
        if told is None:
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            told = self._diagnosis(peer, late, before)
            self._tell(told)
        return RankFailure(
            f"{told}. Rank {self.rank} was waiting for {waiting_for}; its own last operations: {self.last}. "
            f"torchrun --max-restarts goes on from the newest checkpoint."
        )

    def _sign(self) -> Sign:
        return Sign(self.last, self._waiting)

    def _tell(self, message: str) -> None:
        if self._signs is None:
            return
        with contextlib.suppress(Exception):
            self._signs.tell(message)
        if self.rank == 0 and not store_outlives_ranks():
            time.sleep(3 * INTERVAL)

    def _told(self) -> str | None:
        """What a failing rank has published; it may need a moment to do so after its connections broke."""
        deadline = time.monotonic() + _GRACE
        while self._signs is not None and time.monotonic() < deadline:
            told = self._signs.told
            if told or self._signs.lost:
                return told
            time.sleep(INTERVAL / 5)
        return None

    def _diagnosis(self, peer: int | None, late: bool, before: dict[int, Sign]) -> str:
        """Who it was, from the signs of life of all ranks now and a moment before."""
        what = f"did not answer within {self.timeout:g} s" if late else "is gone (its connection closed)"
        if self._signs is None or self._signs.lost:
            if not store_outlives_ranks() and self.rank != 0:
                return "rank 0 is gone, and with it the job's store"
            return f"{'another rank' if peer is None else f'rank {peer}'} {what}"
        seen = self._signs.of_all(self.world)
        culprit = self._culprit(peer, late, before, seen)
        if culprit is None:
            return f"another rank {what}"
        sign = seen.get(culprit)
        return f"rank {culprit} {what} (its last operations: {sign.last if sign else 'it never started'})"

    def _culprit(self, peer: int | None, late: bool, before: dict[int, Sign], seen: dict[int, Sign]) -> int | None:
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
