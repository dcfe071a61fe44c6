"""Predicted seconds of a plan: the table that shows where they go, and sentences with the planner's reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.candidates import Candidate
from telltale.train.pipeline.planning.costs import (
    CostModel,
    PlanCost,
    cost_model_of,
    cost_of_plan,
    priced_stages,
)
from telltale.train.pipeline.planning.partition import Problem
from telltale.train.pipeline.profile import Profile, arranged
from telltale.train.pipeline.topology import Topology


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


def explain(
    plan: Plan, profile: Profile, topology: Topology, *, cost_model: str | CostModel | None = None, directions: int = 2
) -> list[StageRow]:
    """One row per stage: layers, replicas, seconds, bytes, memory, and where the bottleneck is.

    ``directions`` as in :func:`~telltale.train.pipeline.planning.costs.cut_seconds`. Raises PlanError for a plan that does
    not fit the profile or the topology.
    """
    chain = arranged(profile, plan)
    model = cost_model_of(cost_model or plan.cost_model)
    layout = cost_of_plan(plan, profile, topology.levels, model, directions=directions)
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


MIN_REPORTED_GAP = 1.05
"""Differences below a twentieth are not worth a sentence."""
_POLICY = {
    "stash": "stash keeps every worker busy and each gradient with the weights it was computed from",
    "2bw": "2bw keeps two versions of the weights, where stash needs one per minibatch in flight",
    "flush": "flush keeps one version of the weights and drains the pipe once per batch",
    "gpipe": "gpipe runs all forwards of a batch before its backwards",
    "vertical": "vertical sync lets all stages read the same version",
    "none": "no policy mixes weight versions; this is the ablation",
    "interleaved": "interleaved gives each worker several chunks, which shortens the fill and drain of the pipe",
}


def reasons_for(
    chosen: Candidate,
    others: list[Candidate],
    tried: Mapping[str, Candidate | None],
    problem: Problem,
    *,
    asked: str | None,
    reordered: bool,
    simulated: bool,
) -> list[str]:
    """Pace and bottleneck, policy, workers, runner-up, order and placement, each where it applies."""
    plan = chosen.plan
    workers = problem.workers
    total = problem.profile.compute
    alone = f", {total / chosen.seconds:.2f} times one worker" if chosen.seconds > 0 else ""
    how = "by simulation of what the trainer does" if simulated else f"under the {plan.cost_model} cost model"
    sentences = [
        f"{plan.describe()} takes {_seconds(chosen.seconds)} per minibatch {how}{alone}; "
        f"its pace is set by {_slowest(chosen.layout, plan)}."
    ]
    sentences.append(_policy_sentence(chosen, tried, problem, asked))
    if plan.policy in ("2bw", "flush", "gpipe", "interleaved"):
        sentences.append(_batch_sentence(chosen))
    if plan.policy != "interleaved" and plan.workers < workers:
        sentences.append(
            f"It uses {plan.workers} of {workers} workers: with more of them no stage or cut that sets the pace gets faster."
        )
    if others:
        sentences.append(_runner_up(chosen, min(others, key=lambda other: other.seconds)))
    sentences += [] if simulated else _exposed_averaging(chosen, others)
    if reordered:
        sentences.append("The model is a graph: layer numbers count along the order of the names of the stages.")
    if len(plan.stages) > 1 and plan.policy != "interleaved" and chosen.layout.ranks() is not None:
        sentences.append(
            "Stages that exchange most share machines: the plan's placement says which rank is which replica, ranks counted "
            "machine by machine as torchrun does."
        )
    if plan.policy == "interleaved":
        sentences.append(f"Stage k runs on worker k mod {workers}.")
    return sentences


def _slowest(layout: PlanCost, plan: Plan) -> str:
    parts = [
        (seconds / stage.replicas, f"the compute of stage {number}")
        for number, (seconds, stage) in enumerate(zip(layout.compute, plan.stages, strict=True))
    ]
    parts += [
        (seconds / stage.replicas, f"the gradient averaging of stage {number}")
        for number, (seconds, stage) in enumerate(zip(layout.synchronisation, plan.stages, strict=True))
    ]
    parts += [(seconds, f"the cut behind stage {number}") for number, seconds in enumerate(layout.cuts)]
    return max(parts, key=lambda part: part[0])[1]


def _policy_sentence(
    chosen: Candidate, tried: Mapping[str, Candidate | None], problem: Problem, asked: str | None
) -> str:
    plan = chosen.plan
    recomputed = " with activations recomputed in the backward" if plan.recompute else ""
    if asked is not None:
        return f"The policy {asked}{recomputed} was given."
    if len(plan.stages) == 1:
        sentence = f"One stage is plain data parallelism{recomputed}: every minibatch reads the newest weights"
    else:
        sentence = f"Policy {plan.policy}{recomputed}: {_POLICY[plan.policy]}"
    refused, slower = [], []
    for label, other in tried.items():
        if other is not None and other.seconds <= chosen.seconds * (1 + 1e-9):
            break
        if other is None:
            refused.append(label)
        else:
            slower.append(f"{label} would take {_seconds(other.seconds)}")
    if refused:
        sentence += f"; no plan under {', '.join(refused)} fits into {problem.memory_limit:.4g} bytes per worker"
    return f"{'; '.join([sentence, *slower])}."


def _batch_sentence(chosen: Candidate) -> str:
    plan = chosen.plan
    sentence = (
        f"One update per {plan.microbatches} minibatches" if plan.microbatches > 1 else "One update per minibatch"
    )
    idle = 1.0 - chosen.layout.bottleneck / chosen.seconds if chosen.seconds > 0 else 0.0
    if plan.policy == "2bw" or len(plan.stages) == 1:
        if any(plan.microbatches % replicas for replicas in plan.replicas):
            sentence += f", which the replicas do not divide: {100 * idle:.1f}% of the time is lost"
        return f"{sentence}."
    return f"{sentence}; filling and draining the pipe costs {100 * idle:.1f}% of the time."


def _runner_up(chosen: Candidate, other: Candidate) -> str:
    gap = 100 * (other.seconds / chosen.seconds - 1) if chosen.seconds > 0 else 0.0
    compared = f"{gap:.1f}% slower" if gap >= 0 else f"{-gap:.1f}% faster, but later in the order of policies"
    cuts = [stage.layers[0] for stage in other.plan.stages[1:]]
    where = f" cut before layers {', '.join(map(str, cuts))}" if 0 < len(cuts) <= 8 else ""
    recomputed = " with recomputation" if other.plan.recompute else ""
    return (
        f"Runner-up: {other.plan.describe()}{where} under {other.plan.policy}{recomputed}, "
        f"{_seconds(other.seconds)} per minibatch, {compared}."
    )


def _exposed_averaging(chosen: Candidate, others: list[Candidate]) -> list[str]:
    """What the pace is without the overlap that the papers' cost models assume, where that makes a difference."""
    exposed = _without_overlap(chosen)
    if exposed <= chosen.seconds * MIN_REPORTED_GAP:
        return []
    sentence = (
        f"The {chosen.plan.cost_model} cost model hides gradient averaging behind the backward, as the papers do. "
        f"PipelineTrainer averages after it, which makes it {_seconds(exposed)} per minibatch"
    )
    nearest = min(others, key=_without_overlap, default=None)
    if nearest is not None and _without_overlap(nearest) * MIN_REPORTED_GAP < exposed:
        sentence += f" and {nearest.plan.describe()} the faster one with {_seconds(_without_overlap(nearest))}"
    return [f"{sentence}; cost_model='official-code' plans without that overlap."]


def _without_overlap(candidate: Candidate) -> float:
    """Seconds per minibatch if every stage first computes and then averages."""
    layout = candidate.layout
    stages = zip(layout.compute, layout.synchronisation, layout.replicas, strict=True)
    return max(candidate.seconds, *((compute + exchange) / count for compute, exchange, count in stages))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.4g} ms"
