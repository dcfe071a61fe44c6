"""The files that a judge is fitted on, and every way in which a line can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from telltale.align.judge.data import Scale, read_objectives
from telltale.align.judge.importing import read_conversations, read_preferences, read_ratings
from telltale.errors import ConfigError, DataError

USER = {"role": "user", "content": "x"}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_ratings_in_both_forms(tmp_path: Path) -> None:
    path = written(
        tmp_path / "r.jsonl",
        {
            "id": "a",
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "ratings": {"safe": True},
        },
        "",
        {"prompt": "x", "response": "", "ratings": {"helpful": 3, "safe": None}},
    )
    found = read_ratings(path, {"helpful": Scale(0, 4, bins=5), "safe": Scale()})
    assert [c.id for c in found.conversations] == ["a", "r.jsonl line 3"]
    assert found.conversations[1].messages[1] == {"role": "assistant", "content": ""}
    assert found.labels[1, 0] == pytest.approx(0.7)
    assert math.isnan(found.labels[0, 0])
    assert found.objectives == ("helpful", "safe")
    assert len(read_conversations(path)) == 2


def test_preferences_in_all_forms_and_same_texts_are_counted(tmp_path: Path) -> None:
    user = {"role": "user", "content": "x"}
    path = written(
        tmp_path / "p.jsonl",
        {"prompt": "x", "chosen": "a", "rejected": "b"},
        {"prompt": [user], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
        {
            "chosen": [user, {"role": "assistant", "content": "a"}],
            "rejected": [user, {"role": "assistant", "content": "b"}],
        },
        {"prompt": "x", "chosen": "a", "rejected": "a"},
    )
    pairs, same = read_preferences(path)
    assert same == 1
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [([user], "a", "b")] * 3


def test_objectives_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("helpful: {low: 0, high: 4, bins: 5}\nsafe:\n")
    assert read_objectives(tmp_path / "o.yaml") == {"helpful": Scale(0, 4, 5), "safe": Scale()}
    for text, words in (
        ("helpful: 3", "expected low, high"),
        ("helpful: {lo: 1}", "expected low, high"),
        ("helpful: {low: a}", "low='a'"),
        ("helpful: {low: 0, high:}", "high=None"),
        ("{}", "names no objectives"),
    ):
        (tmp_path / "o.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_objectives(tmp_path / "o.yaml")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 holds list"),
        ({"prompt": "x", "response": "y"}, "line 1 has no ratings"),
        ({"prompt": "x", "ratings": {"a": 1}}, "expected messages, or prompt and response"),
        (
            {"messages": [{"role": "user", "content": "x"}], "ratings": {"a": 1}},
            "line 1: messages.* expected the assistant's response",
        ),
        ({"prompt": "x", "response": "y", "ratings": {"a": 2}}, "line 1 rates 'a' as 2; expected a number from 0 to 1"),
    ],
)
def test_ratings_that_are_none(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_ratings(written(tmp_path / "r.jsonl", row))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "chosen": "a"}, "expected prompt, chosen and rejected"),
        ({"prompt": "x", "chosen": 4, "rejected": "b"}, "line 1: chosen: expected an array of messages"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "b"}],
            },
            "follow different prompts",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "the same in every pair"),
    ],
)
def test_preferences_that_are_none(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_preferences(written(tmp_path / "p.jsonl", row))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_ratings(written(tmp_path / "r.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path / "none")
