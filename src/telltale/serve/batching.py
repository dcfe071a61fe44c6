"""Micro-batching: requests that wait at the same time go through the model together, on a thread of their own.

While a batch is computed the next one gathers, so that a busy server batches without waiting; only an idle one waits
``patience`` seconds for company. The event loop never computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from telltale.config import check_integer, check_range

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass
class _Waiting(Generic[Item, Answer]):
    items: list[Item]
    answer: asyncio.Future[list[Answer]] = field(repr=False)


class MicroBatcher(Generic[Item, Answer]):
    """Calls ``compute(items) -> answers`` (one each, in order) with the items of several requests at once.

    ``size``: items per batch; a larger request goes alone. ``patience``: seconds an idle server waits for more.
    Use it inside ``async with``; leaving the block answers what has been submitted and refuses what comes later.
    """

    def __init__(
        self, compute: Callable[[Sequence[Item]], Sequence[Answer]], *, size: int = 32, patience: float = 0.002
    ) -> None:
        check_integer("batch_size", size, low=1)
        check_range("patience", patience, low=0.0)
        self.compute = compute
        self.size = size
        self.patience = patience
        self.batches = 0
        """How many times the model was called."""
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MicroBatcher[Item, Answer]:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._changed.set()
        if self._worker is not None:
            await self._worker
        self._pool.shutdown(wait=True)

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to ``items``, or the error that computing them raised. An empty request never reaches the model.

        Raises ``RuntimeError`` outside the ``async with`` block.
        """
        if not items:
            return []
        if self._closing or self._worker is None:
            raise RuntimeError("the batcher is not running; submit inside its async with block.")
        entry = _Waiting[Item, Answer](list(items), asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._changed.set()
        return await entry.answer

    async def _work(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._waiting and not self._closing and len(self._waiting) == 1:
                await asyncio.sleep(self.patience)
            while self._waiting:
                await self._serve(self._take())
            if self._closing:
                return

    def _take(self) -> list[_Waiting[Item, Answer]]:
        """The longest run of waiting requests that fits a batch, in order of arrival; at least one."""
        batch: list[_Waiting[Item, Answer]] = []
        count = 0
        while self._waiting and (not batch or count + len(self._waiting[0].items) <= self.size):
            entry = self._waiting.popleft()
            if not entry.answer.cancelled():
                batch.append(entry)
                count += len(entry.items)
        return batch

    async def _serve(self, batch: list[_Waiting[Item, Answer]]) -> None:
        answers = await self._compute([item for entry in batch for item in entry.items])
        if isinstance(answers, Exception) and len(batch) > 1:
            # One bad request must not fail its neighbours: each is computed again by itself.
            for entry in batch:
                _answer(entry, await self._compute(entry.items))
            return
        start = 0
        for entry in batch:
            stop = start + len(entry.items)
            _answer(entry, answers if isinstance(answers, Exception) else answers[start:stop])
            start = stop

    async def _compute(self, items: Sequence[Item]) -> list[Answer] | Exception:
        if not items:
            return []
        self.batches += 1
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._pool, self.compute, items))
        except Exception as error:
            return error


def _answer(entry: _Waiting[Item, Answer], answers: list[Answer] | Exception) -> None:
    if entry.answer.done():
        return
    if isinstance(answers, Exception):
        entry.answer.set_exception(answers)
    else:
        entry.answer.set_result(answers)
