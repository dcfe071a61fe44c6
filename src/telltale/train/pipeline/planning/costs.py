"""How long a replicated stage takes per minibatch, and what a cut costs: four readings of PipeDream's equations.

With T the seconds of forward and backward of a stage's layers, w its parameter bytes, m its replicas and B bytes/s:

================  ======================================  ================================================================
name              seconds per minibatch                   source
================  ======================================  ================================================================
``ring``          max(T, 2 (m-1)/m w/B) / m               SOSP'19, section 3.1, prose: a worker sends (m-1)/m |w| twice
``v1``            max(T, 4 (m-1)/m w/B) / m               arXiv 1806.03377, section 3.2: W_l^m, sent and received
``sosp-literal``  max(T, 2 (m-1) w/B) / m                 SOSP'19, section 3.1, display formula of T^k(i -> j, m)
``official-code`` (T + 4 (m-1)/m w/B) / m                 msr-fiddle/pipedream, optimizer_graph_hierarchical.py
================  ======================================  ================================================================

Only ``ring`` and ``v1`` lead to the plans that the paper prints (VGG-16 15-1, ResNet-50 16). In a topology with levels, T
is the bottleneck of the pipeline inside one component. A cut of ``a`` bytes costs 2 a/B (activation there, gradient
back), or a/B on links that carry both ways at once.

Peak bytes of one worker under each weight policy (PipeDream SOSP'19, section 3.3; PipeDream-2BW, sections 3.2, 3.3).

With |W| the stage's parameter bytes, A what autograd keeps of one minibatch, a the bytes of the stage's input, G = |W| the
gradients, O the optimizer state and w the minibatches that are ahead of a backward:

=============  ======================================
stash          (w+1) |W| + (w+1) A + G + O
vertical       (D+1) |W| + (w+1) A + G + O
2bw            2 |W| + (w+1) A + G + O
flush          |W| + min(w+1, m/r) A + G + O
gpipe          |W| + (m/r) A + G + O
none           |W| + (w+1) A + G + O
=============  ======================================

With recomputation k A becomes k a + A: only the inputs of the minibatches in flight, and one minibatch's activations.

What a given plan costs on given machines: the figures of a plan, from any planner.

A plan lists replicas per stage; on machines in levels it also matters which stages share a component. The cheapest
arrangement is found here: runs of consecutive stages form a pipeline inside one component, and that pipeline is replicated
over components, as in the recursion of the planner (SOSP'19, section 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.plan import Plan, PlannedStage
from telltale.train.pipeline.profile import Profile, arranged
from telltale.train.pipeline.schedule import BY_BATCH, Policy, warmup
from telltale.train.pipeline.topology import Level

Number = Any
"""A float or an array of them; everything here broadcasts."""


def ring_traffic(replicas: Number) -> Number:
    """2 (m-1)/m: bytes that a worker of a ring all-reduce sends per parameter byte (SOSP'19, section 3.1, prose)."""
    return 2.0 * (replicas - 1) / replicas


def v1_traffic(replicas: Number) -> Number:
    """4 (m-1)/m: sent plus received, as to a sharded parameter server (arXiv 1806.03377, section 3.2, W_l^m)."""
    return 4.0 * (replicas - 1) / replicas


def sosp_literal_traffic(replicas: Number) -> Number:
    """2 (m-1): the display formula of SOSP'19, section 3.1, without the /m that its prose implies."""
    return 2.0 * (replicas - 1)


@dataclass(frozen=True)
class CostModel:
    """Synchronisation traffic, and whether it overlaps with compute (max) or follows it (sum)."""

    name: str
    traffic: Callable[[Number], Number]
    """Bytes on a worker's link per parameter byte and round, from the number of replicas."""
    overlapped: bool = True

    def synchronisation(self, parameter_bytes: Number, replicas: Number, bandwidth: float) -> Number:
        """Seconds to average the gradients of one round of m minibatches."""
        return self.traffic(replicas) * parameter_bytes / bandwidth

    def stage_seconds(self, inner: Number, parameter_bytes: Number, replicas: Number, bandwidth: float) -> Number:
        """T^k(i -> j, m): seconds per minibatch of a stage replicated m times; ``inner`` seconds on one component."""
        synchronisation = self.synchronisation(parameter_bytes, replicas, bandwidth)
        if not self.overlapped:
            return (inner + synchronisation) / replicas
        return np.maximum(inner, synchronisation) / replicas


COST_MODELS = {
    "ring": CostModel("ring", ring_traffic),
    "v1": CostModel("v1", v1_traffic),
    "sosp-literal": CostModel("sosp-literal", sosp_literal_traffic),
    "official-code": CostModel("official-code", v1_traffic, overlapped=False),
}


def cost_model_of(name: str | CostModel) -> CostModel:
    """The cost model of a name. Raises :class:`~telltale.errors.ConfigError` for an unknown one."""
    if isinstance(name, CostModel):
        return name
    if not isinstance(name, str) or name not in COST_MODELS:
        raise ConfigError(f"cost_model={name!r} is unknown; expected one of {', '.join(map(repr, COST_MODELS))}.")
    return COST_MODELS[name]


def cut_seconds(cut_bytes: Number, bandwidth: float, directions: int = 2) -> Number:
    """Seconds per minibatch on the link of a cut: 2 a/B (SOSP'19, section 3.1), a/B full duplex, 0 for free cuts.

    ``directions`` is how many of the two transfers of a minibatch share the link's time: 2, 1, or 0, which ignores cuts
    as the official optimizer does by default.
    """
    return directions * cut_bytes / bandwidth


MEMORY_POLICIES = ("stash", "vertical", "2bw", "flush", "gpipe", "none")


class PlanInfeasible(PlanError):
    """No plan fits into the memory; the message names the layer or stage and the bytes that are missing."""


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a worker as a weighted sum of three sizes, for one policy and setting."""

    policy: str
    optimizer: float = 2.0
    """Bytes of optimizer state per parameter byte."""
    microbatches: int | None = None
    """m of flush and gpipe; None for flush means enough of them to fill the pipe. gpipe needs it."""
    recompute: bool = False
    delay: int = 1
    """D of vertical sync: at most the number of stages - 1."""

    def __post_init__(self) -> None:
        if self.policy not in MEMORY_POLICIES:
            raise PlanError(
                f"policy={self.policy!r} has no memory model; expected one of {', '.join(MEMORY_POLICIES)}."
            )
        if self.policy == "gpipe" and self.microbatches is None:
            raise PlanError("policy='gpipe' needs microbatches: its memory grows with them.")

    def in_flight(self, ahead: Any, replicas: Any) -> Any:
        """Minibatches whose activations a worker keeps at once; ``ahead`` is w_s, ``replicas`` r_s (arrays or ints)."""
        if self.policy == "gpipe":
            return np.ceil(self.microbatches / np.asarray(replicas))
        if self.policy == "flush" and self.microbatches is not None:
            return np.minimum(np.asarray(ahead) + 1, np.ceil(self.microbatches / np.asarray(replicas)))
        return np.asarray(ahead) + 1

    def versions(self, ahead: Any) -> Any:
        """Copies of the parameters that a worker keeps, the newest included."""
        if self.policy == "stash":
            return np.asarray(ahead) + 1
        constant = {"vertical": self.delay + 1, "2bw": 2}.get(self.policy, 1)
        return np.full(np.shape(ahead), constant)

    def coefficients(self, ahead: Any, replicas: Any) -> tuple[Any, Any, Any]:
        """(per parameter byte, per saved byte, per input byte); the sum of products is the peak."""
        kept = self.in_flight(ahead, replicas)
        per_parameter = self.versions(ahead) + 1.0 + self.optimizer
        if self.recompute:
            return per_parameter, np.ones_like(kept, dtype=float), kept.astype(float)
        return per_parameter, kept.astype(float), np.zeros_like(kept, dtype=float)

    def peak(self, parameter_bytes: float, saved_bytes: float, input_bytes: float, ahead: int, replicas: int) -> float:
        """Bytes of one worker of a stage."""
        per_parameter, per_saved, per_input = self.coefficients(ahead, replicas)
        return float(per_parameter * parameter_bytes + per_saved * saved_bytes + per_input * input_bytes)


def stage_memories(profile: Profile, cuts: list[int], replicas: tuple[int, ...], model: MemoryModel) -> list[float]:
    """Peak bytes of one worker of every stage of a chain; ``cuts`` are the first layers of stages 1, 2, ...

    The delay of vertical sync is that of these replicas; ``model.delay`` is not read.
    """
    if model.policy == "vertical":
        model = MemoryModel(**{**vars(model), "delay": Policy("vertical", replicas).delay})
    bounds = [0, *cuts, len(profile.layers)]
    result = []
    for stage, (low, high) in enumerate(pairwise(bounds)):
        layers = profile.layers[low:high]
        result.append(
            model.peak(
                math.fsum(layer.parameter_bytes for layer in layers),
                math.fsum(layer.saved_bytes for layer in layers),
                profile.layers[low - 1].activation_bytes if low else 0.0,
                warmup(replicas, stage),
                replicas[stage],
            )
        )
    return result


@dataclass(frozen=True)
class PlanCost:
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


def cost_of_stages(
    profile: Profile,
    bounds: Sequence[int],
    replicas: Sequence[int],
    levels: Sequence[Level],
    model: CostModel,
    *,
    directions: int = 2,
    microbatches: int | None = None,
) -> PlanCost:
    """Cheapest arrangement of stages [bounds[s], bounds[s+1]) with ``replicas`` each. ``profile`` is a chain.

    ``microbatches``: gradients are averaged once per that many minibatches; None: once per round of a stage's replicas.
    Raises :class:`~telltale.errors.PlanError` if the stages do not fit on the workers of ``levels``.
    """
    spans = list(pairwise(bounds))
    compute = [math.fsum(layer.compute for layer in profile.layers[low:high]) for low, high in spans]
    weights = [math.fsum(layer.parameter_bytes for layer in profile.layers[low:high]) for low, high in spans]
    outputs = [profile.layers[high - 1].activation_bytes for _, high in spans]

    @cache
    def place(level: int, first: int, last: int, divisor: int) -> PlanCost | None:
        """Stages first..last-1, replicas divided by ``divisor``, on the components of one ``level``."""
        if level < 0:
            alone = last - first == 1 and replicas[first] == divisor
            return PlanCost(compute[first], (compute[first],), (0.0,), (), (1,), ((0, 0, 0),)) if alone else None
        count, bandwidth = levels[level].count, levels[level].bandwidth
        room = math.prod(below.count for below in levels[:level])
        best: dict[tuple[int, int], PlanCost] = {(first, 0): PlanCost(0.0, (), (), (), ())}
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
    before: PlanCost,
    inner: PlanCost,
    model: CostModel,
    weights: float,
    copies: int,
    bandwidth: float,
    cut: float | None,
    first_worker: int,
    room: int,
) -> PlanCost:
    """Append a pipeline replicated over ``copies`` components of ``room`` workers to the stages before it.

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
    return PlanCost(
        max(before.bottleneck, period, cut or 0.0),
        before.compute + inner.compute,
        before.synchronisation + tuple(rounds),
        before.cuts + (() if cut is None else (cut,)) + tuple(seconds / copies for seconds in inner.cuts),
        before.replicas + tuple(count * copies for count in inner.replicas),
        before.places + tuple(places),
    )


def recomputing(profile: Profile) -> Profile:
    """The profile of layers whose backward runs their forward once more."""
    layers = tuple(dataclasses.replace(layer, backward=layer.backward + layer.forward) for layer in profile.layers)
    return dataclasses.replace(profile, layers=layers)


def bounds_of(plan: Plan) -> list[int]:
    """Positions between the stages: 0, the first layers of stages 1, 2, ..., and the number of layers."""
    return [0, *(stage.layers[-1] + 1 for stage in plan.stages)]


def cost_of_plan(
    plan: Plan, profile: Profile, levels: Sequence[Level], model: CostModel, *, directions: int = 2
) -> PlanCost:
    """Predicted seconds of a plan on ``levels``. Raises PlanError if it does not fit on them or to the profile.

    The chunks of an interleaved plan are laid out as if each had a worker of its own.
    """
    batch = plan.microbatches if plan.policy in BY_BATCH else None
    if plan.policy == "interleaved":
        levels = (Level(plan.workers, min(level.bandwidth for level in levels)),)
    chain = arranged(profile, plan)
    return cost_of_stages(
        recomputing(chain) if plan.recompute else chain,
        bounds_of(plan),
        plan.replicas,
        levels,
        model,
        directions=directions,
        microbatches=batch,
    )


def minibatch_seconds(layout: PlanCost, policy: str, microbatches: int, *, overlapped: bool = True) -> float:
    """Predicted seconds per minibatch, the fill and drain of synchronous policies included.

    stash, vertical, 2bw and none keep the pipe full: the bottleneck. flush and gpipe take, per batch of m minibatches on
    several stages, one pass through all stages and cuts and then the slowest part's remaining minibatches (GPipe,
    section 2.3; (m + n - 1)(f + b) for equal stages); gradients are averaged once per batch. Where a stage's replicas do not
    divide m, one of them runs ceil(m / r) minibatches of every batch of 2bw, flush and gpipe while the others wait.
    """
    if policy not in ("2bw", "flush", "gpipe"):
        return layout.bottleneck
    if policy == "2bw" or len(layout.compute) == 1:
        ragged = (
            math.ceil(microbatches / count) * seconds
            for count, seconds in zip(layout.replicas, layout.compute, strict=True)
            if microbatches % count
        )
        return max(layout.bottleneck, *(seconds / microbatches for seconds in ragged), 0.0)
    fill = sum(layout.compute) + sum(layout.cuts)
    further = (math.ceil(microbatches / count) - 1 for count in layout.replicas)
    steady = [count * seconds for count, seconds in zip(further, layout.compute, strict=True)]
    steady += [(microbatches - 1) * seconds for seconds in layout.cuts]
    batch_rounds = (max(1.0, microbatches / count) for count in layout.replicas)
    exchange = max(rounds * seconds for rounds, seconds in zip(batch_rounds, layout.synchronisation, strict=True))
    busy = fill + max(steady)
    return (max(busy, exchange) if overlapped else busy + exchange) / microbatches


def memory_of(plan: Plan, profile: Profile) -> list[float] | None:
    """Predicted peak bytes of one worker of each stage of a chain; None without byte figures or a memory model."""
    if plan.policy not in MEMORY_POLICIES:
        return None
    if not any(layer.parameter_bytes or layer.saved_bytes for layer in profile.layers):
        return None
    model = MemoryModel(
        plan.policy, profile.optimizer_bytes_per_parameter_byte, plan.microbatches, recompute=plan.recompute
    )
    return stage_memories(profile, bounds_of(plan)[1:-1], plan.replicas, model)


def priced_stages(plan: Plan, chain: Profile, layout: PlanCost) -> tuple[PlannedStage, ...]:
    """The plan's stages with names and predicted figures."""
    memories = memory_of(plan, chain)
    last = len(plan.stages) - 1
    return tuple(
        PlannedStage(
            stage.layers,
            stage.replicas,
            names=tuple(chain.layers[index].name for index in stage.layers),
            compute=layout.compute[number],
            synchronisation=layout.synchronisation[number],
            cut_bytes=chain.layers[stage.layers[-1]].activation_bytes if number < last else 0.0,
            memory=memories[number] if memories else None,
        )
        for number, stage in enumerate(plan.stages)
    )
