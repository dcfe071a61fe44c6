"""One thread that decodes: it owns the engine, takes rows in between turns, and drops those whose clients have gone.

The event loop never computes and the engine never waits for a reader. Rows beyond the engine's places wait in order of arrival;
beyond the queue's bound a request is refused at once.

The decoding thread sends its events to a request through a :class:`ResponseHandle`, which the request closes when its client goes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from telltale.config import check_integer
from telltale.decode.decoders import StepVerified
from telltale.decode.engine import BLOCK, FAILED, Committed
from telltale.decode.grammar import GrammarError
from telltale.decode.results import StepRecord, StepVerifiedStatistics
from telltale.decode.rows import Row
from telltale.errors import NumericalError, TelltaleError
from telltale.serve.http_errors import ApiError, failed, queue_full, refused, shutting_down, where
from telltale.serve.metrics import Metrics

TURN_SECONDS = 0.05
"""How long a block of tokens of a single row may take."""
_log = logging.getLogger("telltale.serve")
DROPPED = "dropped"
"""The reason of an output that was given up before its end."""


@dataclass
class Event:
    """An event of one choice: tokens that are final, and the step that they end if they do. With the last ones comes the ``reason``
    of the end, and ``stats``; or a ``failure``, which ends it too."""

    choice: int
    tokens: list[int] = field(default_factory=list)
    step: StepRecord | None = None
    reason: str | None = None
    stats: StepVerifiedStatistics | None = None
    failure: ApiError | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Of each token its log-probability and the most likely ones, where they are wanted while it is decoded."""

    @property
    def last(self) -> bool:
        """Whether nothing follows for this choice."""
        return self.reason is not None or self.failure is not None


class ResponseHandle:
    """One request's place in the scheduler. Iterate over its events, on the event loop it was made on; close it in any case.

    The iteration ends when every choice has ended.
    """

    def __init__(
        self,
        choices: int,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
        *,
        counted: bool = True,
        constrained_by: str | None = None,
    ) -> None:
        self.loop = loop
        self.constrained_by = constrained_by
        """The field that the answers' grammar comes from; None for no grammar."""
        self.counted = counted
        """Whether a client has asked for it, so that metrics of outputs count it."""
        self.arrived = time.monotonic()
        self._wake = wake
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._open = set(range(choices))
        self._unwanted: set[int] = set()

    def wants(self, choice: int) -> bool:
        """Whether the choice is still wanted. Any thread may call it."""
        return choice not in self._unwanted

    def end(self, choice: int) -> None:
        """Give one choice up; an event with the reason "dropped" follows, unless it has ended already."""
        self._unwanted.add(choice)
        self._wake()

    def close(self) -> None:
        """Give up what has not ended."""
        if self._open:
            self._unwanted |= self._open
            self._wake()

    def deliver(self, event: Event) -> None:
        """Called on the event loop, in order."""
        if event.choice in self._open:
            self._events.append(event)
            if event.last:
                self._open.discard(event.choice)
            self._news.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if not self._open:
                return
            self._news.clear()
            await self._news.wait()


@dataclass
class _Entry:
    """One row of a handle, waiting or under way."""

    handle: ResponseHandle
    choice: int
    row: Row
    last: float | None = None
    """When its latest tokens came, in seconds; None before the first."""


@dataclass(frozen=True)
class Occupancy:
    """What the server holds at a moment. ``cache_bytes``: keys and values of all rows and branches; ``prefix_bytes`` and
    ``prefix_pieces``: those of texts that were read before."""

    rows: int
    waiting: int
    slots: int
    slots_in_use: int
    branches_in_use: int
    cache_bytes: int
    prefix_bytes: int = 0
    prefix_pieces: int = 0


