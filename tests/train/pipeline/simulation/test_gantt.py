"""Gantt charts: the text asserted as it is, the page by what is in it."""

from __future__ import annotations

import importlib
import sys

import pytest

from telltale.errors import ConfigError, DataError, MissingExtraError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.simulation import gantt
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.simulation.timeline import Timeline
from telltale.train.pipeline.topology import Topology
from train.pipeline.simulated_runs import equal_layers, replicated, straight

STASH = """\
stash 1-1-1, simulated: 5 minibatches in 21 s, 3 s
each, 29% idle
rank 0 F0F1F2.........B0--F3B1---F4B2--..B3---..B4--
rank 1 ..F0F1.....B0--F2B1--F3-B2--F4B3--..B4---....
rank 2 ....F0B0---F1B1--F2B2---F3B3--F4B4--.........
       0 s                                      21 s
F forward, B backward, U update, = all-reduce, .
idle; digits are minibatches"""

FLUSH = """\
flush 2-1, simulated: 4 minibatches in 17 s,
4.25 s each, 37% idle
rank 0 F0F2....B0--........B2--========U3......
rank 1 F1F3..........B1--........B3--==U3......
rank 2 ..F0B0--F1B1--F2B2--F3B3--U3............
       0 s                                 20 s
F forward, B backward, U update, = all-reduce,
. idle; digits are minibatches"""


def test_a_straight_pipe_as_text():
    assert gantt.text(straight(minibatches=5), width=52) == STASH


def test_replicas_all_reduces_and_updates_as_text():
    run = simulate(
        replicated([2, 1], "flush", 4),
        equal_layers(2, parameters=1.0, update=1.0),
        Topology.flat(3, bandwidth=1.0),
        minibatches=4,
    )
    assert gantt.text(run, width=7 + 40, window=(0.0, 20.0)) == FLUSH


@pytest.mark.parametrize("width", [20, 57, 80, 200])
def test_every_line_fits_the_width(width):
    run = straight(4, minibatches=300, update=0.25)
    lines = gantt.text(run, width=width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("rank")]
    assert len(rows) == 4
    assert {len(row) for row in rows} == {width}


def test_a_window_shows_what_is_in_it_and_long_numbers_keep_their_last_digits():
    run = straight(1, minibatches=150, forward=2.0, backward=2.0)
    lines = gantt.text(run, width=7 + 24, window=(4.0 * 123, 4.0 * 127)).splitlines()
    assert [line for line in lines if line.startswith("rank")] == ["rank 0 F23B23F24B24F25B25F26B26"]


def test_an_empty_window_or_run_is_refused():
    with pytest.raises(ConfigError, match="window"):
        gantt.text(straight(), width=60, window=(3.0, 3.0))
    with pytest.raises(ConfigError, match="width"):
        gantt.text(straight(), width=10)
    with pytest.raises(ConfigError, match="no operation that takes time"):
        gantt.text(Timeline.from_events([], Plan.even(2, 2)), width=60)


def test_the_page_lays_one_run_over_the_other(tmp_path):
    sizes = {"activation": 2.0, "parameters": 4.0, "saved": 3.0}
    simulated = straight(2, minibatches=6, **sizes)
    recorded = Timeline.from_events(straight(2, minibatches=6, forward=1.1, **sizes).events, Plan.even(2, 2))
    page = gantt.html(simulated, tmp_path / "run.html", other=recorded).read_text()
    for part in (
        "stash 1-1, simulated",
        "stash 1-1, recorded",
        "weight version 2",
        "2 bytes to rank 1",
        "<h2>Memory</h2>",
        "Dashed: recorded.",
        "Each row is a worker",
    ):
        assert part in page, part
    rows = [
        page.index(f"{name}, stage {stage}</td>")
        for stage in (0, 1)
        for name in ("forward", "backward", "update with all-reduce")
    ]
    assert rows == sorted(rows)
    assert f"{simulated.seconds_per_minibatch / recorded.seconds_per_minibatch:.3f}" in page
    alone = gantt.html(recorded, tmp_path / "alone.html").read_text()
    assert "<h2>Memory</h2>" not in alone
    with pytest.raises(DataError, match="different stages"):
        gantt.html(simulated, tmp_path / "never.html", other=straight(3))
    assert not (tmp_path / "never.html").exists()


def test_the_figures_hold_what_the_timeline_says():
    run = straight(3, minibatches=10, activation=1.0, parameters=4.0, saved=3.0)
    figure = gantt.gantt_figure([run, run], minibatches=4)
    forward = [trace for trace in figure.data if trace.name == "forward"]
    assert len(forward) == 2
    expected = [(e.rank, e.start, e.seconds) for e in run.events if e.kind == "F" and e.minibatch < 4]
    assert list(zip(forward[0].y, forward[0].base, forward[0].x, strict=True)) == expected
    assert [trace.showlegend for trace in forward] == [True, False]
    memory = gantt.memory_figure([run], minibatches=10)
    assert [max(trace.y) for trace in memory.data] == [run.peak_memory(rank) for rank in range(3)]


def test_text_needs_no_plotly(monkeypatch, tmp_path):
    for name in ("plotly", "plotly.graph_objects", "plotly.subplots"):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(gantt)
    assert gantt.text(straight(minibatches=5), width=52) == STASH
    with pytest.raises(MissingExtraError, match="pip install"):
        gantt.html(straight(), tmp_path / "run.html")
