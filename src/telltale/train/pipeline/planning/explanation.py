"""Predicted seconds of a plan, and the table that shows where they go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan, PlannedStage
from telltale.train.pipeline.planning.cost_models import CostModel, cost_model_of
from telltale.train.pipeline.planning.layout import Layout, lay_out
from telltale.train.pipeline.planning.memory import MEMORY_POLICIES, MemoryModel, stage_memories
from telltale.train.pipeline.policies import BY_BATCH
from telltale.train.pipeline.profiling.profile import Profile
from telltale.train.pipeline.profiling.topology import Level, Topology


@dataclass(frozen=True)
class StageRow:
    """One stage of an explained plan. Seconds are shares of one minibatch's period, sizes bytes."""

    stage: int
    first: str
    """Name of the first layer; ``last`` of the last."""
    last: str
    n_layers: int
    replicas: int
    compute: float
    """Forward and backward of one minibatch over the replicas."""
    synchronisation: float
    """Gradient averaging over the replicas, per minibatch."""
    cut_bytes: float
    """Activation bytes sent to the next stage per minibatch; as many come back as gradient."""
    cut: float
    """Seconds that the cut's link is busy per minibatch; 0 for the last stage."""
    memory: float | None
    bottleneck: str
    """Which of "compute", "synchronisation" and "cut" sets the plan's pace here; empty in the other stages."""


def arranged(profile: Profile, plan: Plan) -> Profile:
    """The chain of layers that the plan's stages index; for a graph, its nodes in the order that the plan names."""
    names = [name for stage in plan.stages for name in stage.names]
    chain = profile.chain(names if profile.edges is not None and names else None)
    if len(chain.layers) != plan.n_layers:
        raise PlanError(f"the plan has {plan.n_layers} layers and the profile {len(chain.layers)}; expected the same.")
    return chain


def recomputing(profile: Profile) -> Profile:
    """The profile of layers whose backward runs their forward once more."""
    layers = tuple(dataclasses.replace(layer, backward=layer.backward + layer.forward) for layer in profile.layers)
    return dataclasses.replace(profile, layers=layers)


def bounds_of(plan: Plan) -> list[int]:
    """Positions between the stages: 0, the first layers of stages 1, 2, ..., and the number of layers."""
    return [0, *(stage.layers[-1] + 1 for stage in plan.stages)]


def layout_of(
    plan: Plan, profile: Profile, levels: Sequence[Level], model: CostModel, *, directions: int = 2
) -> Layout:
    """Predicted seconds of a plan on ``levels``. Raises PlanError if it does not fit on them or to the profile.

    The chunks of an interleaved plan are laid out as if each had a worker of its own.
    """
    batch = plan.microbatches if plan.policy in BY_BATCH else None
    if plan.policy == "interleaved":
        levels = (Level(plan.workers, min(level.bandwidth for level in levels)),)
    chain = arranged(profile, plan)
    return lay_out(
        recomputing(chain) if plan.recompute else chain,
        bounds_of(plan),
        plan.replicas,
        levels,
        model,
        directions=directions,
        microbatches=batch,
    )


def minibatch_seconds(layout: Layout, policy: str, microbatches: int, *, overlapped: bool = True) -> float:
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


def priced_stages(plan: Plan, chain: Profile, layout: Layout) -> tuple[PlannedStage, ...]:
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


def explain(
    plan: Plan, profile: Profile, topology: Topology, *, cost_model: str | CostModel | None = None, directions: int = 2
) -> list[StageRow]:
    """One row per stage: layers, replicas, seconds, bytes, memory, and where the bottleneck is.

    ``directions`` as in :func:`~telltale.train.pipeline.planning.cost_models.cut_seconds`. Raises PlanError for a plan that does
    not fit the profile or the topology.
    """
    chain = arranged(profile, plan)
    model = cost_model_of(cost_model or plan.cost_model)
    layout = layout_of(plan, profile, topology.levels, model, directions=directions)
    rows = []
    for number, stage in enumerate(priced_stages(plan, chain, layout)):
        cut = layout.cuts[number] if number < len(layout.cuts) else 0.0
        parts = {
            "compute": stage.compute / stage.replicas,
            "synchronisation": stage.synchronisation / stage.replicas,
            "cut": cut,
        }
        rows.append(
            StageRow(
                number,
                stage.names[0],
                stage.names[-1],
                len(stage.layers),
                stage.replicas,
                parts["compute"],
                parts["synchronisation"],
                stage.cut_bytes,
                cut,
                stage.memory,
                "",
            )
        )
    return _with_bottleneck(rows)


def _with_bottleneck(rows: list[StageRow]) -> list[StageRow]:
    """Mark the largest part of all rows, the first one of equals."""
    kinds = ("compute", "synchronisation", "cut")
    stage, kind = max(
        ((row.stage, kind) for row in rows for kind in kinds), key=lambda place: getattr(rows[place[0]], place[1])
    )
    return [StageRow(**{**vars(row), "bottleneck": kind if row.stage == stage else ""}) for row in rows]
