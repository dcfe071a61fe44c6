"""When a monitor may look: its own CPU time is kept to a part of the training's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from telltale.configuration import check_integer, check_range
from telltale.errors import ConfigError

Clock = Callable[[], float]


class Pace:
    """Counts steps and CPU seconds. ``every`` "auto" looks as often as ``budget`` (a part of all CPU time) allows; an integer
    looks every so many steps, but later where that would go over the budget.

    A look is expected to cost what the last one of its kind did, the first one what :meth:`expect` was told.
    """

    def __init__(self, budget: float, every: int | str, *, clock: Clock = time.process_time) -> None:
        check_range("budget", budget, low=0.0, high=1.0)
        if not budget > 0:
            raise ConfigError(f"budget={budget!r} is not allowed; expected a part of the CPU time above 0, at most 1.")
        if every != "auto":
            check_integer("every", every, low=1)
        self.budget, self.every = float(budget), every
        self.spent = 0.0
        """CPU seconds of all looks so far."""
        self._clock = clock
        self._began = clock()
        self._costs: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._steps = 0

    @property
    def elapsed(self) -> float:
        """CPU seconds of the process since the pace was made, looks included."""
        return max(self._clock() - self._began, 1e-9)

    @property
    def share(self) -> float:
        """Part of the CPU time that went into looks."""
        return self.spent / self.elapsed

    @property
    def interval(self) -> int:
        """Steps between two looks at the present costs."""
        if isinstance(self.every, int) and self.budget >= 1.0:
            return self.every
        step = max(self._step_seconds(), 1e-9)
        wanted = int(self._costs.get("edge", 0.0) * (1.0 / self.budget - 1.0) / step) + 1
        return max(wanted, self.every if isinstance(self.every, int) else 1)

    def expect(self, kind: str, seconds: float) -> None:
        """What a look of this kind will probably cost, before there was one."""
        self._costs.setdefault(kind, seconds)

    def tick(self) -> None:
        """One training step is done."""
        self._steps += 1

    def due(self, kind: str = "edge", *, every: int | str | None = None) -> bool:
        """Whether a look of this kind is wanted now and fits into the budget."""
        wanted = self.every if every is None else every
        since = self._steps - self._last.get(kind, 0)
        if isinstance(wanted, int) and since < wanted:
            return False
        if self.budget >= 1.0:
            return True
        expected = self._costs.get(kind, 0.0)
        return self.spent + expected <= self.budget * (self.elapsed + expected)

    @contextmanager
    def look(self, kind: str = "edge") -> Iterator[None]:
        """Charge the block to the monitor."""
        started = self._clock()
        try:
            yield
        finally:
            cost = self._clock() - started
            self.spent += cost
            self._costs[kind] = cost
            self._last[kind] = self._steps

    def _step_seconds(self) -> float:
        return (self.elapsed - self.spent) / max(self._steps, 1)
