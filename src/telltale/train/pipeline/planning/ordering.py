"""In which order to line up the layers of a graph so that its best pipeline is made of consecutive ones.

The planner works on chains. For a graph it first runs the recursion of SOSP'19, section 3.1, on the antichain states
themselves, where a stage is any pair of nested states, and then lines the layers up so that the states of the best
pipeline are prefixes. The memory limit is not part of this step: it is applied to the chain afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from telltale.train.pipeline.graph import antichain_states
from telltale.train.pipeline.planning.costs import CostModel, cut_seconds
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.topology import Level

Floats = npt.NDArray[np.float64]

MAX_STATES = 20_000
"""Graphs with more states than this keep the profile's own order."""
MAX_STEPS = 4e10
"""So do those whose tables would take more steps, which is minutes."""
ROUNDING = 1e-9


def best_order(
    profile: Profile, levels: Sequence[Level], model: CostModel, *, directions: int, upper: float
) -> list[str] | None:
    """Layer names in the order whose chain has the least bottleneck of all orders.

    ``upper`` is the bottleneck of the profile's own order: states whose cut alone takes longer are not looked at. None if
    that order is already the best, or if the graph has too many states for the search.
    """
    workers = math.prod(level.count for level in levels)
    if profile.edges is None or upper <= profile.compute / workers * (1 + ROUNDING):
        return None
    states = antichain_states(len(profile.layers), profile.edges, MAX_STATES)
    if states is None:
        return None
    lattice = _Lattice(profile, states, model, directions)
    lattice.keep_affordable(levels, upper)
    steps = len(lattice.cut_bytes) ** 2 * levels[-1].count ** 2 / 2
    steps += sum(len(lattice.cut_bytes) ** 3 / 3 * level.count**2 / 2 for level in levels[:-1])
    if steps > MAX_STEPS:
        return None
    path = lattice.best_path(levels, upper)
    return lattice.names_along(path) if path else None


