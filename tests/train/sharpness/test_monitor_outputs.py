"""What a monitored run shows and leaves: terminal panel, CSV, TensorBoard, the page, and the command that makes it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from telltale.cli import run as telltale
from telltale.errors import CheckpointError
from telltale.train.sharpness import SharpnessMonitor, over_checkpoints
from telltale.train.sharpness.monitor import DIVERGING, PAST_EDGE, EdgeReading
from telltale.train.sharpness.readings import CsvRecords, TensorBoardRecords, dimension_files
from telltale.train.sharpness.result import DIMENSION_FILE
from telltale.train.sharpness.sharpness_report import EdgePanel, one_line, panel, timeline, write_report


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Path, SharpnessMonitor]:
    """A run of ten steps with readings at each and two dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batch = torch.randn(12, 4)
    monitor = SharpnessMonitor(
        model,
        loss_of,
        [batch[:6], batch[6:]],
        optimizer=optimizer,
        every=1,
        budget=1.0,
        sd_every=5,
        run_dir=tmp_path / "run",
    )
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        monitor.step()
    return tmp_path / "run", monitor


def text_of(renderable: object) -> str:
    console = Console(record=True, width=110, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_panel_says_what_was_read(watched: tuple[Path, SharpnessMonitor]) -> None:
    readings = watched[1].readings
    shown = text_of(panel(readings))
    newest = readings[-1]
    for word in ("step 10", newest.state, f"{newest.ratio:.3f}", "lambda_max", "SD", "of the CPU time"):
        assert word in shown
    console = Console(record=True, width=100, force_terminal=True, file=io.StringIO())
    with EdgePanel(console=console) as live:
        for reading in readings:
            live(reading)
    assert f"{newest.ratio:.3f}" in console.export_text()


def test_the_panel_shows_itself_when_it_is_only_given_to_a_monitor(watched: tuple[Path, SharpnessMonitor]) -> None:
    stream = io.StringIO()
    live = EdgePanel(console=Console(width=100, force_terminal=True, file=stream))
    assert not stream.getvalue()
    live(watched[1].readings[0])
    assert f"{watched[1].readings[0].ratio:.3f}" in stream.getvalue()
    live.close()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_the_timeline_is_higher_nearer_the_edge_and_marks_what_has_no_hessian(
    watched: tuple[Path, SharpnessMonitor],
) -> None:
    reading = watched[1].readings[0]
    series = [replace(reading, ratio=ratio) for ratio in (0.0, 0.4, 1.0, 9.0)]
    series.append(replace(reading, ratio=math.nan, state=DIVERGING, lambda_max=None, error=None, lambda_min=None))
    assert timeline(series).plain == "▁▃▆█!"
    assert "no Hessian, diverging" in one_line(series[-1])
    assert DIVERGING in text_of(panel(series))


def test_csv_has_a_row_for_each_reading(watched: tuple[Path, SharpnessMonitor], tmp_path: Path) -> None:
    records = CsvRecords(tmp_path / "out" / "readings.csv")
    for reading in watched[1].readings:
        records(reading)
    with (tmp_path / "out" / "readings.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["ratio"]) for row in rows] == [reading.ratio for reading in watched[1].readings]
    assert [row["sd_low"] for row in rows[:4]] == [""] * 4
    assert float(rows[4]["sd"]) == watched[1].readings[4].sd
    assert (rows[4]["sd_low"], rows[4]["sd_minibatches"]) == ("", "2"), "two minibatches have no interval"
    first = watched[1].readings[0]
    assert (rows[0]["leading_module"], float(rows[0]["leading_share"])) == next(iter(first.leading.items()))
    assert float(rows[0]["residual"]) == first.receipt.worst < 1e-3
    with pytest.raises(CheckpointError, match=r"readings\.csv"):
        CsvRecords(tmp_path / "out" / "readings.csv" / "deeper.csv")(watched[1].readings[0])


@pytest.mark.long
def test_tensorboard_has_the_same_numbers(watched: tuple[Path, SharpnessMonitor], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardRecords(tmp_path / "events") as records:
        for reading in watched[1].readings:
            records(reading)
    found = EventAccumulator(str(tmp_path / "events")).Reload()
    ratios = found.Scalars("sharpness/ratio")
    assert [event.step for event in ratios] == list(range(1, 11))
    assert [event.value for event in ratios] == pytest.approx(
        [reading.ratio for reading in watched[1].readings], rel=1e-6
    )
    assert len(found.Scalars("sharpness/sd")) == 2


@pytest.mark.long
def test_the_page_holds_everything_and_needs_no_network(watched: tuple[Path, SharpnessMonitor]) -> None:
    folder, monitor = watched
    path = write_report(folder)
    page = path.read_text()
    assert path == folder / "sharpness.html"
    for word in (
        "Timeline",
        "Sharpness Dimension",
        "Spectrum at step 10",
        "Controls",
        "lambda_max",
        "null_space",
        "density",
    ):
        assert word in page
    assert f"{monitor.dimensions[-1][1].sd:,.1f}" in page
    assert f"{monitor.readings[-1].ratio:.3f}" in page
    assert "<script src=" not in page
    together = over_checkpoints([found for _, found in monitor.dimensions])
    assert f"Over the last 2 points together, each exponent taken where it is largest: {together:,.1f}" in page


@pytest.mark.long
def test_a_run_that_broke_down_has_a_page_too(watched: tuple[Path, SharpnessMonitor]) -> None:
    folder, monitor = watched
    monitor.step(loss=math.inf)
    page = write_report(folder).read_text()
    assert "diverging at step 11" in page


@pytest.mark.long
def test_dimensions_come_by_step_and_strange_files_do_not_matter(watched: tuple[Path, SharpnessMonitor]) -> None:
    folder, _ = watched
    (folder / "sharpness-step-000010.json").rename(folder / "sharpness-step-1000000.json")
    (folder / "sharpness-step-000005.json").rename(folder / "sharpness-step-999999.json")
    (folder / "sharpness-step-best.json").write_text("mine")
    assert [step for step, _ in dimension_files(folder)] == [999_999, 1_000_000]
    assert "Spectrum at step 1,000,000" in write_report(folder).read_text()


@pytest.mark.long
def test_an_unfinished_run_without_settings_has_a_page_and_a_damaged_one_is_named(
    watched: tuple[Path, SharpnessMonitor],
) -> None:
    folder, monitor = watched
    readings = folder / "sharpness.jsonl"
    readings.write_text(readings.read_text() + '{"step": 11, "ra')
    (folder / ".partial-abc").write_text("half")
    (folder / "sharpness_config.json").unlink()
    assert f"{monitor.readings[-1].ratio:.3f}" in write_report(folder).read_text()
    for name, damage in (
        ("sharpness_config.json", "[1]"),
        ("sharpness_config.json", "{"),
        ("sharpness-step-000005.json", "{}"),
        ("sharpness_dimension.json", "5"),
    ):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(damage)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            write_report(folder)
        (folder / name).unlink() if before is None else (folder / name).write_text(before)
    assert write_report(folder).exists()


@pytest.mark.long
def test_the_page_shows_a_measurement_that_was_left_in_the_run(watched: tuple[Path, SharpnessMonitor]) -> None:
    folder, monitor = watched
    found = monitor.measure()
    assert "Measured checkpoint" not in write_report(folder).read_text()
    found.save(folder / DIMENSION_FILE)
    page = write_report(folder).read_text()
    assert f"Measured checkpoint: {found.sd:,.1f} of {found.size}; no interval: 2 of the 4 minibatches" in page
    assert "cut_fraction" in page


@pytest.mark.long
def test_the_command_writes_the_page(watched: tuple[Path, SharpnessMonitor], tmp_path: Path, capsys) -> None:
    assert telltale(["sharpness", "report", str(watched[0]), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert telltale(["sharpness", "report", str(tmp_path)]) == 2
    assert "holds no readings" in capsys.readouterr().err
    (watched[0] / "sharpness.jsonl").write_text("")
    assert telltale(["sharpness", "report", str(watched[0])]) == 2
    assert "has not looked yet" in capsys.readouterr().err


@pytest.mark.long
def test_training_from_the_command_line_leaves_readings(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    arguments = ["--preset", "nano", "--recipe", "none", "--sharpness", "--text", str(text)]
    settings = ["steps=40", "batch_size=2", "sequence_length=16", "evaluate_every=40", "precision=float32"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert telltale(["train", *arguments, "--run-dir", str(tmp_path / "run"), *options]) == 0
    assert json.loads((tmp_path / "run" / "sharpness_config.json").read_text())["sd_every"] == "auto"
    capsys.readouterr()
    assert telltale(["train", *arguments, "--run-dir", str(tmp_path / "two"), "--pipeline", str(text)]) == 2
    assert "--sharpness reads whole weights" in capsys.readouterr().err


def test_states_have_their_colours() -> None:
    from telltale.train.sharpness.sharpness_report import COLOURS, TERMINAL_COLOURS

    assert set(TERMINAL_COLOURS) == set(COLOURS) >= {PAST_EDGE, DIVERGING}
    assert set(EdgeReading.__dataclass_fields__) >= {"sd_interval", "slope"}
