"""Records line by line: what was written is read, a line cut short by a kill is left out and mended, damage is told."""

from __future__ import annotations

import pytest

from telltale.errors import CheckpointError
from telltale.runs.files import Records


def test_records_come_back_in_order_from_any_number_of_appends(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    assert list(Records(path)) == []
    Records(path).append([{"a": 1}, {"b": [0.1, None]}])
    Records(path).append([{"c": float("inf")}])
    assert list(Records(path)) == [{"a": 1}, {"b": [0.1, None]}, {"c": float("inf")}]


@pytest.mark.parametrize("cut", ['{"half": ', '{"whole": 1}'])
def test_a_line_without_its_end_is_left_out_and_mended(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    Records(path).append([{"a": 1}])
    with path.open("a") as stream:
        stream.write(cut)
    assert list(Records(path)) == [{"a": 1}]
    Records(path).append([{"b": 2}])
    assert list(Records(path)) == [{"a": 1}, {"b": 2}]


def test_a_damaged_line_and_a_place_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(CheckpointError, match="damaged"):
        list(Records(path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not append"):
        Records(tmp_path / "file" / "records.jsonl").append([{}])
