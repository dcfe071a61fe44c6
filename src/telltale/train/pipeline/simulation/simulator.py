"""What a plan will do, second by second: an event-driven simulation of compute, links and all-reduces.

Every worker runs the operations of :mod:`telltale.train.pipeline.schedule` in their order, each as soon as its input is
there; messages queue on the links of :mod:`telltale.train.pipeline.simulation.network`. Contention between compute and copies on
one processor is not modelled.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from telltale.configuration import check_integer, check_range
from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.explanation import arranged
from telltale.train.pipeline.policies import policy_of
from telltale.train.pipeline.profiling.profile import Profile
from telltale.train.pipeline.profiling.topology import Topology
from telltale.train.pipeline.schedule import BACKWARD, FORWARD, UPDATE, Operation, operations
from telltale.train.pipeline.simulation.events import ALL_REDUCE, Event
from telltale.train.pipeline.simulation.interleaved import interleaved_operations
from telltale.train.pipeline.simulation.network import Network
from telltale.train.pipeline.simulation.timeline import StageSizes, Timeline

Order = Sequence[tuple[int, Operation]]
"""(stage, operation) in the order in which one worker runs them."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one stage and one minibatch on one replica."""

    forward: float
    backward: float
    """With the forward run again, if the plan recomputes."""
    update: float
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
    of workers has a link of its own); see :mod:`telltale.train.pipeline.simulation.network`.

    Raises :class:`~telltale.errors.PlanError` if profile or topology do not fit to the plan.
    """
    check_range("overhead", overhead, low=0.0)
    check_integer("start", start, low=0)
    if minibatches is not None:
        check_integer("minibatches", minibatches, low=1)
    workers = plan.workers // plan.chunks
    alignment = plan.microbatches if plan.policy == "interleaved" else policy_of(plan).alignment
    if minibatches is None:
        minibatches = alignment * max(4, math.ceil(8 * workers / alignment))
    costs, sizes = stage_costs(plan, profile)
    machine = _Machine(plan, costs, Network(topology, workers, link_model=link_model), overhead, overlap)
    events = machine.run(orders(plan, start, start + minibatches))
    return Timeline.from_events(events, plan, label="simulated", sizes=sizes)


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
    policy = policy_of(plan)
    return [
        [(stage, operation) for operation in operations(policy, stage, replica, start, stop)]
        for stage, replica in map(plan.place, range(plan.workers))
    ]


def stage_costs(plan: Plan, profile: Profile) -> tuple[tuple[StageCosts, ...], tuple[StageSizes, ...]]:
    """The profile's layers summed over the stages of ``plan``."""
    chain = arranged(profile, plan).layers
    costs, sizes = [], []
    for stage in plan.stages:
        layers = [chain[index] for index in stage.layers]
        forward = math.fsum(layer.forward for layer in layers)
        backward = math.fsum(layer.backward for layer in layers)
        parameters = math.fsum(layer.parameter_bytes for layer in layers)
        costs.append(
            StageCosts(
                forward,
                backward + forward if plan.recompute else backward,
                math.fsum(layer.update for layer in layers),
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
        self, plan: Plan, costs: Sequence[StageCosts], network: Network, overhead: float, overlap: bool
    ) -> None:
        self.plan, self.costs, self.network = plan, costs, network
        self.overhead, self.overlap = overhead, overlap
        self.workers = plan.workers // plan.chunks
        self.events: list[Event] = []
        self.clock = 0.0
        self.done: list[int] = []
        self.running: list[bool] = []
        self.sending: list[bool] = []
        self.arrived: set[tuple[str, int, int]] = set()
        self.at_all_reduce: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        self.queue: list[tuple[float, int, int, tuple[str, int, int] | None]] = []

    def run(self, todo: Sequence[Order]) -> list[Event]:
        """All events of the run. Raises PlanError naming who waits for what if the workers wait for each other."""
        self.todo = todo
        self.done, self.running, self.sending = [0] * len(todo), [False] * len(todo), [False] * len(todo)
        for rank in range(len(todo)):
            self._advance(rank)
        while self.queue:
            self.clock, _, rank, message = heapq.heappop(self.queue)
            if message is not None:
                self.arrived.add(message)
            else:
                self._finish(rank)
            self._advance(rank)
        blocked = [rank for rank, order in enumerate(todo) if self.done[rank] < len(order)]
        if blocked:
            raise PlanError(f"the schedule cannot go on: {'; '.join(self._waiting_for(rank) for rank in blocked)}.")
        return self.events

    def rank(self, stage: int, minibatch: int) -> int:
        """Who runs ``minibatch`` at ``stage``."""
        if self.plan.policy == "interleaved":
            return stage % self.workers
        return self.plan.rank(stage, minibatch % self.plan.replicas[stage])

    def _schedule(self, when: float, rank: int, message: tuple[str, int, int] | None = None) -> None:
        # Arrivals come before the ends of operations of the same instant, then the lower rank.
        heapq.heappush(self.queue, (when, 0 if message else 1, rank, message))

    def _advance(self, rank: int) -> None:
        """Start the next operation of ``rank`` if it is free and the input is there."""
        if self.running[rank] or self.done[rank] == len(self.todo[rank]):
            return
        stage, operation = self.todo[rank][self.done[rank]]
        cost = self.costs[stage]
        if operation.kind == UPDATE:
            self.running[rank] = True
            self._update(rank, stage, operation)
            return
        needed = (operation.kind, stage, operation.minibatch)
        if operation.kind == BACKWARD or stage > 0:
            if needed not in self.arrived:
                return
            self.arrived.remove(needed)
        self.running[rank] = True
        seconds = cost.forward if operation.kind == FORWARD else cost.backward
        self._compute(rank, stage, operation, self.clock, seconds)

    def _compute(self, rank: int, stage: int, operation: Operation, start: float, seconds: float) -> None:
        end = start + self.overhead + seconds
        self.events.append(self._event(rank, stage, operation, start, end))
        self._schedule(end, rank)

    def _event(self, rank: int, stage: int, operation: Operation, start: float, end: float) -> Event:
        replica = self._replica(rank, stage)
        return Event(rank, stage, replica, operation.kind, operation.minibatch, start, end, operation.version)

    def _update(self, rank: int, stage: int, operation: Operation) -> None:
        """Wait for the other replicas; the last one to come starts the all-reduce."""
        cost, count = self.costs[stage], self.plan.replicas[stage]
        if count == 1:
            self._compute(rank, stage, operation, self.clock, cost.update)
            return
        waiting = self.at_all_reduce[stage, operation.version]
        waiting.append((rank, self.clock))
        if len(waiting) < count:
            return
        members = sorted(member for member, _ in waiting)
        _, end = self.network.all_reduce(members, cost.parameter_bytes, self.clock)
        sent = 2 * (count - 1) / count * cost.parameter_bytes
        for member, came in waiting:
            waited = dataclasses.replace(self._event(member, stage, operation, came, end), kind=ALL_REDUCE, bytes=sent)
            self.events.append(waited)
            self._compute(member, stage, operation, end, cost.update)
        del self.at_all_reduce[stage, operation.version]

    def _finish(self, rank: int) -> None:
        """``rank`` is through with something: send what it made; free it at once, or when that has arrived."""
        stage, operation = self.todo[rank][self.done[rank]]
        if operation.kind != UPDATE and not self.sending[rank]:
            arrival = self._send(rank, stage, operation)
            if not self.overlap and arrival > self.clock:
                self.sending[rank] = True
                self._schedule(arrival, rank)
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
        kind = "activation" if forward else "gradient"
        replica = self._replica(rank, stage)
        self.events.append(Event(rank, stage, replica, kind, t, start, arrival, bytes=size, peer=receiver))
        self._schedule(arrival, receiver, message)
        return arrival

    def _replica(self, rank: int, stage: int) -> int:
        return 0 if self.plan.policy == "interleaved" else self.plan.place(rank)[1]

    def _waiting_for(self, rank: int) -> str:
        stage, operation = self.todo[rank][self.done[rank]]
        what = {
            FORWARD: "its activations",
            BACKWARD: "its forward" if stage == len(self.costs) - 1 else "its gradient",
            UPDATE: "the other replicas",
        }[operation.kind]
        return f"rank {rank} (stage {stage}) is at {operation.kind}{operation.minibatch} and waits for {what}"
