"""What a plan will do, second by second: an event-driven simulation of compute, links and all-reduces.

Every worker runs the operations of :mod:`telltale.train.pipeline.schedule` in their order, each as soon as its input is
there; messages queue on the links, first come, first served. Contention between compute and copies on one processor is not
modelled.

A message between two workers runs at the bandwidth of the innermost level whose component holds both. It occupies that
level's ports: the outgoing port of the sender's component and the incoming port of the receiver's, where a component is
a worker at the innermost level and a whole group of workers (a server with one network card) further out. Both
directions are independent, unless the topology has one shared link. Workers fill the innermost components first.

A profile can be scaled to a recorded run, so that the simulator's model can be checked alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from statistics import fmean

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import DataError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.profile import LayerProfile, Profile, arranged
from telltale.train.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    UPDATE,
    Operation,
    Policy,
    interleaved_operations,
    operations,
    policy_of,
)
from telltale.train.pipeline.simulation.timeline import ALL_REDUCE, Event, StageSizes, Timeline, steady_seconds
from telltale.train.pipeline.topology import Topology

Order = Sequence[tuple[int, Operation]]
"""(stage, operation) in the order in which one worker runs them."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one stage and one minibatch on one replica."""

    forward: float
    backward: float
    """With the forward run again, if the plan recomputes."""
    update: float
    """With the copy of the weights to fresh storage, where the policy keeps older versions."""
    output_bytes: float
    parameter_bytes: float


