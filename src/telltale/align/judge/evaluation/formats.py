"""Local files of four public benchmarks as one kind of item: a prompt, right and wrong responses, a subset.

RewardBench: JSON lines with prompt, chosen, rejected, subset. RewardBench 2: prompt, lists chosen and rejected, subset, id
(``ref:3`` and ``tied:3`` in Ties). RM-Bench: a JSON list with three styles of each (concise, detailed, markdown). LLMBar: a JSON
list with input, output_1, output_2, label. A folder is read file by file; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.align.judge.templating import Messages
from telltale.errors import DataError

STYLES = ("concise", "detailed", "markdown")


@dataclass(frozen=True)
class Item:
    """One prompt with its right and wrong responses, in the file's order."""

    id: str
    prompt: Messages
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str


def read_items(suite: str, path: str | Path) -> list[Item]:
    """The items of a file or folder in the format of ``suite``.

    Raises :class:`~telltale.errors.DataError` naming file and row for what does not fit, and for a folder without rows.
    """
    make = {"rewardbench": _rewardbench, "rewardbench2": _rewardbench2, "rm-bench": _rm_bench, "llmbar": _llmbar}[suite]
    found = []
    for file in _files(Path(path)):
        for number, row in enumerate(_rows(file), 1):
            where = f"{file.name} row {number}"
            try:
                found.append(make(row, where, file.stem))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{where} is no item of {suite}: {type(error).__name__} {error}.") from error
    if not found:
        raise DataError(f"{path} holds no rows; expected the files of {suite}.")
    return found


def _rewardbench(row: dict[str, Any], where: str, _stem: str) -> Item:
    chosen, rejected = (_text(row[name]) for name in ("chosen", "rejected"))
    return Item(str(row.get("id", where)), _prompt(row["prompt"]), (chosen,), (rejected,), str(row["subset"]))


def _rewardbench2(row: dict[str, Any], where: str, _stem: str) -> Item:
    chosen, rejected = (_texts(row[name]) for name in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise ValueError("chosen and rejected must not be empty")
    return Item(str(row.get("id", where)), _prompt(row["prompt"]), chosen, rejected, str(row["subset"]))


def _rm_bench(row: dict[str, Any], where: str, stem: str) -> Item:
    chosen, rejected = (_texts(row[name]) for name in ("chosen", "rejected"))
    if len(chosen) != len(STYLES) or len(rejected) != len(STYLES):
        raise ValueError(f"expected {len(STYLES)} styles of each side, found {len(chosen)} and {len(rejected)}")
    return Item(
        str(row.get("id", where)),
        _prompt(row["prompt"]),
        chosen,
        rejected,
        str(row.get("domain") or stem.removesuffix("_filtered")),
    )


def _llmbar(row: dict[str, Any], where: str, stem: str) -> Item:
    outputs, label = (str(row["output_1"]), str(row["output_2"])), int(row["label"])
    if label not in (1, 2):
        raise ValueError(f"label={label}, expected 1 or 2")
    return Item(where, _prompt(str(row["input"])), (outputs[label - 1],), (outputs[2 - label],), stem)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix in (".json", ".jsonl"))
    if not found:
        raise DataError(f"{path} is no file and holds none in JSON; expected a file or folder of a benchmark.")
    return found


def _rows(file: Path) -> Iterator[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
            return
        loaded = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(loaded, list):
        raise DataError(f"{file} holds {type(loaded).__name__}; expected a list of rows.")
    yield from loaded


def _prompt(prompt: Any) -> Messages:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in prompt]


def _text(response: Any) -> str:
    """A response, or the last of a list of messages."""
    return response if isinstance(response, str) else str(response[-1]["content"])


def _texts(responses: Any) -> tuple[str, ...]:
    if isinstance(responses, str):
        return (responses,)
    return tuple(_text(response if isinstance(response, str) else [response]) for response in responses)
