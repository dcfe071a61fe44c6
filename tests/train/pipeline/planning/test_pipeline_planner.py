"""Whole plans: golden shapes by formula, the properties that any optimum has, the choice of policy, and refusals."""

from __future__ import annotations

import dataclasses
import math
import random
from functools import partial
from pathlib import Path

import pytest

from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning import planner
from telltale.train.pipeline.planning.costs import COST_MODELS, PlanInfeasible
from telltale.train.pipeline.planning.explain import explain
from telltale.train.pipeline.profile import LayerProfile, Profile, arranged
from telltale.train.pipeline.schedule import noam, policy_of
from telltale.train.pipeline.topology import Level, Topology
from train.pipeline.made_profiles import chain, random_chain, vgg_like

plan = partial(planner.plan, cost_model="ring")
"""By the equations of the papers; plans by simulation are in ``test_search``."""


def test_vgg_like_is_fifteen_to_one() -> None:
    """60 s over 15 workers and 4 s on one; data parallelism would move 2 (15/16) 560 bytes per round of 16."""
    found = plan(vgg_like(), Topology.flat(16, bandwidth=15.0))
    assert found.describe() == "15-1"
    assert found.stages[0].layers == tuple(range(10))
    assert found.policy == "stash"
    assert found.bottleneck == pytest.approx(4.0)
    first, last = found.stages
    assert first.compute == pytest.approx(60.0)
    assert first.synchronisation == pytest.approx(2 * 14 / 15 * 60 / 15)
    assert (first.cut_bytes, last.cut_bytes) == (20.0, 0.0)
    data_parallel = 2 * 15 / 16 * 560 / 15 / 16
    gap = 100 * (data_parallel / 4.0 - 1)
    assert any(
        f"Runner-up: 16 under stash, {data_parallel:.4g} s" in s or f"{gap:.1f}% slower" in s for s in found.reasons
    )


def test_few_parameters_and_large_outputs_are_data_parallel() -> None:
    profile = chain([2.0] * 8, [500.0] * 8, [1.0] * 8)
    found = plan(profile, Topology.flat(16, bandwidth=10.0))
    assert (found.describe(), found.policy, found.microbatches) == ("16", "flush", 16)
    assert found.bottleneck == pytest.approx(1.0)
    assert any("plain data parallelism" in sentence for sentence in found.reasons)


def test_many_parameters_and_small_outputs_are_a_straight_pipeline() -> None:
    profile = chain([2.0] * 4, [1.0] * 4, [100.0] * 4)
    found = plan(profile, Topology.flat(4, bandwidth=10.0))
    assert found.describe() == "1-1-1-1"
    assert found.bottleneck == pytest.approx(2.0)


def bottleneck(profile: Profile, workers: int, bandwidth: float, name: str, **options) -> float:
    return plan(profile, Topology.flat(workers, bandwidth=bandwidth), cost_model=name, **options).bottleneck


