"""Progress of long jobs, and their interruption.

On a terminal progress is a live bar, elsewhere a line now and then. The first Ctrl-C is a request, which lets a loop finish its
step and save; the second one stops it at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """A context manager around one task of ``total`` units; ``update`` sets how many are done, and a note."""

    def __init__(self, description: str, total: int, *, console: Console | None = None, unit: str = "step") -> None:
        self.console = console or Console(stderr=True)
        self.description = description
        self.total = total
        self.unit = unit
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressBar:
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._live.start()
            self._task = self._live.add_task(self.description, total=self.total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """``done`` units of ``total`` are finished; ``note`` is a few words such as the current loss."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if done == self.total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(f"{self.description}: {self.unit} {done}/{self.total}  {note}", highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class Interruption:
    """Whether the user has asked to stop; a loop reads ``requested`` between steps."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn the first SIGINT or SIGTERM in the block into ``Interruption.requested``; a second raises KeyboardInterrupt.

    Outside the main thread signals cannot be caught; ``requested`` then stays false.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
