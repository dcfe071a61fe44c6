"""JSON lines: what was written is read, a line cut short by a kill is left out and mended, damage is told."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from telltale.errors import CheckpointError
from telltale.runs.files import JsonLines, strict_json, write_json


def test_records_come_back_in_order_from_any_number_of_appends(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    assert list(JsonLines(path)) == []
    JsonLines(path).append({"a": 1}, {"b": [0.1, None]})
    JsonLines(path, strict=False).append({"c": float("inf")})
    assert list(JsonLines(path)) == [{"a": 1}, {"b": [0.1, None]}, {"c": float("inf")}]


@pytest.mark.parametrize("cut", ['{"half": ', '{"whole": 1}'])
def test_a_line_without_its_end_is_left_out_and_mended(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    JsonLines(path).append({"a": 1})
    with path.open("a") as stream:
        stream.write(cut)
    assert list(JsonLines(path)) == [{"a": 1}]
    JsonLines(path).append({"b": 2})
    assert list(JsonLines(path)) == [{"a": 1}, {"b": 2}]


def test_numbers_that_are_not_finite_are_null_unless_infinity_is_text(tmp_path):
    @dataclass
    class Found:
        value: float
        parts: tuple[float, ...]

    found = Found(math.nan, (1.5, math.inf, -math.inf))
    assert strict_json({"of": [found], "name": "nan"}) == {
        "of": [{"value": None, "parts": [1.5, None, None]}],
        "name": "nan",
    }
    as_text = strict_json(found, infinity_as_text=True)
    assert as_text == {"value": None, "parts": [1.5, "inf", "-inf"]}
    assert float(as_text["parts"][2]) == -math.inf
    write_json(tmp_path / "found.json", found)
    assert json.loads((tmp_path / "found.json").read_text()) == strict_json(found)


def test_a_damaged_line_and_a_place_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(CheckpointError, match="damaged"):
        list(JsonLines(path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not append"):
        JsonLines(tmp_path / "file" / "records.jsonl").append({})
