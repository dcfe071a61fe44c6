"""Figures, memory curve, comparison, JSON and Chrome trace of a timeline."""

from __future__ import annotations

import dataclasses
import json

import pytest

from telltale.errors import DataError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.costs import MemoryModel, stage_memories
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.simulation.timeline import Event, Timeline
from telltale.train.pipeline.topology import Topology
from train.pipeline.simulated_runs import FREE, equal_layers, replicated, straight

PLAN = Plan.even(2, 2)
EVENTS = [
    Event(0, 0, 0, "F", 0, 0.0, 1.0, 0),
    Event(1, 1, 0, "F", 0, 1.5, 2.5, 0),
    Event(1, 1, 0, "B", 0, 2.5, 4.0, 0),
    Event(1, 1, 0, "U", 0, 4.0, 4.5, 1),
    Event(0, 0, 0, "B", 0, 5.0, 7.0, 0),
    Event(0, 0, 0, "U", 0, 7.0, 8.0, 1),
]


def test_figures_of_a_run_written_by_hand():
    run = Timeline.from_events(reversed(EVENTS), PLAN)
    assert run.events == tuple(EVENTS)
    assert (run.title, run.ranks, run.makespan) == ("stash 1-1, recorded", 2, 8.0)
    assert (run.busy, run.idle) == ((4.0, 3.0), (4.0, 5.0))
    assert run.utilisation == 7 / 16
    assert run.bubble_fraction == 9 / 16
    assert run.seconds_per_minibatch == 8.0
    assert run.live(0) == [(0.0, 1), (7.0, 0)]
    assert run.peak_live(1) == 1
    with pytest.raises(PlanError, match="no sizes"):
        run.memory(0)
    empty = Timeline.from_events([], PLAN)
    assert (empty.makespan, empty.utilisation, empty.seconds_per_minibatch, empty.peak_live(0)) == (0.0, 0.0, 0.0, 0)


def test_the_slope_leaves_out_fill_and_drain():
    for replicas, policy, m, expected in [
        ([1, 1, 1], "stash", 1, 3.0),
        ([2, 1], "stash", 1, 3.0),
        ([3, 3], "2bw", 6, 1.0),
    ]:
        run = simulate(replicated(replicas, policy, m), equal_layers(len(replicas)), FREE, minibatches=48)
        assert run.seconds_per_minibatch == pytest.approx(expected)
        assert run.makespan / 48 > expected
    drained = straight(2, "flush", minibatches=32, microbatches=4)
    assert drained.seconds_per_minibatch == pytest.approx((4 + 1) * 3 / 4)


@pytest.mark.long
def test_the_memory_curve_peaks_where_the_memory_model_says():
    profile = equal_layers(4, activation=3.0, parameters=10.0, saved=7.0)
    for policy in ("stash", "vertical", "2bw", "flush", "gpipe", "none"):
        for recompute in (False, True):
            for replicas in ((1, 1, 1, 1), (2, 1, 1, 1)):
                plan = dataclasses.replace(replicated(list(replicas), policy, 8), recompute=recompute)
                run = simulate(plan, profile, Topology.flat(5, bandwidth=1e9), minibatches=48)
                model = MemoryModel(policy, 2.0, 8, recompute=recompute)
                predicted = stage_memories(profile, [1, 2, 3], replicas, model)
                for rank in range(run.ranks):
                    assert run.peak_memory(rank) == pytest.approx(predicted[plan.place(rank)[0]]), (
                        policy,
                        replicas,
                        rank,
                    )
                    # Weights, gradients and two copies in the optimizer are there all the time, and are what is left.
                    assert min(size for _, size in run.memory(rank)) >= 40.0
                    assert run.memory(rank)[-1][1] == pytest.approx(40.0)