@pytest.mark.long
@pytest.mark.parametrize("name", COST_MODELS)
def test_properties_of_an_optimum(name: str) -> None:
    generator = random.Random(f"properties {name}")
    for _ in range(4):
        profile = random_chain(generator, generator.randint(2, 10))
        found = [bottleneck(profile, workers, 2.0, name) for workers in (1, 2, 3, 5, 8)]
        assert found == sorted(found, reverse=True)
        faster = [bottleneck(profile, 5, bandwidth, name) for bandwidth in (0.2, 1.0, 5.0, 50.0)]
        assert faster == sorted(faster, reverse=True)

        for workers, value in zip((1, 2, 3, 5, 8), found, strict=True):
            largest = max(layer.compute for layer in profile.layers)
            assert value >= max(profile.compute, largest) / workers * (1 - 1e-9)
        assert bottleneck(profile, 5, 1e12, name) == pytest.approx(profile.compute / 5)
        alone = plan(profile, Topology.flat(5, bandwidth=1e-9), cost_model=name)
        assert alone.workers == 1 or alone.bottleneck < profile.compute
        if all(layer.activation_bytes > 0 and layer.parameter_bytes > 0 for layer in profile.layers):
            assert alone.workers == 1

        # Seconds and bytes three times as many, or the bandwidth a third with three times the seconds.
        thrice = tuple(
            dataclasses.replace(
                layer,
                forward=3 * layer.forward,
                backward=3 * layer.backward,
                activation_bytes=3 * layer.activation_bytes,
                parameter_bytes=3 * layer.parameter_bytes,
            )
            for layer in profile.layers
        )
        assert bottleneck(Profile(thrice), 3, 2.0, name) == pytest.approx(3 * found[2])

        place = generator.randrange(len(profile.layers))
        nothing = LayerProfile("nothing", 0.0, 0.0, profile.layers[place].activation_bytes, 0.0)
        padded = Profile((*profile.layers[: place + 1], nothing, *profile.layers[place + 1 :]))
        assert bottleneck(padded, 3, 2.0, name) == pytest.approx(found[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring", "v1", "official-code"])
def test_two_levels_of_one_bandwidth_are_never_better_than_flat(name: str) -> None:
    """With free cuts. The recursion lets the copies of an inner pipeline have their cuts on links of their own, and the
    literal formula charges a round of many replicas more than two rounds of few, so that neither holds for those.
    """
    generator = random.Random(f"equal levels {name}")
    for _ in range(8):
        layers = random_chain(generator, generator.randint(2, 9)).layers
        profile = Profile(tuple(dataclasses.replace(layer, activation_bytes=0.0) for layer in layers))
        levels = plan(profile, Topology((Level(2, 2.0), Level(3, 2.0))), cost_model=name).bottleneck
        assert levels >= bottleneck(profile, 6, 2.0, name) * (1 - 1e-9)


def test_every_layer_is_in_one_stage_and_noam_feeds_all_workers() -> None:
    generator = random.Random(8)
    for _ in range(10):
        profile = random_chain(generator, generator.randint(1, 12))
        topology = Topology((Level(generator.randint(1, 3), 5.0), Level(generator.randint(1, 3), 1.0)))
        found = plan(profile, topology)
        assert [index for stage in found.stages for index in stage.layers] == list(range(len(profile.layers)))
        assert [name for stage in found.stages for name in stage.names] == [layer.name for layer in profile.layers]
        assert found.workers <= topology.workers
        assert noam(found.replicas) * found.replicas[0] >= found.workers
        policy_of(found)
        rows = explain(found, profile, topology)
        assert max(max(row.compute, row.synchronisation, row.cut) for row in rows) == pytest.approx(found.bottleneck)
        assert sum(bool(row.bottleneck) for row in rows) == 1


@pytest.mark.long
def test_more_memory_is_never_slower() -> None:
    generator = random.Random(9)
    topology = Topology.flat(4, bandwidth=1.0)
    for _ in range(6):
        profile = random_chain(generator, 8)
        times = []
        for limit in (20.0, 40.0, 60.0, 100.0, 1000.0):
            try:
                times.append(plan(profile, topology, memory=limit, policy="stash", recompute=False).bottleneck)
            except PlanInfeasible:
                times.append(math.inf)
        assert times == sorted(times, reverse=True)
        assert times[-1] == plan(profile, topology).bottleneck


HEAVY = chain([1.0] * 4, [1.0] * 4, [100.0] * 4, [10.0] * 4)
"""Four layers of which no two fit on a worker: 700 bytes + 4 x 10 for stash in stage 0, 500 for 2bw, 400 for flush."""


@pytest.mark.parametrize(
    ("limit", "policy", "recompute"),
    [(740.0, "stash", False), (739.0, "2bw", False), (539.0, "flush", False), (439.0, "flush", True)],
)
def test_the_first_policy_that_fits(limit: float, policy: str, recompute: bool) -> None:
    found = plan(HEAVY, Topology.flat(4, bandwidth=10.0), memory=limit)
    assert (found.policy, found.recompute, found.describe()) == (policy, recompute, "1-1-1-1")
    assert max(stage.memory or math.inf for stage in found.stages) <= limit
    assert any(policy in sentence for sentence in found.reasons)
    if policy != "stash":
        assert any("no plan under stash" in sentence for sentence in found.reasons)
    policy_of(found)


def test_a_later_policy_is_taken_where_it_saves_a_tenth() -> None:
    """Only with recomputation can the cheap cut be used: two minibatches of two layers in flight are 240 bytes."""
    profile = chain([2.0, 2.0, 4.0], [50.0, 1.0, 1.0], [0.1] * 3, [60.0] * 3)
    topology = Topology.flat(2, bandwidth=2.0)
    found = plan(profile, topology, memory=130.0)
    assert (found.policy, found.recompute) == ("stash", True)
    assert found.stages[0].layers == (0, 1)
    # Two thirds of the compute is backward: recomputing adds the forward's third.
    assert found.bottleneck == pytest.approx(4.0 * 4 / 3)
    assert any("stash would take 50 s" in sentence for sentence in found.reasons)
    kept = plan(profile, topology, memory=130.0, recompute=False)
    assert (kept.bottleneck, kept.recompute) == (50.0, False)


def test_infeasible_names_the_layer_and_the_missing_bytes() -> None:
    with pytest.raises(PlanInfeasible, match=r"layer 'layer0' alone needs 410 bytes .* 10 bytes more than the 400"):
        plan(HEAVY, Topology.flat(4, bandwidth=1.0), memory=400.0)


def test_infeasible_names_the_stage_and_the_missing_bytes() -> None:
    """On two workers two layers must share one: 4 x 200 + 20 + 1 bytes or more under flush with recomputation."""
    with pytest.raises(
        PlanInfeasible, match=r"2 workers .*500 bytes.* stage \d \(layers 'layer\d' to 'layer\d'\) lacks 3\d\d"
    ):
        plan(HEAVY, Topology.flat(2, bandwidth=1.0), memory=500.0)
    assert issubclass(PlanInfeasible, PlanError)


def test_microbatches_by_rule_or_as_given() -> None:
    profile, topology = vgg_like(), Topology.flat(16, bandwidth=15.0)
    double = plan(profile, topology, policy="2bw")
    assert double.microbatches == 15
    assert policy_of(double).microbatches == 15
    flush = plan(HEAVY, Topology.flat(4, bandwidth=1.0), policy="flush")
    assert flush.microbatches == 4 * len(flush.stages)
    assert plan(HEAVY, Topology.flat(4, bandwidth=1.0), policy="flush", microbatches=6).microbatches == 6
    with pytest.raises(PlanError, match=r"microbatches=1 is too few for 2bw on 1-1-1-1.*such as 4"):
        plan(HEAVY, Topology.flat(4, bandwidth=1.0), policy="2bw", microbatches=1, memory=550.0)


def test_a_short_batch_makes_a_short_pipe() -> None:
    """With one minibatch per batch a pipe gains nothing over one worker; with many it does."""
    profile = chain([1.0] * 4, [0.001] * 4, [1000.0] * 4)
    topology = Topology.flat(4, bandwidth=1.0)
    assert plan(profile, topology, policy="flush", microbatches=1).describe() == "1"
    assert plan(profile, topology, policy="flush", microbatches=64).describe() == "1-1-1-1"


def test_interleaved_plans() -> None:
    profile = chain([1.0] * 8, [0.01] * 8, [1000.0] * 8)
    topology = Topology.flat(2, bandwidth=10.0)
    found = plan(profile, topology, policy="interleaved", microbatches=4)
    assert (len(found.stages), found.chunks, found.bottleneck) == (4, 2, 4.0)
    assert [len(stage.layers) for stage in found.stages] == [2, 2, 2, 2]
    chosen = plan(profile, topology, synchronous=True, microbatches=4)
    assert chosen.policy == "interleaved"
    assert any("flush would take" in sentence for sentence in chosen.reasons)
    assert len(explain(found, profile, topology)) == 4
    with pytest.raises(PlanError, match="8 chunks on 2 workers need 16 stages and the profile has 8 layers"):
        plan(profile, topology, policy="interleaved", chunks=8)
    with pytest.raises(PlanError, match="microbatches=3 for 2 workers"):
        plan(profile, topology, policy="interleaved", microbatches=3)
    with pytest.raises(PlanInfeasible, match="worker 0 needs"):
        plan(profile, topology, policy="interleaved", memory=1000.0)


def test_graphs_are_planned_in_the_order_of_their_stages(tmp_path: Path) -> None:
    """Two branches of two layers: the best cut has one whole branch on each side, whatever their numbers are."""
    layers = [("in", 0.5), ("a1", 2.0), ("b1", 2.0), ("a2", 2.0), ("b2", 2.0), ("out", 0.5)]
    edges = ((0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5))
    sizes = {"in": 0.1, "a1": 9.0, "b1": 9.0, "a2": 0.1, "b2": 0.1, "out": 0.1}
    profile = Profile(
        tuple(LayerProfile(name, 0.0, seconds, sizes[name], 100.0) for name, seconds in layers), edges=edges
    )
    topology = Topology.flat(2, bandwidth=1.0)
    found = plan(profile, topology)
    assert found.bottleneck == pytest.approx(4.5)
    assert set(found.stages[0].names) in ({"in", "a1", "a2"}, {"in", "b1", "b2"})
    assert found.stages[0].cut_bytes == pytest.approx(0.2)
    assert any("is a graph" in sentence for sentence in found.reasons)
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == found
    assert [layer.name for layer in arranged(profile, again).layers][3] not in again.stages[0].names
    assert explain(again, profile, topology)[0].cut == pytest.approx(0.4)


def test_plans_by_hand_are_explained_too() -> None:
    profile, topology = vgg_like(), Topology.flat(4, bandwidth=10.0)
    rows = explain(Plan.manual([range(5), range(5, 13)], replicas=[2, 2]), profile, topology)
    assert [row.replicas for row in rows] == [2, 2]
    assert (rows[0].compute, rows[0].cut) == (15.0, 20.0)
    assert rows[1].synchronisation == pytest.approx(530 / 10 / 2)
    assert [row.bottleneck for row in rows] == ["", "synchronisation"]
    with pytest.raises(PlanError, match="5-1 does not fit on 4 workers"):
        explain(Plan.manual([range(5), range(5, 13)], replicas=[5, 1]), profile, topology)
    with pytest.raises(PlanError, match="2 layers and the profile 13"):
        explain(Plan.manual([[0], [1]]), profile, topology)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"policy": "async"}, ConfigError, "policy='async'"),
        ({"cost_model": "tree"}, ConfigError, "cost_model='tree'"),
        ({"microbatches": 0}, ConfigError, "microbatches=0"),
        ({"max_stages": 0}, ConfigError, "max_stages=0"),
        ({"memory": "lots"}, ConfigError, "memory='lots'"),
        ({"memory": 0}, ConfigError, "memory=0"),
        ({"chunks": 1}, ConfigError, "chunks=1"),
        ({"cost_model": ["ring"]}, ConfigError, r"cost_model=\['ring'\]"),
        ({"synchronous": "no"}, ConfigError, "synchronous='no'"),
        ({"use_all_workers": "no"}, ConfigError, "use_all_workers='no'"),
        ({"full_duplex": 3}, ConfigError, "full_duplex=3"),
        ({"policy": "stash", "synchronous": True}, PlanError, "'stash' is not synchronous"),
        ({"policy": "interleaved", "recompute": True}, PlanError, "interleaved plans take neither"),
    ],
)
def test_refused_options_name_themselves(options: dict, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        plan(vgg_like(), Topology.flat(4, bandwidth=10.0), **options)
