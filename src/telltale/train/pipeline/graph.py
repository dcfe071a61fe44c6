"""Graphs of layers: topological order, what crosses a cut, and antichain states (PipeDream, SOSP'19, section 3.1).

A cut of a graph puts a set of layers that holds all its own predecessors (an ideal) before it and the rest behind it.
The ideal is named by its last layers, an antichain, so the official optimizer calls these cuts antichain states. This
module knows indices and edges only; times and bytes belong to :mod:`telltale.train.pipeline.profile`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from telltale.errors import DataError

Edge = tuple[int, int]


def topological_order(n_nodes: int, edges: Iterable[Edge], names: Sequence[str] | None = None) -> list[int]:
    """Node indices so that every edge goes forward; among free nodes the smallest index comes first.

    Raises :class:`~telltale.errors.DataError` naming the nodes of a cycle.
    """
    readers = readers_of(n_nodes, edges)
    waiting = [0] * n_nodes
    for targets in readers:
        for target in targets:
            waiting[target] += 1
    free = [node for node in range(n_nodes) if waiting[node] == 0]
    order = []
    while free:
        node = heapq.heappop(free)
        order.append(node)
        for target in readers[node]:
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(free, target)
    if len(order) < n_nodes:
        stuck = [node for node in range(n_nodes) if waiting[node] > 0]
        shown = ", ".join(str(names[node]) if names else str(node) for node in stuck[:4])
        raise DataError(f"the layers {shown} form or follow a cycle; expected a graph without cycles.")
    return order


def readers_of(n_nodes: int, edges: Iterable[Edge]) -> list[list[int]]:
    """For every node, the nodes that read its output."""
    readers: list[list[int]] = [[] for _ in range(n_nodes)]
    for source, target in edges:
        readers[source].append(target)
    return readers


def ancestors(n_nodes: int, edges: Iterable[Edge]) -> list[int]:
    """For every node, a bit mask of itself and all it depends on. Nodes must be in topological order."""
    masks = [1 << node for node in range(n_nodes)]
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        masks[target] |= masks[source]
    return masks


def crossing_bytes(order: Sequence[int], edges: Iterable[Edge], output_bytes: Sequence[float]) -> list[float]:
    """Bytes that cross the cut after each position of ``order``: outputs of nodes before it with a reader behind it.

    A tensor that several later layers read crosses once. The last entry is the last node's own output.
    """
    readers = readers_of(len(order), edges)
    position = {node: place for place, node in enumerate(order)}
    change = [0.0] * (len(order) + 1)
    for node, targets in enumerate(readers):
        if targets:
            change[position[node]] += output_bytes[node]
            change[max(position[target] for target in targets)] -= output_bytes[node]
    crossing, alive = [], 0.0
    for place in range(len(order) - 1):
        alive += change[place]
        crossing.append(max(alive, 0.0))
    return [*crossing, float(output_bytes[order[-1]])]


def antichain_states(n_nodes: int, edges: Sequence[Edge], limit: int | None = None) -> list[int] | None:
    """Every cut of the graph as a bit mask of the layers before it, from the first layer alone to the whole graph.

    As in the official optimizer, enumeration starts at the first layer and adds a reader of a finished layer together
    with all that the reader needs; a second source therefore comes in with its first reader. With one source these
    are all non-empty ideals. Sorted by size, then by mask, so every state comes after those it contains. None if
    there are more than ``limit``. Nodes must be in topological order.
    """
    needs = ancestors(n_nodes, edges)
    readers = readers_of(n_nodes, edges)
    everything = (1 << n_nodes) - 1
    first = 1
    seen = {first}
    frontier: dict[int, tuple[int, ...]] = {first: tuple(readers[0])}
    while frontier:
        following: dict[int, tuple[int, ...]] = {}
        for state, candidates in frontier.items():
            for node in candidates:
                grown = state | needs[node]
                if grown in seen:
                    continue
                seen.add(grown)
                if limit is not None and len(seen) > limit:
                    return None
                following[grown] = _open_readers(grown, grown & ~state, candidates, readers)
        frontier = following
    seen.add(everything)
    return sorted(seen, key=lambda state: (state.bit_count(), state))


def _open_readers(
    state: int, added: int, candidates: Sequence[int], readers: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Nodes outside ``state`` that read a node in it: the earlier candidates and the readers of what was added."""
    found = {node for node in candidates if not state >> node & 1}
    while added:
        lowest = added & -added
        found.update(node for node in readers[lowest.bit_length() - 1] if not state >> node & 1)
        added ^= lowest
    return tuple(sorted(found))
