"""Who waits for whom on the wires: messages between workers of a topology, first come, first served.

A message between two workers runs at the bandwidth of the innermost level whose component holds both. It occupies that
level's ports: the outgoing port of the sender's component and the incoming port of the receiver's, where a component is
a worker at the innermost level and a whole group of workers (a server with one network card) further out. Both
directions are independent, unless the topology has one shared link. Workers fill the innermost components first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from telltale.configuration import check_choice
from telltale.errors import PlanError
from telltale.train.pipeline.profiling.topology import Topology

LINK_MODELS = ("port", "pair")


class Network:
    """The state of all links. ``link_model="pair"`` gives every pair of workers in a component a link of its own.

    Requests must come in the order of their times.
    """

    def __init__(self, topology: Topology, workers: int, *, link_model: str = "port") -> None:
        check_choice("link_model", link_model, LINK_MODELS)
        if workers > topology.workers:
            raise PlanError(f"the plan has {workers} workers; expected at most the topology's {topology.workers}.")
        self.topology, self.link_model = topology, link_model
        self._sizes = [1]
        for level in topology.levels:
            self._sizes.append(self._sizes[-1] * level.count)
        self._free: dict[Hashable, float] = {}
        self._routes: dict[tuple[int, int], tuple[float, tuple[Hashable, ...]]] = {}

    def level(self, first: int, second: int) -> int:
        """Index of the innermost level that joins two workers."""
        return next(number for number, size in enumerate(self._sizes[1:]) if first // size == second // size)

    def send(self, sender: int, receiver: int, size: float, now: float) -> tuple[float, float]:
        """Send ``size`` bytes, ready at ``now``: (second it gets onto the link, second all of it is there)."""
        bandwidth, ports = self._route(sender, receiver)
        return self._occupy(ports, size / bandwidth, self.topology.latency, now)

    def all_reduce(self, workers: Sequence[int], size: float, now: float) -> tuple[float, float]:
        """A ring all-reduce of ``size`` bytes: each of the m workers sends 2 (m - 1) / m times as much.

        Runs at the slowest bandwidth that the ring crosses; on a shared link all that is sent goes through one pipe.
        """
        count = len(workers)
        routes = [self._route(workers[index - 1], worker) for index, worker in enumerate(workers)]
        bandwidth = min(route[0] for route in routes)
        ports = tuple(dict.fromkeys(port for route in routes for port in route[1]))
        sent = 2 * (count - 1) / count * size * (count if self.topology.shared_link else 1)
        return self._occupy(ports, sent / bandwidth, 2 * (count - 1) * self.topology.latency, now)

    def _occupy(self, ports: tuple[Hashable, ...], seconds: float, latency: float, now: float) -> tuple[float, float]:
        start = max(now, *(self._free.get(port, 0.0) for port in ports))
        for port in ports:
            self._free[port] = start + seconds
        return start, start + seconds + latency

    def _route(self, sender: int, receiver: int) -> tuple[float, tuple[Hashable, ...]]:
        if (sender, receiver) not in self._routes:
            level = self.level(sender, receiver)
            below = self._sizes[level]
            ports: tuple[Hashable, ...]
            if self.topology.shared_link:
                ports = ("shared",)
            elif self.link_model == "pair" and level == 0:
                ports = ((sender, receiver),)
            else:
                ports = (("out", level, sender // below), ("in", level, receiver // below))
            self._routes[sender, receiver] = self.topology.levels[level].bandwidth, ports
        return self._routes[sender, receiver]