def simulate(
    plan: Plan,
    profile: Profile,
    topology: Topology,
    *,
    minibatches: int | None = None,
    start: int = 0,
    overhead: float = 0.0,
    overlap: bool = True,
    link_model: str = "port",
) -> Timeline:
    """The timeline of ``plan`` over ``minibatches`` of them from number ``start`` on, drained at the end.

    ``minibatches=None`` takes enough for a steady state: four batches or rounds, and eight per worker. ``overhead`` is
    seconds of the host per operation. ``overlap=False`` makes every worker wait until what it sent has arrived, as
    torch's ``Schedule1F1B`` does. ``link_model`` is "port" (a worker's messages share its port) or "pair" (every pair
    of workers has a link of its own); see :mod:`telltale.train.pipeline.simulation.simulator`.

    Raises :class:`~telltale.errors.PlanError` if profile or topology do not fit to the plan.
    """
    check_range("overhead", overhead, low=0.0)
    check_integer("start", start, low=0)
    if minibatches is not None:
        check_integer("minibatches", minibatches, low=1)
    costs, sizes = stage_costs(plan, profile)
    network = Network(topology, plan.workers // plan.chunks, link_model=link_model)
    machine = _Machine(plan, costs, network, overhead, overlap)
    machine.run(orders(plan, start, start + (minibatches or _enough(plan))))
    return Timeline.from_events(machine.events or (), plan, label="simulated", sizes=sizes)


def simulated_seconds(plan: Plan, profile: Profile, topology: Topology, *, minibatches: int | None = None) -> float:
    """``simulate(...).seconds_per_minibatch``, without a timeline: what a search over many plans asks for."""
    network = Network(topology, plan.workers // plan.chunks)
    machine = _Machine(plan, stage_costs(plan, profile)[0], network, 0.0, True, keep_events=False)
    machine.run(orders(plan, 0, minibatches or _enough(plan)))
    return steady_seconds(machine.ends, _alignment(plan), machine.last_end)


def _alignment(plan: Plan) -> int:
    return plan.microbatches if plan.policy == "interleaved" else policy_of(plan).alignment


def _enough(plan: Plan) -> int:
    """Minibatches until a steady state: four batches or rounds, and eight per worker."""
    alignment = _alignment(plan)
    return alignment * max(4, math.ceil(8 * (plan.workers // plan.chunks) / alignment))


def orders(plan: Plan, start: int, stop: int) -> list[Order]:
    """What every worker runs for the minibatches [start, stop), by rank."""
    if plan.policy == "interleaved":
        workers = plan.workers // plan.chunks
        if plan.workers % plan.chunks or set(plan.replicas) != {1}:
            raise PlanError(
                f"the interleaved plan {plan.describe()} has {plan.chunks} chunks per worker; expected one replica per "
                f"stage and a multiple of {plan.chunks} stages."
            )
        return [
            interleaved_operations(workers, plan.chunks, plan.microbatches, worker, start, stop)
            for worker in range(workers)
        ]
    by_place = _orders(policy_of(plan), start, stop)
    return [by_place[plan.place(rank)] for rank in range(plan.workers)]


@lru_cache(maxsize=32)
def _orders(policy: Policy, start: int, stop: int) -> dict[tuple[int, int], Order]:
    """By (stage, replica); plans that differ in their cuts alone share them."""
    return {
        (stage, replica): [(stage, operation) for operation in operations(policy, stage, replica, start, stop)]
        for stage, count in enumerate(policy.replicas)
        for replica in range(count)
    }


def stage_costs(plan: Plan, profile: Profile) -> tuple[tuple[StageCosts, ...], tuple[StageSizes, ...]]:
    """The profile's layers summed over the stages of ``plan``."""
    chain = arranged(profile, plan).layers
    costs, sizes = [], []
    policy = None if plan.policy == "interleaved" else policy_of(plan)
    for number, stage in enumerate(plan.stages):
        layers = [chain[index] for index in stage.layers]
        copied = policy is not None and policy.versions_held(number) > 1
        forward = math.fsum(layer.forward for layer in layers)
        backward = math.fsum(layer.backward for layer in layers)
        parameters = math.fsum(layer.parameter_bytes for layer in layers)
        costs.append(
            StageCosts(
                forward,
                backward + forward if plan.recompute else backward,
                math.fsum(layer.update + (layer.version if copied else 0.0) for layer in layers),
                layers[-1].activation_bytes,
                parameters,
            )
        )
        sizes.append(
            StageSizes(
                parameters,
                math.fsum(layer.saved_bytes for layer in layers),
                chain[stage.layers[0] - 1].activation_bytes if stage.layers[0] else 0.0,
                parameters * profile.optimizer_bytes_per_parameter_byte,
            )
        )
    return tuple(costs), tuple(sizes)


class _Machine:
    """The workers' program counters, what has arrived where, and the queue of things that will happen."""

    def __init__(
        self,
        plan: Plan,
        costs: Sequence[StageCosts],
        network: Network,
        overhead: float,
        overlap: bool,
        *,
        keep_events: bool = True,
    ) -> None:
        self.plan, self.costs, self.network = plan, costs, network
        self.overhead, self.overlap = overhead, overlap
        self.workers = plan.workers // plan.chunks
        self._counts = plan.replicas
        self._interleaved = plan.policy == "interleaved"
        self._ranks = [
            [plan.rank(stage, replica) for replica in range(count)] for stage, count in enumerate(self._counts)
        ]
        self._replicas = [0 if self._interleaved else plan.place(rank)[1] for rank in range(self.workers)]
        self._seconds = [
            {FORWARD: overhead + cost.forward, BACKWARD: overhead + cost.backward, UPDATE: overhead + cost.update}
            for cost in costs
        ]
        self.events: list[Event] | None = [] if keep_events else None
        self.ends: list[tuple[int, float]] = []
        """(minibatch, second) of the backwards through the first stage."""
        self.last_end = 0.0
        self.clock = 0.0
        self.done: list[int] = []
        self.running: list[bool] = []
        self.sending: list[bool] = []
        self.arrived: set[tuple[str, int, int]] = set()
        self.at_all_reduce: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        self.queue: list[tuple[float, int, int, tuple[str, int, int] | None]] = []

    def run(self, todo: Sequence[Order]) -> None:
        """All of ``todo``. Raises PlanError naming who waits for what if the workers wait for each other."""
        self.todo = todo
        self.done, self.running, self.sending = [0] * len(todo), [False] * len(todo), [False] * len(todo)
        queue, running = self.queue, self.running
        for rank in range(len(todo)):
            self._advance(rank)
        while queue:
            self.clock, _, rank, message = heappop(queue)
            if message is not None:
                self.arrived.add(message)
                if running[rank]:
                    continue
            else:
                self._finish(rank)
            self._advance(rank)
        blocked = [rank for rank, order in enumerate(todo) if self.done[rank] < len(order)]
        if blocked:
            raise PlanError(f"the schedule cannot go on: {'; '.join(self._waiting_for(rank) for rank in blocked)}.")

    def rank(self, stage: int, minibatch: int) -> int:
        """Who runs ``minibatch`` at ``stage``."""
        if self._interleaved:
            return stage % self.workers
        return self._ranks[stage][minibatch % self._counts[stage]]

    def _advance(self, rank: int) -> None:
        """Start the next operation of ``rank`` if it is free and the input is there."""
        if self.running[rank] or self.done[rank] == len(self.todo[rank]):
            return
        stage, operation = self.todo[rank][self.done[rank]]
        kind = operation.kind
        if kind == UPDATE:
            self.running[rank] = True
            self._update(rank, stage, operation)
            return
        if kind == BACKWARD or stage > 0:
            needed = (kind, stage, operation.minibatch)
            if needed not in self.arrived:
                return
            self.arrived.remove(needed)
        self.running[rank] = True
        self._compute(rank, stage, operation, self.clock)

    def _compute(self, rank: int, stage: int, operation: Operation, start: float) -> None:
        end = start + self._seconds[stage][operation.kind]
        if end > self.last_end:
            self.last_end = end
        if stage == 0 and operation.kind == BACKWARD:
            self.ends.append((operation.minibatch, end))
        if self.events is not None:
            self.events.append(self._event(rank, stage, operation, start, end))
        # Arrivals come before the ends of operations of the same instant, then the lower rank.
        heappush(self.queue, (end, 1, rank, None))

    def _event(self, rank: int, stage: int, operation: Operation, start: float, end: float) -> Event:
        replica = self._replicas[rank]
        return Event(rank, stage, replica, operation.kind, operation.minibatch, start, end, operation.version)

    def _update(self, rank: int, stage: int, operation: Operation) -> None:
        """Wait for the other replicas; the last one to come starts the all-reduce."""
        cost, count = self.costs[stage], self._counts[stage]
        if count == 1:
            self._compute(rank, stage, operation, self.clock)
            return
        waiting = self.at_all_reduce[stage, operation.version]
        waiting.append((rank, self.clock))
        if len(waiting) < count:
            return
        members = sorted(member for member, _ in waiting)
        _, end = self.network.all_reduce(members, cost.parameter_bytes, self.clock)
        sent = 2 * (count - 1) / count * cost.parameter_bytes
        for member, came in waiting:
            if self.events is not None:
                event = self._event(member, stage, operation, came, end)
                self.events.append(dataclasses.replace(event, kind=ALL_REDUCE, bytes=sent))
            self._compute(member, stage, operation, end)
        del self.at_all_reduce[stage, operation.version]

    def _finish(self, rank: int) -> None:
        """``rank`` is through with something: send what it made; free it at once, or when that has arrived."""
        stage, operation = self.todo[rank][self.done[rank]]
        if operation.kind != UPDATE and not self.sending[rank]:
            arrival = self._send(rank, stage, operation)
            if not self.overlap and arrival > self.clock:
                self.sending[rank] = True
                heappush(self.queue, (arrival, 1, rank, None))
                return
        self.running[rank] = self.sending[rank] = False
        self.done[rank] += 1

    def _send(self, rank: int, stage: int, operation: Operation) -> float:
        """Pass on the result of F or B; returns when the receiver has it."""
        t, forward = operation.minibatch, operation.kind == FORWARD
        if forward and stage == len(self.costs) - 1:
            self.arrived.add((BACKWARD, stage, t))
            return self.clock
        target = stage + 1 if forward else stage - 1
        if target < 0:
            return self.clock
        receiver = self.rank(target, t)
        message = (operation.kind, target, t)
        if receiver == rank:
            self.arrived.add(message)
            return self.clock
        size = self.costs[min(stage, target)].output_bytes
        start, arrival = self.network.send(rank, receiver, size, self.clock)
        if arrival > self.last_end:
            self.last_end = arrival
        if self.events is not None:
            kind = "activation" if forward else "gradient"
            replica = self._replicas[rank]
            self.events.append(Event(rank, stage, replica, kind, t, start, arrival, bytes=size, peer=receiver))
        heappush(self.queue, (arrival, 0, receiver, message))
        return arrival

    def _waiting_for(self, rank: int) -> str:
        stage, operation = self.todo[rank][self.done[rank]]
        what = {
            FORWARD: "its activations",
            BACKWARD: "its forward" if stage == len(self.costs) - 1 else "its gradient",
            UPDATE: "the other replicas",
        }[operation.kind]
        return f"rank {rank} (stage {stage}) is at {operation.kind}{operation.minibatch} and waits for {what}"


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
        free, start = self._free, now
        for port in ports:
            until = free.get(port, 0.0)
            if until > start:
                start = until
        end = start + seconds
        for port in ports:
            free[port] = end
        return start, end + latency

    def _route(self, sender: int, receiver: int) -> tuple[float, tuple[Hashable, ...]]:
        known = self._routes.get((sender, receiver))
        if known is None:
            level = self.level(sender, receiver)
            below = self._sizes[level]
            ports: tuple[Hashable, ...]
            if self.topology.shared_link:
                ports = ("shared",)
            elif self.link_model == "pair" and level == 0:
                ports = ((sender, receiver),)
            else:
                ports = (("out", level, sender // below), ("in", level, receiver // below))
            known = self._routes[sender, receiver] = self.topology.levels[level].bandwidth, ports
        return known


def calibrated(profile: Profile, timeline: Timeline, plan: Plan, *, topology: Topology | None = None) -> Profile:
    """``profile`` with every stage's forward, backward and update scaled to their means in ``timeline``.

    The update of a replicated stage was recorded with the all-reduce in it. Its time, as the simulator predicts it on
    ``topology``, is taken off; without ``topology`` the profile's own update stays. Raises
    :class:`~telltale.errors.DataError` if a stage has no recorded forward or backward.
    """
    chain = arranged(profile, plan)
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    updates: dict[tuple[int, int], list[float]] = defaultdict(list)
    for lane in timeline.computing:
        for event in lane:
            if event.kind == "U":
                updates[event.stage, event.version or 0].append(event.seconds)
            else:
                seconds[event.stage, event.kind].append(event.seconds)
    for (stage_number, _), waits in updates.items():
        # The replica that came last did not wait for the others.
        seconds[stage_number, "U"].append(min(waits))
    layers = list(chain.layers)
    for number, stage in enumerate(plan.stages):
        if not (seconds[number, "F"] and seconds[number, "B"]):
            raise DataError(f"stage {number} has no recorded forward and backward; expected a run of this plan.")
        own = [layers[index] for index in stage.layers]
        forward, backward = fmean(seconds[number, "F"]), fmean(seconds[number, "B"])
        if plan.recompute:
            backward = max(0.0, backward - forward)
        figures = {"forward": forward, "backward": backward}
        if seconds[number, "U"]:
            step = fmean(seconds[number, "U"])
            # What was recorded has the copy of the weights in it.
            if stage.replicas == 1:
                figures |= {"update": step, "version": 0.0}
            elif topology is not None:
                reduced = _all_reduce_seconds(plan, number, own, topology)
                figures |= {"update": max(0.0, step - reduced), "version": 0.0}
        for index, layer in zip(stage.layers, _scaled(own, figures), strict=True):
            layers[index] = layer
    return dataclasses.replace(chain, layers=tuple(layers), step_seconds=None)


def _all_reduce_seconds(plan: Plan, stage: int, layers: list[LayerProfile], topology: Topology) -> float:
    ranks = [plan.rank(stage, replica) for replica in range(plan.stages[stage].replicas)]
    return Network(topology, plan.workers).all_reduce(ranks, sum(layer.parameter_bytes for layer in layers), 0.0)[1]


def _scaled(layers: list[LayerProfile], figures: dict[str, float]) -> list[LayerProfile]:
    """Layers whose figures sum to ``figures``: in their old proportions, or equally if they were all zero."""
    for field, total in figures.items():
        before = sum(getattr(layer, field) for layer in layers)
        shares = [getattr(layer, field) / before if before else 1 / len(layers) for layer in layers]
        layers = [
            dataclasses.replace(layer, **{field: total * share})  # type: ignore[arg-type]
            for layer, share in zip(layers, shares, strict=True)
        ]
    return layers