def test_one_run_over_another():
    slow, fast = straight(2, forward=2.0, backward=4.0, update=0.5), straight(2, update=0.25)
    comparison = slow.compare(fast)
    assert comparison.seconds_ratio == pytest.approx(6.5 / 3.25)
    assert comparison.makespan_ratio == pytest.approx(slow.makespan / fast.makespan)
    assert comparison.medians[1, "B"] == (pytest.approx(4.0), pytest.approx(2.0))
    assert set(comparison.medians) == {(stage, kind) for stage in (0, 1) for kind in "FBU"}
    # What a worker waits for the other replicas counts as update on both sides: recorded runs do not tell them apart.
    topology = Topology.flat(2, bandwidth=1.0)
    run = simulate(replicated([2]), equal_layers(1, parameters=4.0, update=1.0), topology, minibatches=8)
    assert run.compare(run).medians[0, "U"] == (pytest.approx(5.0), pytest.approx(5.0))
    with pytest.raises(DataError, match="different stages"):
        slow.compare(straight(3))
    with pytest.raises(DataError, match="nothing to compare"):
        slow.compare(Timeline.from_events([], PLAN))


def test_events_that_cannot_be_are_refused():
    for change in ({"end": -1.0}, {"start": float("nan")}):
        with pytest.raises(DataError, match=r"F0 of rank 0 .* expected start <= end"):
            Timeline.from_events([dataclasses.replace(EVENTS[0], **change)], PLAN)
    for change in ({"rank": 2}, {"stage": 2}):
        with pytest.raises(DataError, match="outside the plan 1-1"):
            Timeline.from_events([dataclasses.replace(EVENTS[0], **change)], PLAN)


def test_json_keeps_everything(tmp_path):
    plan = dataclasses.replace(replicated([2, 1], "2bw", 4), recompute=True)
    profile = equal_layers(2, activation=1.0, parameters=1.0, saved=2.0)
    run = simulate(plan, profile, FREE, minibatches=8)
    run.save(tmp_path / "run.json")
    again = Timeline.load(tmp_path / "run.json")
    assert again == run
    assert again.peak_memory(0) == run.peak_memory(0)
    hand = Timeline.from_events(EVENTS, PLAN, label="by hand")
    hand.save(tmp_path / "hand.json")
    assert Timeline.load(tmp_path / "hand.json") == hand


def test_a_damaged_file_says_what_is_wrong(tmp_path):
    path = tmp_path / "run.json"
    with pytest.raises(DataError, match="cannot be read"):
        Timeline.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Timeline.load(path)
    path.write_text('{"format": "something"}')
    with pytest.raises(DataError, match="not a pipeline timeline"):
        Timeline.load(path)
    straight(1).save(path)
    document = json.loads(path.read_text())
    for damage in ({"policy": None}, {"events": [[0]]}, {"extra": 1}):
        changed = {key: value for key, value in {**document, **damage}.items() if value is not None or key == "sizes"}
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match="missing or unknown field"):
            Timeline.load(path)


def test_the_chrome_trace_is_well_formed(tmp_path):
    run = straight(2, minibatches=4, activation=2.0, update=0.5)
    run.save_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    records = trace["traceEvents"]
    names = {record["pid"]: record["args"]["name"] for record in records if record["ph"] == "M"}
    assert names == {0: "rank 0", 1: "rank 1"}
    whole = [record for record in records if record["ph"] == "X"]
    assert len(whole) == 2 * (4 + 4 + 4)
    assert all(record["dur"] >= 0 and {"name", "cat", "ts", "pid", "tid", "args"} <= set(record) for record in whole)
    forward = next(record for record in whole if record["name"] == "F 1" and record["pid"] == 1)
    event = next(event for event in run.events if (event.kind, event.minibatch, event.rank) == ("F", 1, 1))
    assert forward["ts"] == pytest.approx(1e6 * event.start)
    assert forward["args"] == {"minibatch": 1, "stage": 1, "replica": 0, "version": event.version}
    begun = {record["id"]: record for record in records if record["ph"] == "b"}
    ended = {record["id"]: record for record in records if record["ph"] == "e"}
    assert set(begun) == set(ended)
    assert len(begun) == 2 * 4
    assert all(ended[key]["ts"] - begun[key]["ts"] == pytest.approx(2e6) for key in begun)
    assert all(
        record["args"]["bytes"] == 2.0 and record["args"]["to rank"] == 1 - record["pid"] for record in begun.values()
    )
