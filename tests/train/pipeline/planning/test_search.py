"""Plans by simulation: nothing that a cost model or chance makes is faster, and the time they say is the simulator's."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest

from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.costs import COST_MODELS, PlanInfeasible
from telltale.train.pipeline.planning.partition import Problem
from telltale.train.pipeline.planning.planner import plan
from telltale.train.pipeline.planning.search import EDGE, SimulatedSearch, shape_of
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.simulation.simulator import simulate, simulated_seconds
from telltale.train.pipeline.topology import Level, Topology
from train.pipeline.made_profiles import chain, random_chain, vgg_like

TOPOLOGIES = {
    "flat 4": Topology.flat(4, bandwidth=8.0),
    "2x3": Topology((Level(2, 60.0), Level(3, 6.0))),
    "flat 6, slow": Topology.flat(6, bandwidth=1.0),
}


def seconds(candidate: Plan, profile, topology) -> float:  # type: ignore[no-untyped-def]
    return simulate(candidate, profile, topology).seconds_per_minibatch


def random_plans(count: int, layers: int, workers: int, seed: int) -> list[Plan]:
    generator, plans = random.Random(seed), []
    while len(plans) < count:
        stages = generator.randint(1, min(layers, workers))
        cuts = sorted(generator.sample(range(1, layers), stages - 1))
        replicas = [1] * stages
        for _ in range(workers - stages - generator.randint(0, 1)):
            replicas[generator.randrange(stages)] += 1
        bounds = [0, *cuts, layers]
        made = Plan.manual([range(a, b) for a, b in pairwise(bounds)], replicas=replicas)
        plans.append(made)
    return plans


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_no_plan_of_a_cost_model_and_no_random_one_is_faster_by_a_twentieth(name: str) -> None:
    topology = TOPOLOGIES[name]
    profile = random_chain(random.Random(len(name)), 9)
    chosen = plan(profile, topology)
    own = seconds(chosen, profile, topology)
    assert chosen.bottleneck == pytest.approx(own, rel=1e-9)
    flat = Topology.flat(topology.workers, bandwidth=topology.levels[-1].bandwidth)
    rivals = random_plans(60, 9, topology.workers, seed=0)
    for model in COST_MODELS:
        for machines, policy in ((topology, None), (flat, None), (flat, "2bw")):
            rivals.append(plan(profile, machines, cost_model=model, policy=policy))
    for rival in rivals:
        assert own <= 1.05 * seconds(rival, profile, topology), rival.describe()


def test_averaging_that_nothing_hides_is_priced() -> None:
    """Four equal layers of 1 s: by the papers' model two replicas of two layers hide the averaging of their gradients, but the
    trainer would wait for it."""
    profile, topology = chain([1.0] * 4, [0.1] * 4, [10.0] * 4), Topology.flat(4, bandwidth=10.0)
    hidden = plan(profile, topology, cost_model="ring")
    assert max(hidden.replicas) > 1
    chosen = plan(profile, topology)
    assert chosen.describe() == "1-1-1-1"
    assert seconds(chosen, profile, topology) < 0.8 * seconds(hidden, profile, topology)


def test_a_shape_that_no_level_holds_as_whole_machines() -> None:
    """15-1 on 4 x 4: the published plan of VGG-16, which a recursion over whole machines cannot make."""
    topology = Topology((Level(4, 150.0), Level(4, 15.0)))
    assert plan(vgg_like(), topology).describe() == "15-1"
    assert plan(vgg_like(), topology, cost_model="ring").describe() != "15-1"


def test_the_reasons_say_simulation_and_the_same_plan_comes_again() -> None:
    profile, topology = random_chain(random.Random(5), 8), TOPOLOGIES["2x3"]
    first, second = plan(profile, topology), plan(profile, topology)
    assert first == second
    assert "by simulation of what the trainer does" in first.reasons[0]
    assert not any("hides gradient averaging" in reason for reason in first.reasons)


def test_limits_hold_in_the_search() -> None:
    profile, topology = chain([1.0] * 6, [0.1] * 6, [10.0] * 6), Topology.flat(3, bandwidth=100.0)
    assert len(plan(profile, topology, max_stages=1).stages) == 1
    assert plan(profile, topology, policy="flush").policy == "flush"
    assert plan(profile, topology, synchronous=True).policy in ("flush", "interleaved")
    tight = plan(profile, topology, memory=220.0)
    assert all(stage.memory is not None and stage.memory <= 220.0 for stage in tight.stages)
    with pytest.raises(PlanInfeasible, match="layer"):
        plan(profile, topology, memory=20.0)
    with pytest.raises(PlanError, match="synchronous"):
        plan(profile, topology, policy="stash", synchronous=True)


@pytest.mark.parametrize("name", ["flat 4", "2x3"])
def test_a_number_of_stages_and_straight_pipelines(name: str) -> None:
    """Nothing random of that shape is faster by a twentieth."""
    topology, profile = TOPOLOGIES[name], random_chain(random.Random(3), 9)
    rivals = random_plans(120, 9, topology.workers, seed=1)
    for asked in (2, 3):
        chosen = plan(profile, topology, policy="stash", stages=asked)
        assert len(chosen.stages) == asked
        own = seconds(chosen, profile, topology)
        for rival in rivals:
            if len(rival.stages) == asked:
                assert own <= 1.05 * seconds(rival, profile, topology), rival.describe()
    straight = plan(profile, topology, straight=True)
    assert max(straight.replicas) == 1
    whole = plan(profile, topology, straight=True, stages=topology.workers)
    assert whole.replicas == (1,) * topology.workers


def test_shapes_that_cannot_be_made_are_refused() -> None:
    profile, topology = chain([1.0] * 6, [0.1] * 6, [10.0] * 6), Topology.flat(3, bandwidth=100.0)
    with pytest.raises(PlanError, match="stages=4 is more than the 6 layers or the 3 workers; expected at most 3"):
        plan(profile, topology, stages=4)
    with pytest.raises(PlanError, match="expected no cost_model"):
        plan(profile, topology, stages=2, cost_model="ring")
    with pytest.raises(PlanError, match="no plan of exactly 1 stages was found that fits into 100 bytes"):
        plan(profile, topology, stages=1, memory=100.0)
    with pytest.raises(ConfigError, match="max_stages=2 were both given"):
        plan(profile, topology, stages=2, max_stages=2)
    with pytest.raises(PlanError, match="leave out stages"):
        plan(profile, topology, stages=2, policy="interleaved")


def test_the_quick_simulation_is_the_timeline_s_and_a_bound_is_below_it() -> None:
    generator = random.Random(11)
    for name, topology in TOPOLOGIES.items():
        profile = random_chain(generator, 9)
        for made in random_plans(12, 9, topology.workers, seed=2):
            for policy, m in (("stash", 1), ("2bw", 12), ("flush", 12)):
                candidate = dataclasses.replace(made, policy=policy, microbatches=m)
                timed = seconds(candidate, profile, topology)
                assert simulated_seconds(candidate, profile, topology) == timed, name
                problem = Problem(profile, topology.levels, COST_MODELS["ring"])
                search = SimulatedSearch(problem, topology, policy, m, False)
                assert search._at_least(shape_of(candidate)) <= timed * (1 + EDGE), (name, candidate.describe(), policy)


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_without_a_time_can_be_planned(layers: int) -> None:
    profile = Profile(tuple(LayerProfile(f"layer{i}", 0.0, 0.0, 0.0, 0.0) for i in range(layers)))
    assert plan(profile, Topology.flat(2, bandwidth=1.0)).bottleneck == 0.0


def test_an_interleaved_plan_says_its_simulated_time() -> None:
    profile, topology = chain([0.03] * 9, [1e6] * 9, [1e6] * 9), Topology.flat(4, bandwidth=1e8)
    found = plan(profile, topology, policy="interleaved")
    simulated = simulate(found, profile, topology).seconds_per_minibatch
    assert found.bottleneck == simulated
    assert f"{1e3 * simulated:.4g} ms per minibatch by simulation" in found.reasons[0]