class Scheduler:
    """Rows of all requests through one engine. Use it inside ``async with``.

    ``max_rows``: rows that are decoded at the same time; ``queue``: rows that may wait for a place; ``prefix_cache``: bytes for
    texts that were read before, None for none; ``shared``: whether others may write into the models' weights.
    """

    def __init__(
        self,
        decoder: StepVerified,
        *,
        max_rows: int = 16,
        queue: int = 64,
        prefix_cache: int | None = None,
        shared: bool = True,
        metrics: Metrics,
    ) -> None:
        check_integer("max_rows", max_rows, low=1)
        check_integer("queue", queue, low=0)
        self.decoder = decoder
        self.max_rows = max_rows
        self.queue = queue
        self.metrics = metrics
        self.on_output: Callable[[Row], None] | None = None
        """Called on the decoding thread with each row that a client asked for and that has come to its end."""
        self._engine_options: dict[str, Any] = {"prefix_cache": prefix_cache, "shared": shared}
        self._engine = decoder.engine(**self._engine_options)
        self._changed = threading.Condition()
        self._waiting: deque[_Entry] = deque()
        self._live: dict[int, _Entry] = {}
        self._load = 0
        """Rows that have been taken in and have not ended."""
        self._block = 1
        """The most tokens that a row that is alone gets in one turn."""
        self._closing = False
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    async def __aenter__(self) -> Scheduler:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()
        await asyncio.to_thread(self._thread.join)

    def end(self) -> None:
        """Stop after the turn under way; requests that still wait get an error. Any thread may call it."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    @property
    def broken(self) -> bool:
        """Whether decoding has failed for good; requests are then answered with 503."""
        return self._broken

    @property
    def capacity(self) -> int:
        """Rows that are decoded or wait, at most."""
        return self.max_rows + self.queue

    def reserve(self, rows: int, *, always: bool = False) -> None:
        """Keep places for a request whose prompts are not read yet: what is refused must not cost their reading.

        :meth:`submit` fills the places, :meth:`release` gives them back. ``always``: also where there is none, for the end of a
        request that was taken in. Raises
        :class:`~telltale.serve.http_errors.ApiError`: 429 if there are not so many, 503 when the server ends.
        """
        with self._changed:
            if self._closing:
                raise shutting_down()
            if self._load + rows > self.capacity and not always:
                raise queue_full(self.capacity)
            self._load += rows

    def release(self, rows: int) -> None:
        """Give up places that were reserved; the request is not submitted."""
        with self._changed:
            self._load -= rows

    def submit(self, rows: Sequence[Row], *, counted: bool = True, constrained_by: str | None = None) -> ResponseHandle:
        """Take a request into the places reserved for it. Its events come to the handle, on the running event loop.

        ``counted`` False is for the server's own questions, which no metric of outputs counts. ``constrained_by``: the field
        that a grammar comes from, for the error where an output cannot keep to it.
        Raises :class:`~telltale.serve.http_errors.ApiError` (503) when the server ends.
        """
        loop = asyncio.get_running_loop()
        handle = ResponseHandle(len(rows), loop, self._wake, counted=counted, constrained_by=constrained_by)
        with self._changed:
            if self._closing:
                raise shutting_down()
            self._waiting += [_Entry(handle, choice, row) for choice, row in enumerate(rows)]
            self._changed.notify()
        if counted:
            self.metrics.prompt_tokens.add(sum(len(row.prompt) for row in rows))
        return handle

    def occupancy(self) -> Occupancy:
        """What is held now. While a turn is under way the numbers may be of different moments of it."""
        states, prefixes = self._engine.states, self._engine.prefixes
        rows = zip(*(list(state.rows) for state in states), strict=False)
        return Occupancy(
            rows=len(self._live),
            waiting=len(self._waiting),
            slots=self.max_rows,
            slots_in_use=sum(any(row.length for row in both) for both in rows),
            branches_in_use=sum(state.branches_in_use for state in states),
            cache_bytes=sum(state.cache_bytes for state in states),
            prefix_bytes=0 if prefixes is None else prefixes.nbytes,
            prefix_pieces=0 if prefixes is None else len(prefixes),
        )

    def _wake(self) -> None:
        """A reader has gone: what waits for it leaves the queue at once, what is decoded at the next turn."""
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        try:
            while self._gather():
                self._turn()
        except Exception as error:
            self._broken = True
            _log.critical("decoding has ended: %s", where(error))
        with self._changed:
            self._closing = True
            entries = [*self._live.values(), *self._waiting]
            self._live.clear()
            self._waiting.clear()
            self._load = 0
        _publish([(entry.handle, Event(entry.choice, failure=shutting_down())) for entry in entries])

    def _gather(self) -> bool:
        """Wait for something to do; take in and drop rows. False when the server ends."""
        with self._changed:
            while True:
                if self._closing:
                    return False
                gone = [entry for entry in self._waiting if not entry.handle.wants(entry.choice)]
                if gone:
                    self._waiting = deque(entry for entry in self._waiting if entry.handle.wants(entry.choice))
                if self._live or self._waiting or gone:
                    break
                self._changed.wait()
            self._load -= len(gone)
            room = self.max_rows - len(self._live)
            dropped = [number for number, entry in self._live.items() if not entry.handle.wants(entry.choice)]
            admitted = deque(self._waiting.popleft() for _ in range(min(room + len(dropped), len(self._waiting))))
        _publish([(entry.handle, Event(entry.choice, reason=DROPPED)) for entry in gone])
        entering: list[_Entry] = []
        try:
            for number in dropped:
                self._engine.drop(number)
                _publish([self._ended(number, DROPPED)])
            while admitted:
                entering = [admitted.popleft()]
                _publish(self._admit(entering[0]))
                entering = []
        except Exception as error:
            # The rows behind it are not affected; they get a fresh engine.
            with self._changed:
                self._waiting.extendleft(reversed(admitted))
            self._fail(error, entering)
        return True

    def _admit(self, entry: _Entry) -> list[tuple[ResponseHandle, Event]]:
        try:
            number = self._engine.admit(entry.row)
        except TelltaleError as error:
            with self._changed:
                self._load -= 1
            # What is left to refuse here is about lengths.
            problem = ApiError(400, str(error), param="max_tokens", code="invalid_value")
            return [(entry.handle, Event(entry.choice, failure=problem))]
        with self._changed:
            self._live[number] = entry
        self.metrics.waiting.observe(time.monotonic() - entry.handle.arrived)
        return []

    def _turn(self) -> None:
        if not self._live:
            return
        try:
            began = time.monotonic()
            committed = self._engine.advance(self._block)
        except Exception as error:
            self._fail(error)
            return
        self.metrics.turns.add()
        now = time.monotonic()
        self._pace(now - began, sum(len(one.tokens) for one in committed))
        events = []
        for one in committed:
            entry = self._live[one.number]
            self._observe(entry, one, now)
            if one.reason is not None:
                events.append(self._ended(one.number, one.reason, one))
            elif one.tokens or one.step is not None:
                events.append((entry.handle, Event(entry.choice, one.tokens, one.step, scores=one.scores)))
        _publish(events)

    def _pace(self, seconds: float, tokens: int) -> None:
        """Let a turn of a single row last no longer than :data:`TURN_SECONDS`: others wait for its end, and so does its reader."""
        if len(self._live) == 1 and tokens:
            self._block = max(1, min(BLOCK, int(TURN_SECONDS * tokens / max(seconds, 1e-9))))

    def _observe(self, entry: _Entry, one: Committed, now: float) -> None:
        if not one.tokens or not entry.handle.counted:
            return
        if entry.last is None:
            self.metrics.first_step.observe(now - entry.handle.arrived)
        else:
            self.metrics.step.observe(now - entry.last)
        entry.last = now

    def _ended(self, number: int, reason: str, one: Committed | None = None) -> tuple[ResponseHandle, Event]:
        with self._changed:
            entry = self._live.pop(number)
            self._load -= 1
        stats = entry.row.stats
        stats.cached_tokens = entry.row.cached_tokens
        event = Event(entry.choice, reason=reason, stats=stats)
        if one is not None:
            event.tokens, event.step, event.scores = one.tokens, one.step, one.scores
            if one.failure is not None:
                event = Event(entry.choice, failure=_problem(one.failure, entry.handle.constrained_by))
        if entry.handle.counted:
            self._count(entry.row, reason)
            if self.on_output is not None and reason not in (DROPPED, FAILED):
                self.on_output(entry.row)
        return entry.handle, event

    def _count(self, row: Row, reason: str) -> None:
        """Count an output that has ended."""
        stats, metrics = row.stats, self.metrics
        metrics.outputs.add(reason=reason)
        metrics.reused_tokens.add(row.reused_tokens)
        metrics.cached_tokens.add(row.cached_tokens)
        metrics.tokens.add(stats.accepted_tokens, source="draft")
        metrics.tokens.add(stats.target_tokens - stats.speculated_accepted, source="target")
        metrics.tokens.add(stats.speculated_accepted, source="speculated")
        metrics.unused_tokens.add(stats.rejected_tokens, why="rejected")
        metrics.unused_tokens.add(stats.discarded_tokens + stats.target_discarded_tokens, why="not_selected")
        metrics.unused_tokens.add(stats.speculated - stats.speculated_accepted, why="not_confirmed")
        metrics.steps.add(stats.accepted_steps, outcome="accepted")
        metrics.steps.add(stats.rejected_steps, outcome="rejected")

    def _fail(self, error: Exception, entering: Sequence[_Entry] = ()) -> None:
        """The engine failed: its rows are in no state to go on, so all end with it, and it is made anew.

        ``entering``: a row that was not live yet.
        """
        with self._changed:
            entries = [*self._live.values(), *entering]
            self._live.clear()
            self._load -= len(entries)
        _log.error("a turn with %d rows failed: %s", len(entries), where(error))
        self.metrics.failures.add()
        _publish([(entry.handle, Event(entry.choice, failure=failed(error))) for entry in entries])
        self._engine = self.decoder.engine(**self._engine_options)


def _problem(failure: NumericalError, constrained_by: str | None) -> ApiError:
    """What a client is told of a row that failed. A grammar that cannot go on is the client's own."""
    if isinstance(failure, GrammarError) and constrained_by is not None:
        return refused(constrained_by, str(failure))
    _log.error("a row failed: %s", failure)
    return failed(failure)


def _publish(events: Sequence[tuple[ResponseHandle, Event]]) -> None:
    """Hand a turn's events over, with one call for each event loop."""
    loops: dict[int, tuple[asyncio.AbstractEventLoop, list[tuple[ResponseHandle, Event]]]] = {}
    for handle, event in events:
        loops.setdefault(id(handle.loop), (handle.loop, []))[1].append((handle, event))
    for loop, own in loops.values():
        try:
            loop.call_soon_threadsafe(_deliver, own)
        except RuntimeError:
            # The loop has been closed: there is no receiver.
            continue


def _deliver(events: Sequence[tuple[ResponseHandle, Event]]) -> None:
    for handle, event in events:
        handle.deliver(event)
