"""The hierarchical dynamic program of PipeDream's planner (SOSP'19, section 3.1), solved by its bottleneck.

    A^0(i -> j)    = sum of T_l
    A^k(i -> j, m) = min( T^k(i -> j, m), min over s, m' of max( A^k(i -> s, m-m'), cut_s, T^k(s+1 -> j, m') ) )
    A^k(i -> j, 1) = A^{k-1}(i -> j, m_{k-1}),    answer A^L(1 -> N, m_L), with at most m components in use

A table of A^k needs O(N^3 m^2) steps. All its costs grow with the layers of a stage, though, so for a bottleneck theta
it is enough to know how far back from a position u components can reach: with r replicas a stage ends at a position and
starts as early as theta allows, at an affordable cut, and an earlier start is never worse. One such sweep costs
O(m^2 log N) per level, and bisection over theta finds the least one for which layer 0 is reached, to a relative 1e-10.

Ties (bottlenecks within 1e-9): the fewest stages, then the most workers (or the fewest, by flag), then the earliest
cuts, then more replicas in earlier stages; with levels these rules hold at each level from the outermost in.

The memory limit is exact on a flat topology: the sweep goes from the last stage to the first, so the workers behind a
stage, and with them w_s = floor((W_behind + r - 1) / r), are known. With levels the workers behind are counted as if all
components behind were full, and a recomputing stage's input as the largest that it could get, which never lets
through a plan that does not fit but can refuse one that does.
"""

from __future__ import annotations

import numpy as np

from telltale.train.pipeline.planning.problem import Part, Problem
from telltale.train.pipeline.planning.sweep import Ints, Sweep

BISECTION_TOLERANCE = 1e-10
TIE_TOLERANCE = 1e-9


def solve(problem: Problem, *, tolerance: float = BISECTION_TOLERANCE) -> list[Part] | None:
    """The stages of the least bottleneck, in order; None if nothing fits into the memory limit.

    ``tolerance``: how far, as a part of it, the bottleneck may be above the least one.
    """
    sweep = Sweep(problem)
    low, high = sweep.bounds()
    if not reaches_start(sweep, high):
        return None
    while high - low > tolerance * high:
        middle = 0.5 * (low + high)
        if reaches_start(sweep, middle):
            high = middle
        else:
            low = middle
    sweep.slack = TIE_TOLERANCE
    return _trace(sweep, len(problem.levels) - 1, 0, sweep.n_layers, high, 0, 1)


def reaches_start(sweep: Sweep, theta: float) -> bool:
    """Whether a plan with bottleneck ``theta`` exists."""
    top = len(sweep.problem.levels) - 1
    ends, one = np.array([sweep.n_layers]), np.ones(1, dtype=np.int64)
    if sweep.problem.max_stages is not None:
        tables = _by_stages(sweep, top, sweep.n_layers, 0, theta, 0, 1)
        return bool((tables[-1][1] <= 0).any())
    return bool(sweep.cover(top, ends, np.array([theta]), 0 * one, one)[0] == 0)


def _by_stages(
    sweep: Sweep, level: int, end: int, start: int, theta: float, behind: int, copies: int
) -> list[tuple[Ints, Ints]]:
    """(cuts, starts) by components in use, for 0, 1, 2, ... stages before ``end``, until one reaches ``start``."""
    count = sweep.problem.levels[level].count
    cap = min(count, sweep.problem.max_replicas or count)
    used, replicas = (grid.ravel() for grid in np.meshgrid(np.arange(count + 1), np.arange(1, cap + 1)))
    valid = replicas <= used
    used, replicas = used[valid], replicas[valid]
    nowhere = np.full(count + 1, sweep.n_layers + 1)
    first = nowhere.copy()
    first[0] = end
    tables = [(first, nowhere)]
    is_top = level == len(sweep.problem.levels) - 1
    most = min(count, end - start, sweep.problem.max_stages or count) if is_top else min(count, end - start)
    for _ in range(most):
        starts, cuts = _extend(sweep, level, tables[-1][0][used - replicas], replicas, used, theta, behind, copies)
        by_starts, by_cuts = nowhere.copy(), nowhere.copy()
        np.minimum.at(by_starts, used, starts)
        np.minimum.at(by_cuts, used, cuts)
        tables.append((by_cuts, by_starts))
        if (by_starts <= start).any():
            break
    return tables


def _extend(
    sweep: Sweep, level: int, ends: Ints, replicas: Ints, used: Ints, theta: float, behind: int, copies: int
) -> tuple[Ints, Ints]:
    """:meth:`Sweep.extend` for runs that share the bottleneck and what is behind them."""
    size = len(ends)
    return sweep.extend(level, ends, replicas, used, np.full(size, theta), np.full(size, behind), np.full(size, copies))


def _trace(sweep: Sweep, level: int, start: int, end: int, theta: float, behind: int, copies: int) -> list[Part]:
    tables = _by_stages(sweep, level, end, start, theta, behind, copies)
    reaching = np.flatnonzero(tables[-1][1] <= start)
    used = int(reaching[-1] if sweep.problem.use_all_workers else reaching[0])
    parts: list[Part] = []
    position = start
    for remaining in range(len(tables) - 1, 0, -1):
        cap = min(used, sweep.problem.max_replicas or used)
        replicas = np.arange(cap, 0, -1)
        stops = tables[remaining - 1][0][used - replicas]
        starts, _ = _extend(sweep, level, stops, replicas, np.full(cap, used), theta, behind, copies)
        choice = int(np.where(starts <= position, stops, sweep.n_layers + 1).argmin())
        stop, count = int(stops[choice]), int(replicas[choice])
        after = behind + copies * (used - count) * int(sweep.workers[level])
        parts += _inside(sweep, level, position, stop, count, theta, after, copies)
        position, used = stop, used - count
    return parts


def _inside(
    sweep: Sweep, level: int, start: int, stop: int, replicas: int, theta: float, behind: int, copies: int
) -> list[Part]:
    if level == 0:
        return [Part(start, stop, replicas * copies)]
    budget = theta * replicas * (1.0 + sweep.slack)
    if not sweep.problem.cost_model.overlapped:
        weights = sweep.weights[stop] - sweep.weights[start]
        bandwidth = sweep.problem.levels[level].bandwidth
        exchange = sweep.problem.cost_model.synchronisation(weights, replicas, bandwidth)
        budget -= float(exchange * sweep.share(replicas, copies))
    return _trace(sweep, level - 1, start, stop, budget, behind, copies * replicas)
