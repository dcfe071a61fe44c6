"""Signs of life: a thread per rank that says in the job's store what the rank does, and listens for a failure.

It has a connection to the store of its own, so that it is never behind a call that the rank itself is blocked in. It ends
with the record that it reads from, and before the interpreter does.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

INTERVAL = 0.5
"""Seconds between two signs."""

_FAILURE = "failure"
_numbers = itertools.count()
_ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(frozen=True)
class Sign:
    """What a rank said last: its operations, and the rank it waits for (-1: several, None: nobody)."""

    last: str
    waiting: int | None
    beat: int = 0


class SignsOfLife:
    """The signs of rank ``rank``, read by ``sign``, and the view of everyone else's; ``timeout`` is in seconds."""

    def __init__(self, rank: int, sign: Callable[[], Sign], timeout: float) -> None:
        self._store = _store(next(_numbers), timeout)
        self.told: str | None = None
        """The first failure that any rank published."""
        self.lost = self._store is None
        """Whether the store cannot be reached."""
        if not self.lost:
            thread = threading.Thread(
                target=_watch,
                args=(weakref.ref(self), weakref.WeakMethod(sign), rank),
                name="telltale-signs",
                daemon=True,
            )
            thread.start()
            _threads.add(thread)

    def tell(self, message: str) -> None:
        """Publish a failure; the first one stays."""
        if self._store is not None:
            self._store.compare_set(_FAILURE, "", message)

    def beat(self, rank: int, sign: Sign, number: int) -> None:
        """Say ``sign`` for ``rank`` and listen."""
        assert self._store is not None
        try:
            self._store.set(f"sign/{rank}", json.dumps(asdict(sign) | {"beat": number}))
            if self.told is None and self._store.check([_FAILURE]):
                self.told = self._store.get(_FAILURE).decode()
        except Exception:
            self.lost = True

    def of_all(self, world: int) -> dict[int, Sign]:
        """The last sign of every rank that has given one."""
        seen: dict[int, Sign] = {}
        with contextlib.suppress(Exception):
            for rank in range(world):
                if self._store is not None and self._store.check([f"sign/{rank}"]):
                    seen[rank] = Sign(**json.loads(self._store.get(f"sign/{rank}")))
        return seen


def _watch(signs: weakref.ref[SignsOfLife], sign: weakref.WeakMethod[Callable[[], Sign]], rank: int) -> None:
    for number in itertools.count():
        own, say = signs(), sign()
        if own is None or say is None or own.lost:
            return
        own.beat(rank, say(), number)
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
