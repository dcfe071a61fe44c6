"""A profile that reproduces what a recorded run took, so that the simulator can be judged on its model alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from statistics import fmean

from telltale.errors import DataError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.explanation import arranged
from telltale.train.pipeline.profiling.profile import LayerProfile, Profile
from telltale.train.pipeline.profiling.topology import Topology
from telltale.train.pipeline.simulation.network import Network
from telltale.train.pipeline.simulation.timeline import Timeline


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
            if stage.replicas == 1:
                figures["update"] = step
            elif topology is not None:
                figures["update"] = max(0.0, step - _all_reduce_seconds(plan, number, own, topology))
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
