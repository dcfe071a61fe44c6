from __future__ import annotations

import dataclasses
from functools import partial

from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning import planner
from telltale.train.pipeline.planning.costs import cost_model_of, cost_of_stages
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.topology import Level, Topology

plan = partial(planner.plan, cost_model="ring")
"""By the equations of the papers; plans by simulation are in ``test_search``."""

RING = cost_model_of("ring")


def chain(*layers: tuple[float, float]) -> Profile:
    """Layers of 3 s with the given (activation bytes, parameter bytes)."""
    return Profile(tuple(LayerProfile(f"l{i}", 1.0, 2.0, a, w) for i, (a, w) in enumerate(layers)))


def test_an_inner_pipeline_that_is_replicated_has_one_part_of_each_stage_per_machine() -> None:
    """A wide cut and few weights: both stages on each machine. Minibatch t stays in one machine all its way."""
    levels = (Level(4, 100.0), Level(2, 1.0))
    found = cost_of_stages(chain((90.0, 0.1), (1.0, 0.1)), [0, 1, 2], [4, 4], levels, RING)
    machine_of = {(stage, replica): worker // 4 for stage, replica, worker in found.places}
    assert len(machine_of) == 8
    assert sorted(worker for _, _, worker in found.places) == list(range(8))
    for replica in range(4):
        assert machine_of[0, replica] == machine_of[1, replica]
    assert sum(machine_of.values()) == 4
    assert found.ranks() == (0, 4, 1, 5, 2, 6, 3, 7)


def test_heavy_weights_keep_the_replicas_of_a_stage_on_one_machine() -> None:
    levels = (Level(4, 100.0), Level(2, 1.0))
    found = cost_of_stages(chain((0.1, 400.0), (0.1, 400.0)), [0, 1, 2], [4, 4], levels, RING)
    machines = {stage: {w // 4 for s, _, w in found.places if s == stage} for stage in (0, 1)}
    assert machines == {0: {0}, 1: {1}}
    assert found.ranks() is None


def test_the_simulator_confirms_the_placement() -> None:
    profile = chain((90.0, 0.1), (1.0, 0.1))
    topology = Topology((Level(4, 100.0), Level(2, 1.0)))
    ranks = cost_of_stages(profile, [0, 1, 2], [4, 4], topology.levels, RING).ranks()
    in_order = Plan.manual([[0], [1]], replicas=[4, 4])
    placed = dataclasses.replace(in_order, placement=ranks)
    seconds = [simulate(each, profile, topology).seconds_per_minibatch for each in (placed, in_order)]
    assert seconds[0] < 0.1 * seconds[1]


def test_the_planner_hands_the_placement_on() -> None:
    """Wide cuts and uneven layers on slow machines: a replicated inner pipeline."""
    layers = (("a", 1.0, 10.0, 1.0), ("b", 1.0, 0.01, 30.0))
    profile = Profile(tuple(LayerProfile(name, f, 2 * f, a, w) for name, f, a, w in layers))
    topology = Topology((Level(2, 100.0), Level(2, 4.0)))
    chosen = plan(profile, topology, policy="stash")
    wanted = cost_of_stages(
        profile, [0, *(s.layers[-1] + 1 for s in chosen.stages)], chosen.replicas, topology.levels, RING
    )
    assert chosen.placement == (wanted.ranks() if len(chosen.stages) > 1 else None)


def test_ranks_leave_out_workers_that_are_not_used() -> None:
    levels = (Level(4, 100.0), Level(2, 1.0))
    found = cost_of_stages(chain((90.0, 0.1), (1.0, 0.1)), [0, 1, 2], [2, 2], levels, RING)
    ranks = found.ranks()
    assert ranks is None or sorted(ranks) == [0, 1, 2, 3]
