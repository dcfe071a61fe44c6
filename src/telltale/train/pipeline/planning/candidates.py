"""One policy at a time: the best plan under it, its microbatches, and what is missing if there is none. Also the plan of an
interleaved schedule.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan, PlannedStage
from telltale.train.pipeline.planning.costs import (
    MemoryModel,
    PlanCost,
    PlanInfeasible,
    cost_of_plan,
    cost_of_stages,
    minibatch_seconds,
    priced_stages,
    recomputing,
)
from telltale.train.pipeline.planning.partition import Part, Problem, ReachTable, reaches_start, solve
from telltale.train.pipeline.schedule import warmup
from telltale.train.pipeline.topology import Level

BATCHES_PER_STAGE = 4
"""Microbatches per stage of flush and gpipe: the bubble is then below a fifth (GPipe, section 2.3: negligible at 4 K)."""


@dataclass(frozen=True)
class Candidate:
    """A finished plan with its predicted seconds per minibatch, fill and drain of synchronous policies included."""

    plan: Plan
    layout: PlanCost
    seconds: float


def best_candidate(problem: Problem, policy: str, *, microbatches: int | None, recompute: bool) -> Candidate | None:
    """The fastest plan under ``policy``; None if nothing fits into the memory limit. ``problem`` has a chain profile.

    ``recompute`` runs every forward twice. For policies that keep the pipe full the least bottleneck is the fastest.
    For flush and gpipe a shorter pipe can win by its smaller bubble, so the best plans of several depths are compared.
    """
    original = problem.profile
    memory = MemoryModel(
        policy,
        problem.profile.optimizer_bytes_per_parameter_byte,
        _memory_microbatches(problem, policy, microbatches),
        recompute=recompute,
    )
    problem = dataclasses.replace(
        problem,
        profile=recomputing(problem.profile) if recompute else problem.profile,
        memory=memory if math.isfinite(problem.memory_limit) else None,
        microbatches=microbatches if policy in ("2bw", "flush", "gpipe") else None,
    )
    if policy == "vertical" and problem.memory is not None:
        partitions = _by_depth(problem, vertical=True)
    else:
        found = solve(problem)
        partitions = [found] if found else []
        if found and (policy in ("flush", "gpipe") or (policy == "2bw" and microbatches is not None)):
            shorter = min(len(found), problem.max_stages or len(found))
            partitions += _by_depth(dataclasses.replace(problem, max_stages=shorter), vertical=False)
    if not partitions and problem.memory is not None and len(problem.levels) > 1:
        partitions = _as_if_flat(problem)
    problem = dataclasses.replace(problem, profile=original)
    finished = [finish(problem, parts, policy, microbatches, recompute) for parts in partitions]
    fitting = [one for one in finished if fits(one.plan, problem.memory_limit) and enough_microbatches(one.plan)]
    # Of equals the shortest, then the one with more workers.
    return min(
        fitting,
        key=lambda one: (float(f"{one.seconds:.9e}"), len(one.plan.stages), -one.plan.workers),
        default=None,
    )


def interleaved_candidate(problem: Problem, *, microbatches: int | None, chunks: int) -> Candidate:
    """A straight pipeline of ``chunks`` stages per worker for torch's interleaved schedule; stage k is on worker k mod W.

    Per batch of m it takes (m + (W - 1) / chunks) times the slowest worker's minibatch (Megatron-LM, 2104.04473,
    section 2.2). Raises PlanError for too few layers and PlanInfeasible if a worker's chunks do not fit.
    """
    workers = problem.workers
    bounds = chunked_bounds(problem, chunks)
    layers = problem.profile.layers
    m = microbatches or BATCHES_PER_STAGE * workers
    if m % workers:
        raise PlanError(f"microbatches={m} for {workers} workers; interleaved needs a multiple of the workers.")
    bandwidth = min(level.bandwidth for level in problem.levels)
    straight = dataclasses.replace(problem.levels[0], count=workers * chunks, bandwidth=bandwidth)
    layout = cost_of_stages(
        problem.profile, bounds, [1] * workers * chunks, (straight,), problem.cost_model, directions=problem.directions
    )
    per_worker = [sum(layout.compute[worker::workers]) for worker in range(workers)]
    period = max([*per_worker, *(seconds for seconds in layout.cuts)])
    memory = MemoryModel("flush", problem.profile.optimizer_bytes_per_parameter_byte)
    for worker in range(workers):
        own = [index for k in range(worker, workers * chunks, workers) for index in range(bounds[k], bounds[k + 1])]
        # Chunks in flight in the warm-up of interleaved 1F1B, in units of a worker's whole share.
        ahead = min((2 * (workers - worker - 1) + (chunks - 1) * workers) / chunks, m - 1)
        peak = memory.peak(
            sum(layers[index].parameter_bytes for index in own),
            sum(layers[index].saved_bytes for index in own),
            0.0,
            math.ceil(ahead),
            1,
        )
        if peak > problem.memory_limit:
            raise PlanInfeasible(
                f"worker {worker} needs {peak:.4g} bytes for its {chunks} interleaved chunks, {peak - problem.memory_limit:.4g} "
                f"more than the {problem.memory_limit:.4g} there are; expected fewer layers per worker or more memory."
            )
    plan = Plan.manual(
        [range(low, high) for low, high in pairwise(bounds)],
        policy="interleaved",
        microbatches=m,
        chunks=chunks,
        cost_model=problem.cost_model.name,
        bottleneck=period,
    )
    plan = dataclasses.replace(plan, stages=priced_stages(plan, problem.profile, layout))
    return Candidate(plan, layout, period * (m + (workers - 1) / chunks) / m)


def fits(plan: Plan, limit: float) -> bool:
    """Whether every stage's predicted memory is within ``limit`` bytes."""
    return all(stage.memory is None or stage.memory <= limit * (1 + 1e-12) for stage in plan.stages)