class _Lattice:
    """Nested states with the compute, parameters and cut bytes of what lies between them; state 0 is empty."""

    def __init__(self, profile: Profile, states: Sequence[int], model: CostModel, directions: int) -> None:
        n_layers = len(profile.layers)
        self.names = [layer.name for layer in profile.layers]
        self.model, self.directions = model, directions
        self.members = np.zeros((len(states) + 1, n_layers), dtype=np.float32)
        width = (n_layers + 7) // 8
        packed = np.frombuffer(b"".join(state.to_bytes(width, "little") for state in states), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(states), width), axis=1, bitorder="little")
        self.members[1:] = bits[:, :n_layers]
        reads = np.zeros((n_layers, n_layers), dtype=np.float32)
        for source, target in profile.edges or ():
            reads[source, target] = 1.0
        still_read = (1.0 - self.members) @ reads.T > 0
        exact = self.members.astype(np.float64)
        self.compute = exact @ np.array([layer.compute for layer in profile.layers])
        self.weights = exact @ np.array([layer.parameter_bytes for layer in profile.layers])
        self.cut_bytes = (exact * still_read) @ np.array([layer.activation_bytes for layer in profile.layers])

    def keep_affordable(self, levels: Sequence[Level], upper: float) -> None:
        """Drop states that cannot be a cut at any level of a plan as fast as ``upper``."""
        keep = np.zeros(len(self.cut_bytes), dtype=bool)
        copies = 1
        for level in reversed(levels):
            seconds = cut_seconds(self.cut_bytes, level.bandwidth, self.directions)
            keep |= seconds <= upper * copies * (1 + ROUNDING)
            copies *= level.count
        keep[0] = keep[-1] = True
        self.members, self.compute = self.members[keep], self.compute[keep]
        self.weights, self.cut_bytes = self.weights[keep], self.cut_bytes[keep]

    def best_path(self, levels: Sequence[Level], upper: float) -> list[int] | None:
        """States of the best pipeline, from the empty one to the last; None if none is faster than ``upper``."""
        nested = (self.members @ (1.0 - self.members).T) == 0
        np.fill_diagonal(nested, False)
        # Layers without cost can make two states equal in size of work; the smaller one still comes first.
        inner: Floats = np.where(nested, self.compute[None, :] - self.compute[:, None], np.inf)
        between: Floats = np.where(nested, self.weights[None, :] - self.weights[:, None], 0.0)
        copies = math.prod(level.count for level in levels)
        tables = []
        for level in levels[:-1]:
            copies //= level.count
            tables.append(inner)
            inner = self._all_pairs(inner, between, level, upper * copies * (1 + ROUNDING))
        tables.append(inner)
        path = self._path(len(levels) - 1, 0, len(self.compute) - 1, levels, tables, between)
        return None if path is None or path[1] >= upper * (1 - ROUNDING) else path[0]

    def _all_pairs(self, inner: Floats, between: Floats, level: Level, limit: float) -> Floats:
        """A^k(i -> j, m_k) for all nested pairs; entries above ``limit`` may be infinite."""
        stages = [self._stage(inner, between, count, level.bandwidth) for count in range(1, level.count + 1)]
        cuts = cut_seconds(self.cut_bytes, level.bandwidth, self.directions)
        best = [stages[0]]
        for used in range(2, level.count + 1):
            table = np.minimum(best[-1], stages[used - 1])
            for last in range(1, used):
                before, stage = np.maximum(best[used - last - 1], cuts[None, :]), stages[last - 1]
                for start in range(len(table)):
                    splits = np.flatnonzero(before[start] <= limit)
                    if len(splits):
                        first = splits[0] + 1
                        found = np.maximum(before[start, splits][:, None], stage[splits, first:]).min(axis=0)
                        np.minimum(table[start, first:], found, out=table[start, first:])
            best.append(table)
        return best[-1]

    def _path(
        self,
        number: int,
        start: int,
        stop: int,
        levels: Sequence[Level],
        tables: Sequence[Floats],
        between: Floats,
    ) -> tuple[list[int], float] | None:
        """The states on the best pipeline from ``start`` to ``stop`` on one level's components, and its bottleneck."""
        level, inner = levels[number], tables[number]
        cuts = cut_seconds(self.cut_bytes, level.bandwidth, self.directions)
        cuts[start] = 0.0
        inside = np.flatnonzero(np.isfinite(inner[start]) & np.isfinite(inner[:, stop]))
        nodes = np.concatenate([[start], inside, [stop]])
        grid = np.ix_(nodes, nodes)
        stages = [
            self._stage(inner[grid], between[grid], count, level.bandwidth) for count in range(1, level.count + 1)
        ]
        reach = [np.full(len(nodes), np.inf)]
        reach[0][0] = 0.0
        came: list[list[tuple[int, int]]] = [[(0, 0)] * len(nodes)]
        for used in range(1, level.count + 1):
            values, sources = np.full(len(nodes), np.inf), [(0, 0)] * len(nodes)
            for last in range(1, used + 1):
                before = np.maximum(reach[used - last], cuts[nodes])
                rows = np.flatnonzero(np.isfinite(before))
                if not len(rows):
                    continue
                joined = np.maximum(before[rows][:, None], stages[last - 1][rows])
                chosen = joined.argmin(axis=0)
                found = joined[chosen, np.arange(len(nodes))]
                for better in np.flatnonzero(found < values):
                    sources[better] = (int(rows[chosen[better]]), last)
                values = np.minimum(values, found)
            reach.append(values)
            came.append(sources)
        used = int(np.argmin([values[-1] for values in reach]))
        bottleneck = float(reach[used][-1])
        if not math.isfinite(bottleneck):
            return None
        path, node = [stop], len(nodes) - 1
        while node:
            source, last = came[used][node]
            if number:
                within = self._path(number - 1, int(nodes[source]), int(nodes[node]), levels, tables, between)
                path += within[0][-2:0:-1] if within else []
            node, used = source, used - last
            path.append(int(nodes[node]))
        return path[::-1], bottleneck

    def _stage(self, inner: Floats, between: Floats, copies: int, bandwidth: float) -> Floats:
        return np.asarray(self.model.stage_seconds(inner, between, copies, bandwidth))

    def names_along(self, path: Sequence[int]) -> list[str]:
        """All layer names, by the first state of the path that holds them and then by their place in the profile."""
        first = self.members[np.asarray(path)].argmax(axis=0)
        return [self.names[index] for index in np.argsort(first, kind="stable")]
