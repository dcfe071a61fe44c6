"""The largest eigenvalue of an operator that changes a little between two looks, with an error bar, for a few products.

Each look is a short Lanczos run that starts from the last look's top Ritz vector; the residual of a Ritz pair bounds how far the
nearest eigenvalue is. A little noise keeps directions reachable that the last vector does not contain.

:class:`CpuBudget` decides when a monitor may look: it keeps the looks to a part of the training's CPU time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import ConfigError
from telltale.signals.hessian import Operator, vector_like
from telltale.signals.lanczos import lanczos
from telltale.signals.spectrum import MEMORY_LIMIT

_BESIDE = 4
"""Vectors beside the basis within a look: the next one, the start, a product, and the scale."""
NOISE = 0.05
"""Length of the noise added to a warm start of length 1."""


@dataclass(frozen=True)
class Extreme:
    """Largest and smallest Ritz value; an eigenvalue lies within ``error`` of the largest."""

    largest: float
    error: float
    smallest: float
    matvecs: int


class ExtremeTracker:
    """``steps`` products a look when warm, ``cold_steps`` at the first one; noise and first start from ``seed``.

    Between looks it holds one vector of N numbers (two where a scale is followed); within a look no more than
    ``memory_limit`` bytes of vectors, but six of them at least: where the basis does not fit, Lanczos starts anew from its
    best vector.
    """

    def __init__(
        self, *, steps: int = 6, cold_steps: int = 12, seed: int = 0, memory_limit: int = MEMORY_LIMIT
    ) -> None:
        check_integer("steps", steps, low=2)
        check_integer("cold_steps", cold_steps, low=2)
        check_integer("memory_limit", memory_limit, low=1)
        self.steps, self.cold_steps, self.memory_limit = steps, cold_steps, memory_limit
        self._generator = torch.Generator().manual_seed(seed)
        self._vector: Tensor | None = None
        self._scale: Tensor | None = None

    @property
    def warm(self) -> bool:
        """Whether the next look starts from the last one's vector."""
        return self._vector is not None

    @property
    def vector(self) -> Tensor | None:
        """The last look's Ritz vector of the largest value, (N,), of length 1 to rounding; None before there is one."""
        return self._vector

    def look(self, operator: Operator, *, scale: Tensor | None = None) -> Extreme:
        """The extremes of ``operator`` now. ``scale`` (N,): S where the operator is S H S; the warm vector follows it."""
        noise = torch.randn(operator.size, generator=self._generator).to(vector_like(operator))
        start, steps = noise, self.cold_steps
        vector = self._moved(scale)
        length = 0.0 if vector is None or vector.numel() != operator.size else float(vector.norm())
        if vector is not None and 0.0 < length < math.inf:
            start = vector / length + noise * (NOISE / noise.norm())
            steps = self.steps
        del noise, vector
        self._vector, found = None, None
        width, spent = self._width(start), 0
        while found is None or (spent < min(steps, operator.size) and found.error > 0):
            run = lanczos(operator, start, min(width, max(2, steps - spent)))
            spent += run.matvecs
            top = int(run.nodes.argmax())
            start = run.vectors(torch.tensor([top]))[0]
            smallest = min(float(run.nodes.min()), math.inf if found is None else found.smallest)
            found = Extreme(float(run.nodes[top]), float(run.residuals[top]), smallest, spent)
            if steps <= width:
                break
        self._vector = start
        self._scale = None if scale is None else scale.clone()
        return found

    def memory(self, size: int, item: int = 4) -> tuple[int, int]:
        """Bytes of vectors of ``size`` numbers of ``item`` bytes that it holds between looks, and within one at most."""
        vector = size * item
        width = min(max(self.steps, self.cold_steps), self._fitting(vector))
        return 2 * vector, (width + _BESIDE) * vector

    def _width(self, like: Tensor) -> int:
        return self._fitting(like.numel() * like.element_size())

    def _fitting(self, vector: int) -> int:
        """Steps whose basis fits, with what stands beside it."""
        return max(2, self.memory_limit // vector - _BESIDE)

    def forget(self) -> None:
        """Start cold at the next look."""
        self._vector = self._scale = None

    def _moved(self, scale: Tensor | None) -> Tensor | None:
        """The last vector in today's coordinates: along a steady direction d of H it is S d."""
        if self._vector is None or scale is None or self._scale is None or self._scale.shape != scale.shape:
            return self._vector
        if torch.equal(scale, self._scale):
            return self._vector
        ratio = torch.where(self._scale > 0, scale / self._scale, torch.zeros_like(scale))
        return self._vector * ratio.to(self._vector)


Clock = Callable[[], float]
EDGE_KIND, FIRST_KIND, DIMENSION_KIND = "edge", "first", "dimension"


class Cost(NamedTuple):
    """What a monitor has cost so far."""

    seconds: float
    """CPU seconds of all its looks."""
    share: float
    """The same as a part of all CPU time."""


class CpuBudget:
    """Counts steps and CPU seconds. ``every`` "auto" looks as often as ``budget`` allows; an integer looks every so many steps,
    but later where that would go over the budget. A budget of 1 sets no limit.

    ``budget`` is a part of the CPU time of training, which is all of the process's but the looks: at 0.05 a run takes 1.05
    times the CPU time. A look is expected to cost what the last one of its kind did, the first one what :meth:`expect` was
    given; a failed look predicts nothing. ``aftermath``: what a look costs in all, in units of its own time; the steps after it
    find cold caches.
    """

    def __init__(
        self, budget: float, every: int | str, *, aftermath: float = 1.0, clock: Clock = time.process_time
    ) -> None:
        check_range("budget", budget, low=0.0, high=1.0)
        if not budget > 0:
            raise ConfigError(f"budget={budget!r} is not allowed; expected a part of the CPU time above 0, at most 1.")
        if every != "auto":
            check_integer("every", every, low=1)
        check_range("aftermath", aftermath, low=1.0, finite=True)
        self.budget, self.every, self._aftermath = float(budget), every, aftermath
        self.spent = 0.0
        """CPU seconds of all looks so far."""
        self.last_cost = 0.0
        """CPU seconds of the last look of any kind."""
        self._clock = clock
        self._began = clock()
        self._costs: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._parts: dict[str, float] = {}
        self._spent_on: dict[str, float] = {}
        self._steps = 0

    @property
    def elapsed(self) -> float:
        """CPU seconds of the process since the pace was made, looks included."""
        return max(self._clock() - self._began, 1e-9)

    @property
    def trained(self) -> float:
        """CPU seconds of the process without the looks."""
        return max(self.elapsed - self.spent, 1e-9)

    @property
    def share(self) -> float:
        """Part of all CPU time that went into looks; below the budget where looks / training is."""
        return self.spent / self.elapsed

    @property
    def interval(self) -> int:
        """Steps from now until the next edge look, at the present costs; what is asked for while no step was timed."""
        asked = self.every if isinstance(self.every, int) else 1
        wanted = asked - (self._steps - self._last.get(EDGE_KIND, 0))
        if self.budget < 1.0 and self._steps:
            missing = self._needed(EDGE_KIND) - self.trained
            wanted = max(wanted, math.ceil(missing * self._steps / self.trained))
        return max(wanted, 1)

    def expect(self, kind: str, seconds: float) -> None:
        """What the next look of this kind will probably cost."""
        self._costs[kind] = seconds

    def limit(self, kind: str, part: float) -> None:
        """Looks of this kind may use no more than ``part`` of the budget, so that dearer kinds get their turn."""
        self._parts[kind] = part

    def tick(self) -> None:
        """One training step is done."""
        self._steps += 1

    def due(self, kind: str = EDGE_KIND, *, every: int | str | None = None) -> bool:
        """Whether a look of this kind is wanted now and fits into the budget."""
        wanted = self.every if every is None else every
        if isinstance(wanted, int) and self._steps - self._last.get(kind, 0) < wanted:
            return False
        return self.budget >= 1.0 or self._needed(kind) <= self.trained

    @contextmanager
    def look(self, kind: str = EDGE_KIND) -> Iterator[None]:
        """Charge the block to the monitor."""
        started = self._clock()
        try:
            yield
            self._costs[kind] = self._clock() - started
        finally:
            cost = self._clock() - started
            self.spent += cost
            self.last_cost = cost
            self._spent_on[kind] = self._spent_on.get(kind, 0.0) + cost
            self._last[kind] = self._steps

    def _needed(self, kind: str) -> float:
        """CPU seconds of training that allow one more look of this kind."""
        expected = self._costs.get(kind, 0.0)
        needed = (self.spent + expected) * self._aftermath / self.budget
        if kind in self._parts:
            own = self._spent_on.get(kind, 0.0) + expected
            needed = max(needed, own * self._aftermath / (self.budget * self._parts[kind]))
        return needed
