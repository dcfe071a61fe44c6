"""What a plan says of itself against the simulator and an exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
import re
from functools import partial

import pytest

from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning import planner
from telltale.train.pipeline.planning.candidates import best_candidate
from telltale.train.pipeline.planning.costs import COST_MODELS, MemoryModel, PlanInfeasible, stage_memories
from telltale.train.pipeline.planning.partition import Problem
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.topology import Level, Topology
from train.pipeline.made_profiles import chain, random_chain

plan = partial(planner.plan, cost_model="ring")
"""By the equations of the papers; plans by simulation are in ``test_search``."""


@pytest.mark.long
@pytest.mark.parametrize("policy", ["flush", "gpipe", "2bw"])
@pytest.mark.parametrize("m", [3, 4, 5, 7, 8])
def test_a_batch_that_the_replicas_do_not_divide_is_priced_as_it_runs(policy: str, m: int) -> None:
    """4 replicas, 6 s per minibatch, nothing to average: ceil(m / 4) x 6 s per batch of m."""
    profile, topology = chain([3.0, 3.0], [1e9, 1e9], [0.0, 0.0]), Topology.flat(4, bandwidth=1.0)
    problem = Problem(profile, topology.levels, COST_MODELS["ring"])
    found = best_candidate(problem, policy, microbatches=m, recompute=False)
    assert found is not None
    assert found.plan.replicas == (4,)
    assert found.seconds == pytest.approx(math.ceil(m / 4) * 6.0 / m)
    assert found.seconds == pytest.approx(simulate(found.plan, profile, topology).seconds_per_minibatch)
    told = plan(profile, topology, policy=policy, microbatches=m).reasons
    assert any("do not divide" in sentence for sentence in told) == bool(m % 4)


def test_gradient_averaging_that_the_model_hides_and_the_trainer_does_not() -> None:
    """Two replicas of 9 s average 8 bytes in 8 s: 9 / 2 s per minibatch by the papers, (9 + 8) / 2 as it runs."""
    profile, topology = chain([3.0] * 3, [0.1] * 3, [8 / 3] * 3), Topology.flat(2, bandwidth=1.0)
    found = plan(profile, topology)
    assert (found.describe(), found.bottleneck) == ("2", pytest.approx(4.5))
    assert simulate(found, profile, topology).seconds_per_minibatch == pytest.approx(8.5)
    sentence = next(sentence for sentence in found.reasons if "averages after" in sentence)
    assert "makes it 8.5 s per minibatch and 1-1 the faster one with 6 s" in sentence
    sequential = plan(profile, topology, cost_model="official-code")
    assert sequential.describe() == "1-1"
    assert not any("averages after" in reason for reason in sequential.reasons)
    fast = plan(profile, Topology.flat(2, bandwidth=100.0))
    assert fast.describe() == "2"
    assert not any("averages after" in reason for reason in fast.reasons)


def test_data_parallelism_is_compared_with_pipelines_that_stay_full() -> None:
    """A straight pipeline of two equal halves is as fast under stash; under flush it would lose a tenth to the bubble."""
    found = plan(chain([3.0] * 4, [0.1] * 4, [0.1] * 4), Topology.flat(2, bandwidth=10.0))
    assert (found.describe(), found.policy) == ("2", "flush")
    assert any("1-1 cut before layers 2 under stash, 6 s per minibatch, 0.0% slower" in s for s in found.reasons)


def least_memory(profile, workers: int, model: MemoryModel) -> float:
    """Of all partitions and replications, all of which find room on flat machines."""
    n_layers = len(profile.layers)
    return min(
        max(stage_memories(profile, list(cuts), replicas, model))
        for depth in range(1, min(n_layers, workers) + 1)
        for cuts in itertools.combinations(range(1, n_layers), depth - 1)
        for replicas in itertools.product(range(1, workers + 1), repeat=depth)
        if sum(replicas) <= workers
    )


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_a_level_of_one_component_changes_nothing(recompute: bool) -> None:
    for seed in range(12):
        generator = random.Random(seed)
        profile = random_chain(generator, 4)
        limit = least_memory(profile, 3, MemoryModel("stash", 2.0, recompute=recompute)) * 1.000001
        options = {"policy": "stash", "recompute": recompute, "memory": limit}
        flat = plan(profile, Topology.flat(3, bandwidth=1.0), **options)
        levels = plan(profile, Topology((Level(1, 5.0), Level(3, 1.0), Level(1, 0.1))), **options)
        assert (levels.stages, levels.bottleneck) == (flat.stages, flat.bottleneck), seed


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stash", "vertical", "2bw", "flush"])
def test_on_levels_a_straight_pipeline_that_fits_is_found(policy: str) -> None:
    """On 2 x 2 workers the table counts too many minibatches in flight; what it misses is looked for on flat machines."""
    topology = Topology((Level(2, 3.0), Level(2, 1.0)))
    for seed in range(12):
        profile = random_chain(random.Random(seed), 4)
        model = MemoryModel(policy, 2.0, recompute=True)
        limit = max(stage_memories(profile, [1, 2, 3], (1, 1, 1, 1), model)) * 1.000001
        found = plan(profile, topology, policy=policy, recompute=True, memory=limit)
        assert max(stage.memory or 0.0 for stage in found.stages) <= limit


@pytest.mark.slow
def test_what_is_missing_is_never_negative() -> None:
    for seed in range(40):
        generator = random.Random(seed)
        profile = random_chain(generator, 4)
        topology = Topology((Level(generator.randint(1, 3), 3.0), Level(generator.randint(1, 2), 1.0)))
        model = MemoryModel("flush", 2.0, recompute=True)
        limit = least_memory(profile, topology.workers, model) * generator.choice([0.9, 0.99, 0.9999])
        with pytest.raises(PlanInfeasible) as error:
            plan(profile, topology, policy="flush", recompute=True, memory=limit)
        missing = re.search(r"lacks (\S+) bytes\.|, (\S+) bytes more", str(error.value))
        assert missing, str(error.value)
        assert float(missing.group(1) or missing.group(2)) > 0


def test_on_a_shared_link_plans_are_compared_by_simulation() -> None:
    """Heavy weights and one pipe for all traffic: what is planned is the fastest of data parallel and straight."""
    layers = tuple(LayerProfile(f"l{i}", i / 1e3, 2 * i / 1e3, 256.0, 1e6) for i in range(2, 10))
    shared = Topology.flat(4, bandwidth=1.2e8, shared_link=True)
    chosen = plan(Profile(layers), shared, policy="stash")
    data_parallel = Plan.manual([range(8)], replicas=[4])
    seconds = [simulate(each, Profile(layers), shared).seconds_per_minibatch for each in (chosen, data_parallel)]
    assert len(chosen.stages) > 1
    assert seconds[0] < 0.5 * seconds[1]
    assert any("shares one link" in reason for reason in chosen.reasons)
    own = plan(Profile(layers), Topology.flat(4, bandwidth=1.2e8), policy="stash")
    assert not any("shares one link" in reason for reason in own.reasons)
