"""Progress of long work on a terminal: a live bar where there is one, a line now and then where there is not."""

from __future__ import annotations

import time
from types import TracebackType

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
    """A context manager around one task of ``total`` units; ``update`` sets how many are done and what to say beside it."""

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
