"""The tour end to end on a small text, interrupted and resumed, with its report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from telltale.errors import ConfigError, DataError, MissingExtraError
from telltale.tour import run_tour, tour


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(12):
        (folder / f"f{index}.py").write_text(f"def function_{index}(x):\n    return x * {index} + 1\n" * 60)
    return folder


class Chapter:
    seconds = 3.0

    def summary(self):
        return {"seconds": self.seconds}

    def write(self, report):
        report.heading("the chapter on the edge")


def without_gymnasium(folder, *, seed, quick):
    raise MissingExtraError("Gymnasium is missing: pip install it")


@pytest.mark.long
def test_it_trains_decodes_and_reports(tmp_path, text, monkeypatch):
    monkeypatch.setattr(
        tour, "QUICK_TRAINING", replace(tour.QUICK_TRAINING, steps=6, evaluate_every=3, checkpoint_every=2)
    )
    monkeypatch.setattr("telltale.tour.edge.edge_chapter", lambda folder, *, seed, quick: Chapter())
    monkeypatch.setattr("telltale.tour.world.world_chapter", without_gymnasium)
    console = Console(file=(tmp_path / "log").open("w", buffering=1))
    run_dir = tmp_path / "tour"
    summary = run_tour(run_dir, text=text, quick=True, chapters=(), console=console)
    assert summary["finished"]
    assert summary["identical"]
    assert json.loads((run_dir / "summary.json").read_text())["methods"] == summary["methods"]
    page = (run_dir / "report.html").read_text()
    assert page.count("Plotly.newPlot") == 4
    assert (run_dir / "sweep.csv").exists()
    weights = (run_dir / "training" / "model" / "model.safetensors").stat().st_mtime_ns
    again = run_tour(run_dir, text=text, quick=True, chapters=("edge", "world"), console=console)
    assert again["held_out"] == summary["held_out"]
    assert (run_dir / "training" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert again["chapters"] == {
        "edge": {"seconds": 3.0},
        "world": {"left_out": "Gymnasium is missing: pip install it"},
    }
    assert "the chapter on the edge" in (run_dir / "report.html").read_text()
    assert "left out: Gymnasium is missing" in (tmp_path / "log").read_text()


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none"):
        run_tour(tmp_path / "tour", text=tmp_path / "none", quick=True)


def test_a_folder_holds_one_tour(tmp_path, text):
    run_dir = tmp_path / "tour"
    tour._check_same_tour(run_dir, {"text": str(text), "quick": True, "seed": 0})
    with pytest.raises(ConfigError, match="quick"):
        run_tour(run_dir, text=text, quick=False)
    with pytest.raises(ConfigError, match="text"):
        run_tour(run_dir, quick=True)
