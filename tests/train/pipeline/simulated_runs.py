"""Profiles and runs that the tests of simulator, timeline and Gantt chart share."""

from __future__ import annotations

from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.simulation.timeline import Timeline
from telltale.train.pipeline.topology import Topology

FREE = Topology.flat(16, bandwidth=1.0)


def equal_layers(
    count: int,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    activation: float = 0.0,
    parameters: float = 0.0,
    saved: float = 0.0,
    update: float = 0.0,
) -> Profile:
    layer = (forward, backward, activation, parameters, saved, update)
    return Profile(tuple(LayerProfile(f"layer{index}", *layer) for index in range(count)))


def replicated(replicas: list[int], policy: str = "stash", microbatches: int = 1) -> Plan:
    layers = [[index] for index in range(len(replicas))]
    return Plan.manual(layers, replicas=replicas, policy=policy, microbatches=microbatches)


def straight(
    stages: int = 3, policy: str = "stash", *, minibatches: int = 12, microbatches: int = 1, **layer: float
) -> Timeline:
    plan = Plan.even(stages, stages, policy=policy, microbatches=microbatches)
    return simulate(plan, equal_layers(stages, **layer), FREE, minibatches=minibatches)
