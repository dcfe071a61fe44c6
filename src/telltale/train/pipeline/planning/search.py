"""From the dynamic program's proposals to the plan that runs fastest: the simulator ranks them.

The papers' cost models are bounds on one stage or cut at a time. They hide gradient averaging behind the backward, which
``PipelineTrainer`` does not; in levels they replicate whole components only; and they know nothing of the stalls of unequal
replicas. So they propose shapes (cuts and replicas), each model on the machines as they are and on flat ones, the simulator
runs each shape as the trainer would, and the fastest are improved as long as a neighbour is faster: a cut one layer further, a
replica moved, two stages joined, a stage split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.candidates import (
    Candidate,
    best_candidate,
    enough_microbatches,
    finish,
    fits,
    flattened,
    microbatches_for,
)
from telltale.train.pipeline.planning.costs import COST_MODELS
from telltale.train.pipeline.planning.partition import Part, Problem
from telltale.train.pipeline.schedule import BY_ROUND, policy_of
from telltale.train.pipeline.simulation.simulator import simulated_seconds
from telltale.train.pipeline.topology import Topology

IMPROVED = 3
"""Proposals that are improved step by step."""
SIMULATED = 160
"""Shapes simulated under one policy after which no further step is taken, on up to 16 workers; fewer on more."""
MOST_WORKERS = 64
"""Machines of more workers are planned by a cost model: one simulation of them takes seconds."""
CONFIRMED = 4
"""Fastest shapes of the search, which simulates short runs, that are compared on long ones."""
SAME = 1e-6
"""Relative difference of simulated times below which the simpler plan is taken."""

EDGE = 0.01
"""How far the middle of a short simulated run may be below what no long run is below."""

Shape = tuple[tuple[int, int], ...]
"""(first layer after the stage, replicas) of every stage."""


@lru_cache(maxsize=256)
def proposed(problem: Problem, policy: str, microbatches: int | None, *, recompute: bool) -> Shape | None:
    """The dynamic program's shape for ``problem``; the searches of one plan ask for the same ones."""
    found = best_candidate(problem, policy, microbatches=microbatches, recompute=recompute)
    return None if found is None else shape_of(found.plan)