def enough_microbatches(plan: Plan) -> bool:
    """2bw: the version before the last must be ready when it is read."""
    counts = plan.replicas
    return plan.policy != "2bw" or plan.microbatches >= max(
        count * warmup(counts, stage) for stage, count in enumerate(counts)
    )


def microbatches_for(policy: str, replicas: tuple[int, ...], given: int | None, workers: int) -> int:
    """m of a plan. Given: taken as it is. Otherwise a multiple of every stage's replicas (gpipe: 4 per worker there is):

    2bw: at least the minibatches in flight, max_s r_s w_s, and at least the stages; flush: at least 4 per stage, or
    one per replica of a single stage, which is plain data parallelism. 1 for the other policies.
    """
    if policy in ("stash", "none"):
        return 1
    common = math.lcm(*replicas)
    if policy == "vertical":
        return common
    if given is not None:
        return given
    if policy == "gpipe":
        return BATCHES_PER_STAGE * workers
    if len(replicas) == 1:
        return common
    least = BATCHES_PER_STAGE * len(replicas)
    if policy == "2bw":
        least = max(len(replicas), *(count * warmup(replicas, stage) for stage, count in enumerate(replicas)))
    return math.ceil(least / common) * common


def shortfall(problem: Problem, policies: list[str], recompute: bool) -> PlanInfeasible:
    """The error for a limit that nothing fits into: the layer that is too large alone, or the least that is missing."""
    profile, limit = problem.profile, problem.memory_limit
    workers = problem.workers
    policy = policies[-1]
    model = MemoryModel(
        policy, profile.optimizer_bytes_per_parameter_byte, 1 if policy == "gpipe" else None, recompute=recompute
    )
    tried = " and ".join(policies) + (" with recomputation" if recompute else "")
    # Without the input: a stage that starts at an earlier layer may have a smaller one.
    alone = [model.peak(layer.parameter_bytes, layer.saved_bytes, 0.0, 0, 1) for layer in profile.layers]
    worst = int(np.argmax(alone))
    if alone[worst] > limit:
        return PlanInfeasible(
            f"layer {profile.layers[worst].name!r} alone needs {alone[worst]:.4g} bytes of a worker under {policy}"
            f"{' with recomputation' if recompute else ''}, {alone[worst] - limit:.4g} bytes more than the {limit:.4g} "
            f"there are; a layer is never split."
        )
    model = dataclasses.replace(model, microbatches=_memory_microbatches(problem, policy, None))
    flat = flattened(dataclasses.replace(problem, memory=model))
    plan = _nearest(flat, sum(alone))
    if fits(plan, limit):
        # It exists on flat machines only, which a straight pipeline does not.
        plan = _nearest(dataclasses.replace(flat, max_replicas=1), sum(alone))
    number = max(range(len(plan.stages)), key=lambda stage: plan.stages[stage].memory or 0.0)
    stage = plan.stages[number]
    return PlanInfeasible(
        f"no partition over {workers} workers fits into {limit:.4g} bytes under {tried}; the nearest under {policy} is "
        f"{plan.describe()}, whose stage {number} (layers {stage.names[0]!r} to {stage.names[-1]!r}) lacks "
        f"{(stage.memory or 0.0) - limit:.4g} bytes."
    )


def _nearest(problem: Problem, alone: float) -> Plan:
    """The plan that needs the least memory; ``alone`` are the bytes of all layers with one minibatch in flight."""
    memory = problem.memory
    assert memory is not None
    largest = max(layer.activation_bytes for layer in problem.profile.layers)
    low, high = problem.memory_limit, problem.memory_limit + 2.0 * problem.workers * (alone + largest)
    while high - low > 1e-6 * high:
        middle = 0.5 * (low + high)
        table = ReachTable(dataclasses.replace(problem, memory_limit=middle))
        if reaches_start(table, table.bounds()[1]):
            high = middle
        else:
            low = middle
    parts = solve(dataclasses.replace(problem, memory_limit=high)) or []
    return finish(problem, parts, memory.policy, memory.microbatches, memory.recompute).plan


