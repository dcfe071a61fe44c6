"""The simulator against closed forms, hand calculations, and what any execution must obey."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.schedule import Operation, policy_of, warmup
from telltale.train.pipeline.simulation import simulator
from telltale.train.pipeline.simulation.simulator import Network, calibrated, simulate
from telltale.train.pipeline.topology import Level, Topology
from train.pipeline.simulated_runs import FREE, equal_layers, replicated, straight


@pytest.mark.parametrize("policy", ["flush", "gpipe"])
@pytest.mark.parametrize(("stages", "batch"), [(1, 4), (2, 2), (4, 4), (4, 8), (3, 12)])
def test_a_drained_batch_takes_m_plus_n_minus_1_slots(policy, stages, batch):
    for batches in (1, 3):
        run = straight(stages, policy, minibatches=batches * batch, microbatches=batch)
        assert run.makespan == pytest.approx(batches * (batch + stages - 1) * 3.0)
        assert run.bubble_fraction == pytest.approx((stages - 1) / (batch + stages - 1))


@pytest.mark.parametrize("policy", ["stash", "2bw", "vertical", "none"])
@pytest.mark.parametrize("stages", [1, 2, 4, 7])
def test_a_full_pipe_pays_for_one_fill_and_drain(policy, stages):
    run = straight(stages, policy, minibatches=36, microbatches=6)
    assert run.makespan == pytest.approx(36 * 3.0 + (stages - 1) * 3.0)
    assert run.seconds_per_minibatch == pytest.approx(3.0)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("workers", "batch"), [(2, 4), (4, 8), (4, 4)])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks, workers, batch):
    stages = workers * chunks
    plan = Plan.even(stages, stages, policy="interleaved", microbatches=batch, chunks=chunks)
    profile = equal_layers(stages, forward=1 / chunks, backward=2 / chunks)
    run = simulate(plan, profile, FREE, minibatches=2 * batch)
    assert run.ranks == workers
    assert run.bubble_fraction == pytest.approx((workers - 1) / (chunks * batch + workers - 1))
    assert {event.rank for event in run.events if event.stage == stages - 1} == {(stages - 1) % workers}
    done = Counter((event.stage, event.kind) for event in run.events if event.kind in "FBU")
    assert set(done.values()) == {2 * batch, 2}


def test_live_minibatches_are_the_warm_up_and_one_and_all_under_gpipe():
    for replicas in ([1, 1, 1, 1], [2, 1], [1, 2, 1], [3, 2]):
        for policy in ("stash", "2bw"):
            plan = replicated(replicas, policy, 12)
            run = simulate(plan, equal_layers(len(replicas)), FREE, minibatches=48)
            for rank in range(run.ranks):
                stage, _ = plan.place(rank)
                assert run.peak_live(rank) == warmup(plan.replicas, stage) + 1
    gpipe = straight(3, "gpipe", minibatches=16, microbatches=8)
    assert [gpipe.peak_live(rank) for rank in range(3)] == [8, 8, 8]


def test_a_link_slower_than_the_stages_sets_the_pace():
    # Each minibatch sends 10 bytes each way at 2 bytes/s: 5 s, longer than the 3 s of either stage.
    profile = equal_layers(2, activation=10.0)
    plan = Plan.even(2, 2)
    run = simulate(plan, profile, Topology.flat(2, bandwidth=2.0), minibatches=2)
    # F0 0-1, activation 1-6; F1 1-2, activation 6-11. F0' 6-7, B0' 7-9, gradient 9-14; F1' 11-12, B1' 12-14,
    # gradient 14-19. B0 14-16, B1 19-21.
    assert run.makespan == pytest.approx(21.0)
    # In flight are two minibatches, whose round trip is 1 + 5 + 3 + 5 + 2 = 16 s: 8 s each.
    longer = simulate(plan, profile, Topology.flat(2, bandwidth=2.0), minibatches=80)
    assert longer.seconds_per_minibatch == pytest.approx(8.0)
    # One pipe for both directions: 10 s of traffic per minibatch.
    shared = simulate(plan, profile, Topology.flat(2, bandwidth=2.0, shared_link=True), minibatches=80)
    assert shared.seconds_per_minibatch >= 10.0 - 1e-9
    transfers = sorted((e.start, e.end) for e in shared.events if e.bytes)
    assert all(following[0] >= before[1] - 1e-9 for before, following in itertools.pairwise(transfers))
    # Latency is paid per message and occupies no link.
    late = simulate(plan, profile, Topology.flat(2, bandwidth=2.0, latency=0.5), minibatches=2)
    assert late.makespan == pytest.approx(21.0 + 2 * 0.5)


def test_waiting_for_sends_costs_what_overlap_hides():
    profile, plan = equal_layers(2, activation=1.0), Plan.even(2, 2, policy="flush", microbatches=8)
    topology = Topology.flat(2, bandwidth=1.0)
    together = simulate(plan, profile, topology, minibatches=8)
    apart = simulate(plan, profile, topology, minibatches=8, overlap=False)
    assert apart.makespan > together.makespan
    for lane in apart.computing:
        sends = {(e.kind[0], e.minibatch): e.end for e in apart.events if e.peer is not None and e.rank == lane[0].rank}
        for before, after in itertools.pairwise(lane):
            sent = sends.get(("a" if before.kind == "F" else "g", before.minibatch), 0.0)
            assert after.start >= sent - 1e-9
    free = [simulate(plan, equal_layers(2), FREE, minibatches=8, overlap=value).makespan for value in (True, False)]
    assert free[0] == free[1]


def test_overhead_is_paid_by_every_operation():
    plain, burdened = straight(1), simulate(Plan.even(1, 1), equal_layers(1), FREE, minibatches=12, overhead=0.25)
    assert burdened.makespan == pytest.approx(plain.makespan + 12 * 3 * 0.25)


def test_an_all_reduce_starts_with_the_last_replica_and_takes_a_ring():
    # 2 (m - 1) / m of 6 bytes at 2 bytes/s for m = 3: 4 s.
    plan = replicated([3])
    run = simulate(plan, equal_layers(1, parameters=6.0, update=0.5), Topology.flat(3, bandwidth=2.0), minibatches=3)
    assert run.makespan == pytest.approx(3.0 + 4.0 + 0.5)
    reduced = [event for event in run.events if event.kind == "A"]
    assert [event.bytes for event in reduced] == [pytest.approx(8.0)] * 3
    # A round that is too short still has all replicas: the third comes at once and waits.
    ragged = simulate(plan, equal_layers(1, parameters=6.0), Topology.flat(3, bandwidth=2.0), minibatches=2)
    assert sorted((e.start, e.end) for e in ragged.events if e.kind == "A") == [(0.0, 7.0), (3.0, 7.0), (3.0, 7.0)]
    # On one shared pipe all that the three send passes one after the other.
    pipe = Topology.flat(3, bandwidth=2.0, shared_link=True)
    shared = simulate(plan, equal_layers(1, parameters=6.0), pipe, minibatches=3)
    assert shared.makespan == pytest.approx(3.0 + 12.0)


def test_messages_cross_the_innermost_level_that_joins_two_workers():
    topology = Topology((Level(2, 8.0), Level(2, 1.0)))
    network = Network(topology, 4)
    assert [network.level(0, peer) for peer in (1, 2, 3)] == [0, 1, 1]
    assert network.send(0, 1, 8.0, 0.0) == (0.0, 1.0)
    assert network.send(0, 2, 8.0, 0.0) == (0.0, 8.0)
    # Worker 1 leaves through the same card as worker 0, and comes after it; the way back is free.
    assert network.send(1, 3, 8.0, 0.5) == (8.0, 16.0)
    assert network.send(3, 1, 8.0, 0.5) == (0.5, 8.5)
    assert Network(topology, 4).all_reduce([0, 1, 2, 3], 2.0, 1.0) == (1.0, 1.0 + 2 * 3 / 4 * 2.0)
    assert Network(topology, 4).all_reduce([2, 3], 8.0, 0.0) == (0.0, 1.0)
    paired = Network(Topology.flat(3, bandwidth=1.0), 3, link_model="pair")
    assert (paired.send(0, 1, 2.0, 0.0), paired.send(0, 2, 2.0, 0.0)) == ((0.0, 2.0), (0.0, 2.0))
    ported = Network(Topology.flat(3, bandwidth=1.0), 3)
    assert (ported.send(0, 1, 2.0, 0.0), ported.send(0, 2, 2.0, 0.0)) == ((0.0, 2.0), (2.0, 4.0))


def test_recomputing_runs_the_forward_again():
    plan = Plan.even(1, 1, recompute=True)
    assert simulate(plan, equal_layers(1), FREE, minibatches=10).makespan == pytest.approx(10 * (1 + 2 + 1))


def test_a_later_run_goes_on_with_absolute_numbers():
    plan = replicated([2, 1])
    later = simulate(plan, equal_layers(2), FREE, minibatches=8, start=6)
    assert later.minibatches == tuple(range(6, 14))
    fresh = simulate(plan, equal_layers(2), FREE, minibatches=8)
    assert [dataclasses.replace(e, minibatch=0, version=None) for e in later.events] == [
        dataclasses.replace(e, minibatch=0, version=None) for e in fresh.events
    ]


times = st.floats(0.01, 4.0)
layers = st.tuples(
    times, times, st.sampled_from([0.0, 1.0, 7.5]), st.sampled_from([0.0, 2.0, 9.0]), st.just(1.0), times
)
shapes = st.sampled_from([(2, 1), (1, 2, 1), (3, 2), (1, 1, 1, 1), (1, 3), (2, 2), (4,), (2, 1, 3)])
topologies = st.sampled_from(
    [
        Topology.flat(8, bandwidth=3.0),
        Topology.flat(8, bandwidth=1e9),
        Topology.flat(8, bandwidth=2.0, latency=0.1, shared_link=True),
        Topology((Level(2, 8.0), Level(4, 1.0))),
    ]
)


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    policy=st.sampled_from(["stash", "vertical", "2bw", "flush", "gpipe", "none"]),
    data=st.data(),
    topology=topologies,
    overlap=st.booleans(),
    link_model=st.sampled_from(["port", "pair"]),
    count=st.integers(1, 25),
)
def test_any_run_obeys_causality_and_loses_nothing(shape, policy, data, topology, overlap, link_model, count):
    plan = replicated(list(shape), policy, 12)
    figures = data.draw(st.lists(layers, min_size=len(shape), max_size=len(shape)))
    profile = Profile(tuple(LayerProfile(f"l{index}", *values) for index, values in enumerate(figures)))
    run = simulate(plan, profile, topology, minibatches=count, overlap=overlap, link_model=link_model)
    rule, last = policy_of(plan), len(shape) - 1
    at = {(e.kind, e.stage, e.minibatch): e for e in run.events if e.kind in "FB"}
    assert len(at) == 2 * len(shape) * count
    sent = {(e.kind, e.stage, e.minibatch): e for e in run.events if e.peer is not None}
    for (kind, stage, t), event in at.items():
        assert event.rank == plan.rank(stage, t % shape[stage])
        if kind == "F":
            assert event.version == rule.version(stage, t)
            assert event.end <= at["B", stage, t].start
            if stage:
                message = sent["activation", stage - 1, t]
                assert at["F", stage - 1, t].end <= message.start <= message.end <= event.start
        else:
            assert event.version == rule.backward_version(stage, t)
            if stage < last:
                message = sent["gradient", stage + 1, t]
                assert at["B", stage + 1, t].end <= message.start <= message.end <= event.start
    for lane in run.computing:
        assert all(after.start >= before.end for before, after in itertools.pairwise(lane))
        made = {event.version: event.end for event in lane if event.kind == "U"}
        for event in lane:
            if event.kind != "U" and event.version in made:
                assert made[event.version] <= event.start
    carried = defaultdict(float)
    for event in sent.values():
        carried[min(event.stage, plan.place(event.peer)[0])] += event.bytes
    for stage in range(last):
        assert carried[stage] == pytest.approx(2 * count * profile.layers[stage].activation_bytes)
    assert math.fsum(run.busy) + math.fsum(run.idle) == pytest.approx(run.ranks * run.makespan)
    assert min(run.idle) >= -1e-9
    slowest = min(level.bandwidth for level in topology.levels)
    fastest = max(level.bandwidth for level in topology.levels)
    path = profile.compute + 2 * math.fsum(layer.activation_bytes for layer in profile.layers[:last]) / fastest
    assert run.makespan >= path * (1 - 1e-9)
    for stage, layer in enumerate(profile.layers):
        assert run.makespan >= math.ceil(count / shape[stage]) * layer.compute * (1 - 1e-9)
    if topology.shared_link:
        assert run.makespan >= math.fsum(event.bytes for event in sent.values()) / slowest * (1 - 1e-9)
    per_link = defaultdict(list)
    for event in sent.values():
        per_link[event.rank, event.peer].append(
            (event.start, event.end, at[(event.kind == "activation" and "F") or "B", event.stage, event.minibatch].end)
        )
    for messages in per_link.values():
        messages.sort()
        assert [ready for *_, ready in messages] == sorted(ready for *_, ready in messages)
        assert [end for _, end, _ in messages] == sorted(end for _, end, _ in messages)


def test_a_schedule_that_cannot_go_on_names_who_waits(monkeypatch):
    wrong = [
        [(0, Operation("F", 0, 0)), (0, Operation("B", 0, 0)), (0, Operation("F", 1, 0)), (0, Operation("B", 1, 0))],
        [(1, Operation("F", 0, 0)), (1, Operation("F", 1, 0)), (1, Operation("B", 0, 0)), (1, Operation("B", 1, 0))],
    ]
    monkeypatch.setattr(simulator, "orders", lambda plan, start, stop: wrong)
    with pytest.raises(
        PlanError, match=r"rank 0 \(stage 0\) is at B0 .* gradient; rank 1 \(stage 1\) is at F1 .* activations"
    ):
        simulate(Plan.even(2, 2), equal_layers(2), FREE, minibatches=2)


def test_what_does_not_fit_is_refused():
    plan = Plan.even(4, 4)
    with pytest.raises(PlanError, match="4 workers; expected at most the topology's 2"):
        simulate(plan, equal_layers(4), Topology.flat(2, bandwidth=1.0))
    with pytest.raises(PlanError, match="4 layers and the profile 3"):
        simulate(plan, equal_layers(3), FREE)
    with pytest.raises(PlanError, match="inside a round"):
        simulate(replicated([2, 1]), equal_layers(2), FREE, start=1)
    with pytest.raises(ConfigError, match="link_model"):
        simulate(plan, equal_layers(4), FREE, link_model="bus")
    for fields in ({"minibatches": 0}, {"overhead": -1.0}, {"overhead": math.nan}, {"start": -4}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            simulate(plan, equal_layers(4), FREE, **fields)
    chunked = Plan.even(4, 4, policy="interleaved", microbatches=3, chunks=2)
    with pytest.raises(PlanError, match="multiple of the workers"):
        simulate(chunked, equal_layers(4), FREE)
    with pytest.raises(PlanError, match="whole batches"):
        simulate(dataclasses.replace(chunked, microbatches=4), equal_layers(4), FREE, minibatches=6)


@pytest.mark.long
def test_sixteen_workers_and_a_thousand_minibatches_take_seconds():
    began = time.process_time()
    run = simulate(Plan.even(16, 16), equal_layers(16, activation=0.1), FREE, minibatches=1000)
    assert time.process_time() - began < 10.0
    assert run.makespan >= 3000.0


def test_a_calibrated_profile_reproduces_the_run_it_came_from():
    topology = Topology.flat(3, bandwidth=4.0)
    guessed = equal_layers(4, activation=1.0, parameters=2.0, update=0.1)
    actual = dataclasses.replace(
        guessed,
        layers=tuple(
            dataclasses.replace(layer, forward=0.5 + index, backward=1.5 * (1 + index), update=0.2 + 0.1 * index)
            for index, layer in enumerate(guessed.layers)
        ),
    )
    for recompute in (False, True):
        plan = Plan.manual([[0, 1], [2, 3]], replicas=[2, 1], recompute=recompute)
        run = simulate(plan, actual, topology, minibatches=24)
        # A recorded update has the all-reduce in it.
        waits = {(e.rank, e.version): e.start for e in run.events if e.kind == "A"}
        recorded = dataclasses.replace(
            run,
            events=tuple(
                dataclasses.replace(e, start=waits.get((e.rank, e.version), e.start)) if e.kind == "U" else e
                for e in run.events
                if e.kind in "FBU"
            ),
        )
        again = simulate(plan, calibrated(guessed, recorded, plan, topology=topology), topology, minibatches=24)
        assert again.makespan == pytest.approx(run.makespan)
        assert again.seconds_per_minibatch == pytest.approx(run.seconds_per_minibatch)
        kept = calibrated(guessed, recorded, plan)
        assert [layer.update for layer in kept.layers[:2]] == [0.1, 0.1]