@dataclass
class SimulatedSearch:
    """The fastest plans under one policy. ``problem`` has a chain profile; ``topology`` is what the simulator runs on."""

    problem: Problem
    topology: Topology
    policy: str
    microbatches: int | None
    recompute: bool
    stages: int | None = None
    """Exactly so many stages; None: as many as are fastest."""

    def __post_init__(self) -> None:
        self._known: dict[Shape, Candidate | None] = {}
        layers = self.problem.profile.layers
        columns = zip(*((one.forward, one.compute, one.update, one.parameter_bytes) for one in layers), strict=True)
        self._sums = [list(accumulate(column, initial=0.0)) for column in columns]
        """Of the layers before each: seconds of forwards, of forwards and backwards, of updates, bytes of parameters."""

    def best(self) -> Candidate | None:
        """The fastest plan found; None if no proposal fits into the memory limit."""
        found = self._fastest([*self._balanced(), *self._proposals(), *self._pairs()])
        for candidate in sorted(found, key=self._rank)[:IMPROVED]:
            self._improve(candidate)
        known = sorted((one for one in self._known.values() if one is not None), key=self._rank)
        return min(map(self._confirmed, known[:CONFIRMED]), key=self._rank, default=None)

    def _fastest(self, shapes: list[Shape]) -> list[Candidate]:
        """The fitting ones of ``shapes``; those that cannot be among the fastest are not simulated."""
        found: list[Candidate] = []
        for shape in sorted(dict.fromkeys(shapes), key=self._at_least):
            slowest = sorted(one.seconds for one in found)[IMPROVED - 1 : IMPROVED]
            if slowest and self._at_least(shape) > slowest[0] * (1 + EDGE):
                break
            candidate = self.simulated(shape)
            if candidate is not None:
                found.append(candidate)
        return found

    def _balanced(self) -> Iterator[Shape]:
        """Where the number of stages is given: that many, with replicas as even as they can be, first or last stages having more,
        each stage with its share of the compute."""
        count, layers = self.stages, len(self.problem.profile.layers)
        if count is None:
            return
        most = (self.problem.max_replicas or self.problem.workers) * count
        each, more = divmod(min(self.problem.workers, most), count)
        before = self._sums[1]
        for ahead in (True, False):
            replicas = [each + ((n < more) if ahead else (n >= count - more)) for n in range(count)]
            shares = list(accumulate(replicas))
            stops: list[int] = []
            for number, share in enumerate(shares[:-1]):
                wanted = before[-1] * share / shares[-1]
                low, high = (stops[-1] if stops else 0) + 1, layers - (count - 1 - number)
                stops.append(min(range(low, high + 1), key=lambda stop: abs(before[stop] - wanted)))
            yield _shape([*stops, layers], replicas)

    def _at_least(self, shape: Shape) -> float:
        """Seconds per minibatch that no long run of ``shape`` is below: what the busiest worker computes and waits for in
        all-reduces."""
        starts = [0, *(stop for stop, _ in shape)]
        replicas = tuple(count for _, count in shape)
        m = microbatches_for(self.policy, replicas, self.microbatches, self.problem.workers)
        by_round = self.policy in BY_ROUND
        bandwidth = max(level.bandwidth for level in self.topology.levels)
        least = 0.0
        for low, (high, count) in zip(starts, shape, strict=False):
            forward, both, update, weights = (column[high] - column[low] for column in self._sums)
            wait = 2 * (count - 1) / count * weights / bandwidth if count > 1 else 0.0
            computing = both + (forward if self.recompute else 0.0)
            least = max(least, computing / count + (update + wait) / (count if by_round else max(m, count)))
        return least

    def proposal(self) -> Candidate | None:
        """The dynamic program's own shape for the problem's cost model, with its simulated time; None if nothing fits."""
        shape = proposed(self.problem, self.policy, self.microbatches, recompute=self.recompute)
        found = None if shape is None else self.simulated(shape)
        return None if found is None else self._confirmed(found)

    def _pairs(self) -> Iterator[Shape]:
        """Two stages with every number of replicas, cut where their compute is balanced."""
        problem = self.problem
        total = sum(layer.compute for layer in problem.profile.layers) or 1.0
        if problem.max_stages == 1 or problem.max_replicas == 1 or len(problem.profile.layers) < 2:
            return
        before = list(accumulate(layer.compute for layer in problem.profile.layers[:-1]))
        for first in range(1, problem.workers, max(1, problem.workers // 16)):
            cut = min(range(len(before)), key=lambda at: abs(before[at] / total - first / problem.workers))
            yield ((cut + 1, first), (len(problem.profile.layers), problem.workers - first))

    def simulated(self, shape: Shape) -> Candidate | None:
        """The plan of ``shape`` with its simulated time; None if it does not fit."""
        if shape not in self._known:
            self._known[shape] = self._simulate(shape)
        return self._known[shape]

    def _proposals(self) -> list[Shape]:
        """What the dynamic program makes of every cost model, on the machines as they are and on flat ones; with the first model
        also the straight pipeline and plain data parallelism."""
        # Without a limit on memory every policy has the same partitions.
        policy = self.policy if math.isfinite(self.problem.memory_limit) else "stash"
        shapes: dict[Shape, None] = {}
        for model in COST_MODELS.values():
            for problem in (self.problem, flattened(self.problem)):
                limits = [problem]
                if model.name == "ring":
                    limits += [dataclasses.replace(problem, **{name: 1}) for name in ("max_stages", "max_replicas")]  # type: ignore[arg-type]
                for limited in limits:
                    asked = dataclasses.replace(limited, cost_model=model)
                    shape = proposed(asked, policy, self.microbatches, recompute=self.recompute)
                    if shape is not None:
                        shapes[shape] = None
        return list(shapes)

    def _improve(self, candidate: Candidate) -> None:
        """Steps to faster neighbours until there is none."""
        while True:
            step = next(
                (
                    better
                    for shape in self._neighbours(shape_of(candidate.plan))
                    if self._at_least(shape) <= candidate.seconds * (1 + EDGE)
                    and (better := self.simulated(shape)) is not None
                    and self._rank(better) < self._rank(candidate)
                ),
                None,
            )
            if step is None or len(self._known) >= SIMULATED * 16 // max(16, self.problem.workers):
                return
            candidate = step

    def _neighbours(self, shape: Shape) -> Iterator[Shape]:
        stops, replicas = [stop for stop, _ in shape], [count for _, count in shape]
        layers, stages = len(self.problem.profile.layers), len(shape)
        spare = self.problem.workers - sum(replicas)
        for number in range(stages - 1):
            for move in (-1, 1, -2, 2):
                moved = stops[number] + move
                low = stops[number - 1] if number else 0
                if low < moved < stops[number + 1]:
                    yield _shape([*stops[:number], moved, *stops[number + 1 :]], replicas)
            joined = replicas[number] + replicas[number + 1]
            yield _shape(stops[:number] + stops[number + 1 :], [*replicas[:number], joined, *replicas[number + 2 :]])
        for giver in range(stages):
            if replicas[giver] > 1:
                for taker in range(stages):
                    if taker != giver:
                        changed = list(replicas)
                        changed[giver] -= 1
                        changed[taker] += 1
                        yield _shape(stops, changed)
            if spare:
                yield _shape(stops, [count + (number == giver) for number, count in enumerate(replicas)])
        if self.problem.max_stages is not None and stages >= self.problem.max_stages:
            return
        for number, count in enumerate(replicas):
            start = stops[number - 1] if number else 0
            if count < 2 or stops[number] - start < 2:
                continue
            for middle in {(start + stops[number]) // 2, start + 1, stops[number] - 1, layers - 1}:
                if start < middle < stops[number]:
                    for first in {count // 2, count - 1, 1}:
                        yield _shape(
                            [*stops[:number], middle, *stops[number:]],
                            [*replicas[:number], first, count - first, *replicas[number + 1 :]],
                        )

    def _simulate(self, shape: Shape) -> Candidate | None:
        problem = self.problem
        if self.stages is not None and len(shape) != self.stages:
            return None
        if problem.max_replicas is not None and max(count for _, count in shape) > problem.max_replicas:
            return None
        starts = [0, *(stop for stop, _ in shape)]
        parts = [Part(start, stop, count) for start, (stop, count) in zip(starts, shape, strict=False)]
        try:
            found = finish(problem, parts, self.policy, self.microbatches, self.recompute)
        except PlanError:  # the levels cannot hold it as whole components: as the workers come
            found = finish(flattened(problem), parts, self.policy, self.microbatches, self.recompute)
        if not fits(found.plan, problem.memory_limit) or not enough_microbatches(found.plan):
            return None
        plain = dataclasses.replace(found, plan=dataclasses.replace(found.plan, placement=None))
        placed = dataclasses.replace(found, plan=dataclasses.replace(found.plan, placement=placement_of(found)))
        ways = [plain] if placed.plan.placement is None else [placed, plain]
        return min((self._timed(way, _short(way.plan)) for way in ways), key=lambda way: way.seconds)

    def _confirmed(self, candidate: Candidate) -> Candidate:
        return self._timed(candidate, None)

    def _timed(self, candidate: Candidate, minibatches: int | None) -> Candidate:
        seconds = simulated_seconds(candidate.plan, self.problem.profile, self.topology, minibatches=minibatches)
        return dataclasses.replace(
            candidate, plan=dataclasses.replace(candidate.plan, bottleneck=seconds), seconds=seconds
        )

    def _rank(self, candidate: Candidate) -> tuple[float, int, int]:
        """Of equally fast ones the shortest, then the one with more workers, or fewer by flag."""
        plan, seconds = candidate.plan, candidate.seconds
        rounded = float(f"{seconds:.{round(-math.log10(SAME))}e}")
        return rounded, len(plan.stages), -plan.workers if self.problem.use_all_workers else plan.workers


def _short(plan: Plan) -> int:
    """Minibatches of a run just long enough for a steady middle."""
    alignment = policy_of(plan).alignment
    return alignment * max(4, math.ceil(2 * plan.workers / alignment))


def shape_of(plan: Plan) -> Shape:
    """Cuts and replicas of ``plan``."""
    return tuple((stage.layers[-1] + 1, stage.replicas) for stage in plan.stages)


def placement_of(candidate: Candidate) -> tuple[int, ...] | None:
    """Ranks that keep what exchanges most on one machine; None for their own order."""
    placed = len(candidate.plan.stages) > 1 and candidate.plan.policy != "interleaved"
    return candidate.layout.ranks() if placed else None


def _shape(stops: list[int], replicas: list[int]) -> Shape:
    return tuple(zip(stops, replicas, strict=True))
