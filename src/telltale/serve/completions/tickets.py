"""What the decoding thread tells a request, and how the request says that nobody listens any more."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from telltale.decode.results import StepRecord, StepVerifiedStatistics
from telltale.serve.completions.errors import ApiError

DROPPED = "dropped"
"""The reason of an output that was given up before its end."""


@dataclass
class Event:
    """News of one choice: tokens that are final, and the step that they end if they do. With the last ones comes the ``reason``
    of the end, and ``stats``; or a ``failure``, which ends it too."""

    choice: int
    tokens: list[int] = field(default_factory=list)
    step: StepRecord | None = None
    reason: str | None = None
    stats: StepVerifiedStatistics | None = None
    failure: ApiError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows for this choice."""
        return self.reason is not None or self.failure is not None


class Ticket:
    """One request's place in the scheduler. Iterate over its events, on the event loop it was made on; close it in any case.

    The iteration ends when every choice has ended.
    """

    def __init__(self, choices: int, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self.loop = loop
        self.arrived = time.monotonic()
        self._wake = wake
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._open = set(range(choices))
        self._unwanted: set[int] = set()

    def wants(self, choice: int) -> bool:
        """Whether anybody waits for the choice. Any thread may ask."""
        return choice not in self._unwanted

    def end(self, choice: int) -> None:
        """Give one choice up; an event with the reason "dropped" follows, unless it ended by itself."""
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
