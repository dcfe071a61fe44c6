"""States, slopes and files of readings, without a model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from telltale.errors import CheckpointError
from telltale.train.sharpness.readings import (
    AT_EDGE,
    DIVERGING,
    PAST_EDGE,
    READINGS_FILE,
    STABLE,
    EdgeReading,
    ReadingFiles,
    read_readings,
    reading_of,
    slope_of,
    state_of,
)
from telltale.train.sharpness.tracking import Extreme


def reading(ratio: float, error: float = 0.0, *, step: int = 1, loss: float = 1.0, **changes: Any) -> EdgeReading:
    found = Extreme(2.0 * ratio, 2.0 * error, -0.5, 6)
    whole = reading_of(found, step=step, rate=0.1, loss=loss, threshold=2.0, probe_loss=loss, before=[])
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("ratio", "error", "state"),
    [
        (-3.0, 0.0, STABLE),
        (0.0, 0.0, STABLE),
        (0.85, 0.04, STABLE),
        (0.85, 0.06, AT_EDGE),
        (0.9, 0.0, AT_EDGE),
        (1.1, 0.5, AT_EDGE),
        (1.11, 0.0, PAST_EDGE),
        (math.nan, 0.0, DIVERGING),
        (math.inf, 0.0, DIVERGING),
    ],
)
def test_the_state_of_one_reading(ratio: float, error: float, state: str) -> None:
    assert reading(ratio, error).state == state


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_diverging_at_any_ratio(loss: float) -> None:
    assert reading(0.1, loss=loss).state == DIVERGING


def history(ratios: list[float], losses: list[float]) -> str:
    """State of the last of these readings."""
    seen = [reading(ratio, step=step, loss=loss) for step, (ratio, loss) in enumerate(zip(ratios, losses, strict=True))]
    return state_of(seen[-1], seen[:-1])


def test_diverging_takes_three_rises_of_the_probe_loss_all_past_the_edge() -> None:
    assert history([1.0, 1.2, 1.2, 1.2], [1.0, 2.0, 3.0, 4.0]) == DIVERGING
    assert history([1.2, 1.2, 1.2], [2.0, 3.0, 4.0]) == PAST_EDGE
    assert history([1.2, 1.2, 1.2, 1.2], [1.0, 2.0, 2.0, 4.0]) == PAST_EDGE
    assert history([1.2, 1.2, 1.0, 1.2], [1.0, 2.0, 3.0, 4.0]) == PAST_EDGE
    assert history([1.2, 1.2, 1.2, 1.0], [1.0, 2.0, 3.0, 4.0]) == AT_EDGE
    assert history([0.5] * 9, [float(step) for step in range(9)]) == STABLE


def test_a_rise_of_the_training_loss_alone_is_minibatch_noise() -> None:
    seen = [reading(1.2, step=step, loss=float(step), probe_loss=1.0) for step in range(5)]
    assert state_of(seen[-1], seen[:-1]) == PAST_EDGE


def test_the_slope_is_least_squares_per_thousand_steps() -> None:
    line = [reading(0.1 + 0.002 * step, step=step) for step in (0, 10, 50, 70)]
    assert slope_of(line[-1], line[:-1]) == pytest.approx(2.0)
    assert slope_of(line[1], line[:1]) is None
    assert slope_of(line[-1], [*line[:-1], reading(math.nan, step=60)]) is None
    same = [reading(0.1 * index, step=5) for index in range(3)]
    assert slope_of(same[-1], same[:-1]) is None
    old = [reading(100.0, step=0), *(reading(1.0, step=step) for step in range(1, 9))]
    assert slope_of(old[-1], old[:-1]) == pytest.approx(0.0, abs=1e-9), "only the last eight count"


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_a_line_is_strict_json_and_comes_back_as_it_was(tmp_path: Path) -> None:
    files = ReadingFiles(tmp_path, {"seed": 0}, start=0)
    broken = reading_of(None, step=4, rate=0.1, loss=math.inf, before=[])
    whole = dataclasses.replace(reading(0.5, 0.01, step=3), sd=7.5, sd_interval=(7.0, 8.0))
    files.append(whole)
    files.append(broken)
    lines = (tmp_path / READINGS_FILE).read_text().splitlines()
    loaded = [json.loads(line, parse_constant=refuse) for line in lines]
    assert (loaded[1]["ratio"], loaded[1]["loss"], loaded[1]["threshold"]) == (None, None, None)
    first, second = read_readings(tmp_path)
    assert first == whole
    assert math.isnan(second.ratio)
    assert math.isnan(second.loss)
    assert (second.step, second.state, second.lambda_max) == (4, DIVERGING, None)


def test_a_torn_last_line_is_left_out_but_a_torn_line_before_it_is_no_file_of_ours(tmp_path: Path) -> None:
    files = ReadingFiles(tmp_path, {}, start=0)
    files.append(reading(0.5, step=1))
    path = tmp_path / READINGS_FILE
    path.write_text(path.read_text() + '{"step": 2, "lamb')
    assert [seen.step for seen in read_readings(tmp_path)] == [1]
    path.write_text('{"step": 2, "lamb\n' + path.read_text())
    with pytest.raises(CheckpointError, match="line 1 of"):
        read_readings(tmp_path)


@pytest.mark.parametrize("line", ["5", "[]", '{"step": 1}', '{"colour": "red"}'])
def test_lines_that_are_no_readings_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / READINGS_FILE).write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"line 1 of .* is no reading"):
        read_readings(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": "2"},
        {"step": 2.5},
        {"ratio": "high"},
        {"rate": None},
        {"lambda_max": [1]},
        {"state": "fine"},
        {"sd_interval": [1.0]},
        {"sd_interval": 3},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    files = ReadingFiles(tmp_path, {}, start=0)
    files.append(reading(0.5, sd=2.0, sd_interval=(1.0, 3.0)))
    path = tmp_path / READINGS_FILE
    assert read_readings(tmp_path)[0].sd_interval == (1.0, 3.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong) + "\n")
    with pytest.raises(CheckpointError, match=r"line 1 of .* is no reading"):
        read_readings(tmp_path)


def test_a_folder_without_readings_has_none_and_binary_is_refused(tmp_path: Path) -> None:
    assert read_readings(tmp_path) == []
    (tmp_path / READINGS_FILE).write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(CheckpointError, match="damaged"):
        read_readings(tmp_path)


def test_going_on_from_a_step_removes_what_lies_behind_it_and_nothing_else(tmp_path: Path) -> None:
    files = ReadingFiles(tmp_path, {}, start=0)
    for step in (1, 2, 3):
        files.append(reading(0.5, step=step))
    for name in ("sharpness-step-000002.json", "sharpness-step-000003.json", "sharpness-step-mine.json"):
        (tmp_path / name).write_text("{}")
    assert [seen.step for seen in ReadingFiles(tmp_path, {}, start=2).kept] == [1, 2]
    assert [seen.step for seen in read_readings(tmp_path)] == [1, 2]
    left = sorted(path.name for path in tmp_path.glob("sharpness-step-*"))
    assert left == ["sharpness-step-000002.json", "sharpness-step-mine.json"]
