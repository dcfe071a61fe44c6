"""Plans with one shape for all stages: PipeDream-2BW's equal replication, and chunks for interleaved schedules."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

from telltale.errors import PlanError
from telltale.train.pipeline.planning.cost_models import CostModel
from telltale.train.pipeline.planning.partition import solve
from telltale.train.pipeline.planning.problem import Part, Problem
from telltale.train.pipeline.profiling.profile import Profile
from telltale.train.pipeline.profiling.topology import Level


def equal_partitions(problem: Problem) -> list[list[Part]]:
    """One partition per depth d that divides the workers: at most d stages with W/d replicas each (2BW, section 3.3).

    Every one balances, over its stages, the larger of compute and synchronisation over W/d replicas and the cuts. Depths
    at which nothing fits into the memory limit are left out. All traffic is charged to the slowest links.
    """
    workers = problem.workers
    bandwidth = min(level.bandwidth for level in problem.levels)
    found = []
    for depth in (number for number in range(1, workers + 1) if workers % number == 0):
        width = workers // depth
        memory = problem.memory
        if memory is not None and memory.microbatches is not None:
            memory = dataclasses.replace(memory, microbatches=math.ceil(memory.microbatches / width))
        narrow = dataclasses.replace(
            problem,
            profile=_divided(problem.profile, width),
            levels=(Level(depth, bandwidth),),
            cost_model=_fixed_traffic(problem.cost_model, width, problem.microbatches),
            memory=memory,
            microbatches=None,
            max_replicas=1,
        )
        parts = solve(narrow)
        if parts is not None:
            found.append([Part(part.start, part.stop, width) for part in parts])
    return found


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


def _divided(profile: Profile, width: int) -> Profile:
    layers = tuple(
        dataclasses.replace(layer, forward=layer.forward / width, backward=layer.backward / width)
        for layer in profile.layers
    )
    return dataclasses.replace(profile, layers=layers)


def _fixed_traffic(model: CostModel, width: int, microbatches: int | None) -> CostModel:
    """The synchronisation of ``width`` replicas, per minibatch, however many a stage seems to have."""
    share = float(model.traffic(width)) / max(width, microbatches or 0)
    return dataclasses.replace(model, traffic=lambda replicas: share + 0.0 * replicas)
