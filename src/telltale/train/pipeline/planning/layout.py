"""What a given plan costs on given machines: the figures of a plan, whoever made it.

A plan lists replicas per stage; on machines in levels it also matters which stages share a component. The cheapest
arrangement is found here: runs of consecutive stages form a pipeline inside one component, and that pipeline is replicated
over components, as in the recursion of the planner (SOSP'19, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from telltale.errors import PlanError
from telltale.train.pipeline.planning.cost_models import CostModel, cut_seconds
from telltale.train.pipeline.profiling.profile import Profile
from telltale.train.pipeline.profiling.topology import Level


@dataclass(frozen=True)
class Layout:
    """Seconds per minibatch of every part of a plan."""

    bottleneck: float
    compute: tuple[float, ...]
    """Forward and backward of one minibatch on one replica, by stage; over the replicas, its share of the period."""
    synchronisation: tuple[float, ...]
    """Averaging one round's gradients on the slowest link that the stage's replicas use; 0 without replicas."""
    cuts: tuple[float, ...]
    """Link time of the cut behind each stage but the last."""
    replicas: tuple[int, ...]
    """Workers of each stage."""
    places: tuple[tuple[int, int, int], ...] = ()
    """(stage, replica, worker's number on the machines, innermost components filled first) of every worker in use."""

    def ranks(self) -> tuple[int, ...] | None:
        """Global rank of each worker, replicas of the first stage first; None if that is simply their order.

        Ranks count the workers in use as torchrun does, machine by machine.
        """
        ordered = [worker for _, _, worker in sorted(self.places)]
        numbers = {worker: rank for rank, worker in enumerate(sorted(ordered))}
        found = tuple(numbers[worker] for worker in ordered)
        return None if found == tuple(range(len(found))) else found


def lay_out(
    profile: Profile,
    bounds: Sequence[int],
    replicas: Sequence[int],
    levels: Sequence[Level],
    model: CostModel,
    *,
    directions: int = 2,
    microbatches: int | None = None,
) -> Layout:
    """Cheapest arrangement of stages [bounds[s], bounds[s+1]) with ``replicas`` each. ``profile`` is a chain.

    ``microbatches``: gradients are averaged once per that many minibatches; None: once per round of a stage's replicas.
    Raises :class:`~telltale.errors.PlanError` if the stages do not fit on the workers of ``levels``.
    """
    spans = list(pairwise(bounds))
    compute = [math.fsum(layer.compute for layer in profile.layers[low:high]) for low, high in spans]
    weights = [math.fsum(layer.parameter_bytes for layer in profile.layers[low:high]) for low, high in spans]
    outputs = [profile.layers[high - 1].activation_bytes for _, high in spans]

    @cache
    def place(level: int, first: int, last: int, divisor: int) -> Layout | None:
        """Stages first..last-1, replicas divided by ``divisor``, on the components of one ``level``."""
        if level < 0:
            alone = last - first == 1 and replicas[first] == divisor
            return Layout(compute[first], (compute[first],), (0.0,), (), (1,), ((0, 0, 0),)) if alone else None
        count, bandwidth = levels[level].count, levels[level].bandwidth
        room = math.prod(below.count for below in levels[:level])
        best: dict[tuple[int, int], Layout] = {(first, 0): Layout(0.0, (), (), (), ())}
        for stop in range(first + 1, last + 1):
            for begin in range(max(first, stop - room), stop):
                common = math.gcd(*replicas[begin:stop]) // divisor
                for copies in (number for number in range(1, min(common, count) + 1) if common % number == 0):
                    inner = place(level - 1, begin, stop, divisor * copies)
                    if inner is None:
                        continue
                    share = min(1.0, copies * divisor / microbatches) if microbatches else 1.0
                    shared = share * sum(weights[begin:stop])
                    for used in range(count - copies + 1):
                        before = best.get((begin, used))
                        if before is None:
                            continue
                        cut = cut_seconds(outputs[begin - 1], bandwidth, directions) if begin > first else None
                        joined = _join(before, inner, model, shared, copies, bandwidth, cut, used * room, room)
                        known = best.get((stop, used + copies))
                        if known is None or joined.bottleneck < known.bottleneck:
                            best[stop, used + copies] = joined
        found = [layout for (stop, _), layout in best.items() if stop == last and layout.compute]
        return min(found, key=lambda layout: layout.bottleneck, default=None)

    result = place(len(levels) - 1, 0, len(spans), 1)
    if result is None:
        shape = " x ".join(str(level.count) for level in levels)
        described = "-".join(str(count) for count in replicas)
        raise PlanError(f"the plan {described} does not fit on {shape} workers; expected stages that share them out.")
    return result


def _join(
    before: Layout,
    inner: Layout,
    model: CostModel,
    weights: float,
    copies: int,
    bandwidth: float,
    cut: float | None,
    first_worker: int,
    room: int,
) -> Layout:
    """Append a pipeline replicated over ``copies`` components of ``room`` workers to what stands before it.

    Minibatch t goes to component t mod ``copies``, so that all of its way through the inner pipeline is in one component.
    """
    stages = len(before.compute)
    places = [
        (stages + stage, replica * copies + copy, first_worker + copy * room + worker)
        for stage, replica, worker in inner.places
        for copy in range(copies)
    ]
    outer = float(model.synchronisation(weights, copies, bandwidth))
    period = float(model.stage_seconds(inner.bottleneck, weights, copies, bandwidth))
    # In the time of one round of all replicas, the components exchange gradients once per minibatch that each one takes.
    rounds = (max(own, outer * count) for own, count in zip(inner.synchronisation, inner.replicas, strict=True))
    return Layout(
        max(before.bottleneck, period, cut or 0.0),
        before.compute + inner.compute,
        before.synchronisation + tuple(rounds),
        before.cuts + (() if cut is None else (cut,)) + tuple(seconds / copies for seconds in inner.cuts),
        before.replicas + tuple(count * copies for count in inner.replicas),
        before.places + tuple(places),
    )
