"""How early a stage, or a run of stages, may start under a bottleneck: the step of the dynamic program of
:mod:`telltale.train.pipeline.planning.partition`, on arrays of questions at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from telltale.train.pipeline.planning.cost_models import cut_seconds
from telltale.train.pipeline.planning.problem import Problem

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Sweep:
    """How early a run of layers that ends at a position may start, under a bottleneck. Positions are 0..N."""

    def __init__(self, problem: Problem) -> None:
        layers = problem.profile.layers
        self.problem = problem
        self.slack = 1e-12
        self.n_layers = len(layers)
        self.compute = _prefix([layer.compute for layer in layers])
        self.weights = _prefix([layer.parameter_bytes for layer in layers])
        self.saved = _prefix([layer.saved_bytes for layer in layers])
        self.boundary = np.array([0.0, *(layer.activation_bytes for layer in layers[:-1]), 0.0])
        self.largest_boundary = np.maximum.accumulate(self.boundary[::-1])[::-1]
        self.cut_costs = [
            np.asarray(cut_seconds(self.boundary, level.bandwidth, problem.directions)) for level in problem.levels
        ]
        self.dearest_cuts = [float(costs.max()) for costs in self.cut_costs]
        self.cut_trees = [_range_minima(costs) for costs in self.cut_costs]
        self.workers = np.cumprod([1, *(level.count for level in problem.levels)])
        self.exact_inputs = problem.memory is not None and problem.memory.recompute and len(problem.levels) == 1
        self._summed: dict[tuple[int, int], Floats] = {}

    def bounds(self) -> tuple[float, float]:
        """A bottleneck below which there is no plan, and one at which every plan that fits is allowed."""
        total = float(self.compute[-1])
        low = total / float(self.workers[-1]) * (1.0 - 1e-9)
        slowest = min(level.bandwidth for level in self.problem.levels)
        single = float(self.problem.cost_model.stage_seconds(total, self.weights[-1], 1, slowest))
        if self.problem.memory is None:
            return low, single
        high = single + max(self.dearest_cuts)
        for level in self.problem.levels:
            count = np.arange(1, level.count + 1)
            high += float(np.max(self.problem.cost_model.stage_seconds(0.0, self.weights[-1], count, level.bandwidth)))
        return low, high * (1.0 + 1e-9)

    def cover(self, level: int, ends: Ints, theta: Floats, behind: Ints, copies: Ints) -> Ints:
        """The earliest starts of runs that end at ``ends`` on the components of one ``level``. All arrays have shape (E,).

        ``theta`` is each run's bottleneck, ``behind`` the workers after it, ``copies`` how often the run is replicated.
        """
        count = self.problem.levels[level].count
        reach = np.full((count + 1, len(ends)), self.n_layers + 1)
        reach[0] = ends
        best = ends.copy()
        for used in range(1, count + 1):
            replicas = np.arange(1, min(used, self.problem.max_replicas or used) + 1)
            shape = (len(replicas), len(ends))
            starts, cuts = self.extend(
                level,
                reach[used - replicas].ravel(),
                np.repeat(replicas, len(ends)),
                np.full(shape[0] * shape[1], used),
                np.broadcast_to(theta, shape).ravel(),
                np.broadcast_to(behind, shape).ravel(),
                np.broadcast_to(copies, shape).ravel(),
            )
            best = np.minimum(best, starts.reshape(shape).min(axis=0))
            reach[used] = cuts.reshape(shape).min(axis=0)
        return best

    def extend(
        self, level: int, ends: Ints, replicas: Ints, used: Ints, theta: Floats, behind: Ints, copies: Ints
    ) -> tuple[Ints, Ints]:
        """Put one more stage in front of runs that start at ``ends``; with it they use ``used`` components. Shape (E,).

        Returns the earliest starts of the stage, and the earliest ones that are cuts within ``theta``; N+1 where there
        is none.
        """
        nowhere = self.n_layers + 1
        known = ends <= self.n_layers
        ends_known = np.where(known, ends, 0)
        behind_stage = behind + copies * (used - replicas) * self.workers[level]
        starts = self._stage_starts(level, ends_known, replicas, theta, behind_stage, copies)
        progress = known & (starts < ends_known)
        if self.exact_inputs:
            starts = self._first_fitting(starts, ends_known, replicas, theta, behind_stage)
        cuts = starts
        if self.dearest_cuts[level] > theta.min():
            cuts = _next_within(self.cut_trees[level], starts, theta * (1.0 + self.slack))
        starts = np.where(progress, starts, nowhere)
        return starts, np.where(progress & (cuts < ends_known), cuts, nowhere)

    def _stage_starts(self, level: int, ends: Ints, replicas: Ints, theta: Floats, behind: Ints, copies: Ints) -> Ints:
        """Smallest start of one stage with T^k <= theta that fits into memory; ``ends`` where not even a layer does."""
        model, bandwidth = self.problem.cost_model, self.problem.levels[level].bandwidth
        budget = theta * replicas * (1.0 + self.slack)
        if not model.overlapped:
            starts = self._summed_starts(level, ends, replicas, budget, behind, copies)
        else:
            if level:
                starts = self.cover(level - 1, ends, budget, behind, copies * replicas)
            else:
                starts = np.searchsorted(self.compute, self.compute[ends] - budget)
            traffic = model.traffic(replicas) * self.share(replicas, copies)
            with np.errstate(divide="ignore", invalid="ignore"):
                allowed = np.where(traffic > 0, budget * (bandwidth / traffic), np.inf)
            starts = np.maximum(starts, np.searchsorted(self.weights, self.weights[ends] - allowed))
        if level == 0 and self.problem.memory is not None:
            return self._memory_starts(np.minimum(starts, ends), ends, copies * replicas, behind)
        return np.minimum(starts, ends)

    def share(self, replicas: Any, copies: Any) -> Any:
        """Part of a round's traffic that a round causes when gradients are averaged once per batch."""
        if self.problem.microbatches is None:
            return 1.0
        return np.minimum(1.0, replicas * copies / self.problem.microbatches)

    def _summed_starts(
        self, level: int, ends: Ints, replicas: Ints, budget: Floats, behind: Ints, copies: Ints
    ) -> Ints:
        """The same for synchronisation that follows the compute: A^{k-1} + synchronisation <= m theta."""
        model, bandwidth = self.problem.cost_model, self.problem.levels[level].bandwidth
        if level == 0:
            starts = np.empty_like(ends)
            # Copies matter only where one update per batch makes a round's share of it depend on them.
            shared = copies if self.problem.microbatches is not None else np.ones_like(copies)
            for count, times in {*zip(replicas.tolist(), shared.tolist(), strict=True)}:
                rows = (replicas == count) & (shared == times)
                if (count, times) not in self._summed:
                    exchange = model.synchronisation(self.weights, count, bandwidth) * self.share(count, times)
                    self._summed[count, times] = self.compute + exchange
                summed = self._summed[count, times]
                starts[rows] = np.searchsorted(summed, summed[ends[rows]] - budget[rows])
            return starts
        low, high = np.minimum(self.cover(level - 1, ends, budget, behind, copies * replicas), ends), ends.copy()
        while (low < high).any():
            middle = (low + high) // 2
            exchange = model.synchronisation(self.weights[ends] - self.weights[middle], replicas, bandwidth)
            left = budget - exchange * self.share(replicas, copies)
            inner = self.cover(level - 1, ends, np.maximum(left, 0.0), behind, copies * replicas)
            fits = (left > 0) & (inner <= middle)
            high = np.where(fits, middle, high)
            low = np.where(fits, low, np.minimum(middle + 1, high))
        return high

    def _memory_starts(self, starts: Ints, ends: Ints, replicas: Ints, behind: Ints) -> Ints:
        """Smallest starts, from ``starts`` on, whose stage fits into memory.

        Without the bytes of the stage's input where :meth:`_first_fitting` adds them exactly, else with the largest.
        """
        memory = self.problem.memory
        assert memory is not None
        coefficients = memory.coefficients((behind + replicas - 1) // replicas, replicas)
        inputs = np.zeros_like(self.boundary) if self.exact_inputs else self.largest_boundary

        def too_large(positions: Ints, rows: Ints) -> npt.NDArray[np.bool_]:
            per_parameter, per_saved, per_input = (values[rows] for values in coefficients)
            stops = ends[rows]
            peak = per_parameter * (self.weights[stops] - self.weights[positions])
            peak += per_saved * (self.saved[stops] - self.saved[positions]) + per_input * inputs[positions]
            return np.asarray(peak > self.problem.memory_limit)

        rows = np.flatnonzero(too_large(starts, np.arange(len(starts))))
        low, high = starts[rows], ends[rows]
        while (low < high).any():
            middle = (low + high) // 2
            more = too_large(middle, rows) & (low < high)
            low, high = np.where(more, middle + 1, low), np.where(more, high, np.minimum(middle, high))
        starts = starts.copy()
        starts[rows] = high
        return starts

    def _first_fitting(self, starts: Ints, ends: Ints, replicas: Ints, theta: Floats, behind: Ints) -> Ints:
        """Flat topologies with recomputation: the smallest cut at or after ``starts`` whose input fits as well.

        The input does not shrink with the stage, so every position is tried: shape (E, N+1).
        """
        memory = self.problem.memory
        assert memory is not None
        per_parameter, per_saved, per_input = memory.coefficients((behind + replicas - 1) // replicas, replicas)
        positions = np.arange(self.n_layers + 1)
        peak = (
            per_parameter[:, None] * (self.weights[ends][:, None] - self.weights)
            + per_saved[:, None] * (self.saved[ends][:, None] - self.saved)
            + per_input[:, None] * self.boundary
        )
        fits = (peak <= self.problem.memory_limit) & (self.cut_costs[0] <= theta[:, None] * (1.0 + self.slack))
        fits &= (positions >= starts[:, None]) & (positions < ends[:, None])
        return np.where(fits.any(axis=1), fits.argmax(axis=1), self.n_layers + 1)


def _prefix(values: list[float]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])


def _range_minima(costs: Floats) -> Floats:
    """Row k holds the minima of ``costs`` over [p, p + 2^k); positions past the end count as 0, so a search stops there."""
    size = len(costs)
    rows = [np.concatenate([costs, np.zeros(size + 1)])]
    while 2 ** len(rows) <= size:
        step = 2 ** (len(rows) - 1)
        rows.append(np.minimum(rows[-1], np.concatenate([rows[-1][step:], np.zeros(step)])))
    return np.stack(rows)


def _next_within(minima: Floats, positions: Ints, limits: Floats) -> Ints:
    """Smallest position at or after each of ``positions`` whose cost is within its limit."""
    positions = positions.copy()
    for row in range(len(minima) - 1, -1, -1):
        positions += np.where(minima[row][np.minimum(positions, minima.shape[1] - 1)] > limits, 2**row, 0)
    return positions