def flattened(problem: Problem) -> Problem:
    """The same workers on one level, joined by the slowest links."""
    bandwidth = min(level.bandwidth for level in problem.levels)
    return dataclasses.replace(problem, levels=(Level(problem.workers, bandwidth),))


def _as_if_flat(problem: Problem) -> list[list[Part]]:
    """Partitions of flat machines, whose memory arithmetic is exact, that fit on the levels.

    With levels the table counts too many minibatches in flight (see ``partition``), so it can miss what fits just so. A
    straight pipeline fits on any levels.
    """
    flat = flattened(problem)
    found: list[list[Part]] = []
    for shape in (flat, dataclasses.replace(flat, max_replicas=1)):
        vertical = problem.memory is not None and problem.memory.policy == "vertical"
        for parts in _by_depth(shape, vertical=True) if vertical else [solve(shape)]:
            if parts is None:
                continue
            bounds = [0, *(part.stop for part in parts)]
            replicas = [part.replicas for part in parts]
            try:
                cost_of_stages(problem.profile, bounds, replicas, problem.levels, problem.cost_model)
            except PlanError:
                continue
            found.append(parts)
    return found


def _by_depth(problem: Problem, *, vertical: bool) -> list[list[Part]]:
    """The best partition of every number of stages at the outermost level, up to ``max_stages``.

    Vertical sync keeps one version per stage of delay at most, so its memory is known for a given depth. Of more than
    16 depths only 1, 2, 4, 8 and 16 are tried, to a thousandth of their bottleneck: there a short pipe wins clearly or not.
    """
    n_layers = len(problem.profile.layers)
    deepest = min(problem.levels[-1].count, n_layers, problem.max_stages or n_layers)
    many = deepest > 16
    found = []
    for depth in (1, 2, 4, 8, 16) if many else range(1, deepest + 1):
        memory = problem.memory
        if vertical and memory is not None:
            memory = dataclasses.replace(memory, delay=depth - 1 if len(problem.levels) == 1 else problem.workers - 1)
        limited = dataclasses.replace(problem, max_stages=depth, memory=memory)
        parts = solve(limited, tolerance=1e-3) if many else solve(limited)
        if parts is not None:
            found.append(parts)
    return found


def _memory_microbatches(problem: Problem, policy: str, given: int | None) -> int | None:
    workers = problem.workers
    return microbatches_for(policy, (workers,), given, workers) if policy == "gpipe" else given


def finish(problem: Problem, parts: list[Part], policy: str, microbatches: int | None, recompute: bool) -> Candidate:
    """The plan of ``parts``, with its microbatches and predicted figures. Raises PlanError if the levels cannot hold it."""
    replicas = tuple(part.replicas for part in parts)
    workers = problem.workers
    plan = Plan(
        tuple(PlannedStage(tuple(range(part.start, part.stop)), part.replicas) for part in parts),
        policy=policy,
        microbatches=microbatches_for(policy, replicas, microbatches, workers),
        cost_model=problem.cost_model.name,
        recompute=recompute,
        fingerprint=problem.profile.fingerprint,
    )
    layout = cost_of_plan(plan, problem.profile, problem.levels, problem.cost_model, directions=problem.directions)
    stages = priced_stages(plan, problem.profile, layout)
    plan = dataclasses.replace(plan, stages=stages, bottleneck=layout.bottleneck)
    overlapped = problem.cost_model.overlapped
    return Candidate(plan, layout, minibatch_seconds(layout, policy, plan.microbatches, overlapped=overlapped))


def chunked_bounds(problem: Problem, chunks: int) -> list[int]:
    """First layers of W * ``chunks`` balanced stages, then the number of layers; chunk k runs on worker k mod W.

    Raises :class:`~telltale.errors.PlanError` if the model has fewer layers than that.
    """
    workers = problem.workers
    layers = problem.profile.layers
    wanted = workers * chunks
    if wanted > len(layers):
        raise PlanError(
            f"{chunks} chunks on {workers} workers need {wanted} stages and the profile has {len(layers)} layers; "
            f"expected at least one layer per stage."
        )
    bandwidth = min(level.bandwidth for level in problem.levels)
    parts = solve(dataclasses.replace(problem, levels=(Level(wanted, bandwidth),), max_replicas=1, memory=None))
    assert parts is not None
    bounds = [0, *(part.stop for part in parts)]
    while len(bounds) <= wanted:
        spans = [span for span in pairwise(bounds) if span[1] - span[0] > 1]
        low, high = max(spans, key=lambda span: sum(layer.compute for layer in layers[span[0] : span[1]]))
        seconds = [sum(layer.compute for layer in layers[low:cut]) for cut in range(low + 1, high)]
        half = sum(layer.compute for layer in layers[low:high]) / 2
        nearest = min(range(len(seconds)), key=lambda index: abs(seconds[index] - half))
        bounds = sorted([*bounds, low + 1 + nearest])
    return bounds
