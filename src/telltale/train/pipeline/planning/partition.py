"""The hierarchical dynamic program of PipeDream's planner (SOSP'19, section 3.1), solved by its bottleneck.

    A^0(i -> j)    = sum of T_l
    A^k(i -> j, m) = min( T^k(i -> j, m), min over s, m' of max( A^k(i -> s, m-m'), cut_s, T^k(s+1 -> j, m') ) )
    A^k(i -> j, 1) = A^{k-1}(i -> j, m_{k-1}),    answer A^L(1 -> N, m_L), with at most m components in use

A table of A^k needs O(N^3 m^2) steps. All its costs grow with the layers of a stage, though, so for a bottleneck theta
it is enough to know how far back from a position u components can reach: with r replicas a stage ends at a position and
starts as early as theta allows, at an affordable cut, and an earlier start is never worse. One such table costs
O(m^2 log N) per level, and bisection over theta finds the least one for which layer 0 is reached, to a relative 1e-10.

Ties (bottlenecks within 1e-9): the fewest stages, then the most workers (or the fewest, by flag), then the earliest
cuts, then more replicas in earlier stages; with levels these rules hold at each level from the outermost in.

The memory limit is exact on a flat topology: the table goes from the last stage to the first, so the workers behind a
stage, and with them w_s = floor((W_behind + r - 1) / r), are known. With levels the workers behind are counted as if all
components behind were full, and a recomputing stage's input as the largest that it could get, which never lets
through a plan that does not fit but can refuse one that does.

A :class:`Problem` has the chain, the machines, the cost model and the constraints; the answer is a list of stages.
:class:`ReachTable` is the step of the dynamic program, for arrays of positions at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from telltale.train.pipeline.planning.costs import CostModel, MemoryModel, cut_seconds
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.topology import Level

BISECTION_TOLERANCE = 1e-10
TIE_TOLERANCE = 1e-9


def solve(problem: Problem, *, tolerance: float = BISECTION_TOLERANCE) -> list[Part] | None:
    """The stages of the least bottleneck, in order; None if nothing fits into the memory limit.

    ``tolerance``: how far, as a part of it, the bottleneck may be above the least one.
    """
    table = ReachTable(problem)
    low, high = table.bounds()
    if not reaches_start(table, high):
        return None
    while high - low > tolerance * high:
        middle = 0.5 * (low + high)
        if reaches_start(table, middle):
            high = middle
        else:
            low = middle
    table.slack = TIE_TOLERANCE
    return _trace(table, len(problem.levels) - 1, 0, table.n_layers, high, 0, 1)


def reaches_start(table: ReachTable, theta: float) -> bool:
    """Whether a plan with bottleneck ``theta`` exists."""
    top = len(table.problem.levels) - 1
    ends, one = np.array([table.n_layers]), np.ones(1, dtype=np.int64)
    if table.problem.max_stages is not None:
        tables = _by_stages(table, top, table.n_layers, 0, theta, 0, 1)
        return bool((tables[-1][1] <= 0).any())
    return bool(table.cover(top, ends, np.array([theta]), 0 * one, one)[0] == 0)


def _by_stages(
    table: ReachTable, level: int, end: int, start: int, theta: float, behind: int, copies: int
) -> list[tuple[Ints, Ints]]:
    """(cuts, starts) by components in use, for 0, 1, 2, ... stages before ``end``, until one reaches ``start``."""
    count = table.problem.levels[level].count
    cap = min(count, table.problem.max_replicas or count)
    used, replicas = (grid.ravel() for grid in np.meshgrid(np.arange(count + 1), np.arange(1, cap + 1)))
    valid = replicas <= used
    used, replicas = used[valid], replicas[valid]
    nowhere = np.full(count + 1, table.n_layers + 1)
    first = nowhere.copy()
    first[0] = end
    tables = [(first, nowhere)]
    is_top = level == len(table.problem.levels) - 1
    most = min(count, end - start, table.problem.max_stages or count) if is_top else min(count, end - start)
    for _ in range(most):
        starts, cuts = _extend(table, level, tables[-1][0][used - replicas], replicas, used, theta, behind, copies)
        by_starts, by_cuts = nowhere.copy(), nowhere.copy()
        np.minimum.at(by_starts, used, starts)
        np.minimum.at(by_cuts, used, cuts)
        tables.append((by_cuts, by_starts))
        if (by_starts <= start).any():
            break
    return tables


def _extend(
    table: ReachTable, level: int, ends: Ints, replicas: Ints, used: Ints, theta: float, behind: int, copies: int
) -> tuple[Ints, Ints]:
    """:meth:`ReachTable.extend` for runs that share the bottleneck and what is behind them."""
    size = len(ends)
    return table.extend(level, ends, replicas, used, np.full(size, theta), np.full(size, behind), np.full(size, copies))


def _trace(table: ReachTable, level: int, start: int, end: int, theta: float, behind: int, copies: int) -> list[Part]:
    tables = _by_stages(table, level, end, start, theta, behind, copies)
    reaching = np.flatnonzero(tables[-1][1] <= start)
    used = int(reaching[-1] if table.problem.use_all_workers else reaching[0])
    parts: list[Part] = []
    position = start
    for remaining in range(len(tables) - 1, 0, -1):
        cap = min(used, table.problem.max_replicas or used)
        replicas = np.arange(cap, 0, -1)
        stops = tables[remaining - 1][0][used - replicas]
        starts, _ = _extend(table, level, stops, replicas, np.full(cap, used), theta, behind, copies)
        choice = int(np.where(starts <= position, stops, table.n_layers + 1).argmin())
        stop, count = int(stops[choice]), int(replicas[choice])
        after = behind + copies * (used - count) * int(table.workers[level])
        parts += _inside(table, level, position, stop, count, theta, after, copies)
        position, used = stop, used - count
    return parts


def _inside(
    table: ReachTable, level: int, start: int, stop: int, replicas: int, theta: float, behind: int, copies: int
) -> list[Part]:
    if level == 0:
        return [Part(start, stop, replicas * copies)]
    budget = theta * replicas * (1.0 + table.slack)
    if not table.problem.cost_model.overlapped:
        weights = table.weights[stop] - table.weights[start]
        bandwidth = table.problem.levels[level].bandwidth
        exchange = table.problem.cost_model.synchronisation(weights, replicas, bandwidth)
        budget -= float(exchange * table.share(replicas, copies))
    return _trace(table, level - 1, start, stop, budget, behind, copies * replicas)


@dataclass(frozen=True)
class Part:
    """A stage of a partition: layers start..stop-1 on ``replicas`` workers in all."""

    start: int
    stop: int
    replicas: int


@dataclass(frozen=True)
class Problem:
    """A chain, its machines and its constraints."""

    profile: Profile
    levels: tuple[Level, ...]
    cost_model: CostModel
    directions: int = 2
    memory: MemoryModel | None = None
    memory_limit: float = math.inf
    """Bytes of one worker; read only with ``memory``."""
    max_replicas: int | None = None
    """Replicas of a stage at each level; 1 gives a straight pipeline."""
    max_stages: int | None = None
    """Stages at the outermost level."""
    use_all_workers: bool = True
    microbatches: int | None = None
    """One update per that many minibatches: gradients are averaged once per batch. None: once per round of r."""

    @property
    def workers(self) -> int:
        """Product of the counts of all levels."""
        return math.prod(level.count for level in self.levels)


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ReachTable:
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
        self.max_cut_cost = [float(costs.max()) for costs in self.cut_costs]
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
        high = single + max(self.max_cut_cost)
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
        if self.max_cut_cost[level] > theta.min():
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
