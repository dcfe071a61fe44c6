"""Local files of four public benchmarks as one kind of item: a prompt, right and wrong responses, a subset.

RewardBench: prompt, chosen, rejected, subset (its prior sets: one file each, named by the set). RewardBench 2: prompt, lists
chosen and rejected, subset, id (``ref:3`` and ``tied:3`` in Ties). RM-Bench: three styles of each (concise, detailed, markdown).
LLMBar: input, output_1, output_2, label, in folders named by the subset. Files are JSON lists, JSON lines or Parquet; a folder is
read as it is published. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.align.judge.templating import Messages, check_messages
from telltale.errors import DataError, MissingExtraError

STYLES = ("concise", "detailed", "markdown")
PREFERENCE_SETS = (
    *("anthropic_harmless", "anthropic_helpful", "anthropic_hhh", "mtbench_gpt4", "mtbench_human"),
    *("pku_better", "pku_safer", "shp", "summarize", "instruct_gpt"),
)
"""Files of RewardBench's older test sets: the file names the set, whatever its own column ``subset`` holds."""


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
    for file in _files(suite, Path(path)):
        for number, row in enumerate(_rows(file), 1):
            where = f"{file.name} row {number}"
            try:
                item = make(row, where, file)
                check_messages([*item.prompt, {"role": "assistant", "content": ""}])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                what = str(error) if isinstance(error, DataError) else f"{type(error).__name__} {error}."
                raise DataError(f"{where} is no item of {suite}: {what}") from error
            found.append(item)
    if not found:
        raise DataError(f"{path} holds no rows; expected the files of {suite}.")
    return found


def _rewardbench(row: dict[str, Any], where: str, file: Path) -> Item:
    chosen, rejected = (_text(row[name]) for name in ("chosen", "rejected"))
    split = _split(file)
    subset = split if split in PREFERENCE_SETS else str(row["subset"])
    return Item(str(row.get("id", where)), _prompt(row["prompt"]), (chosen,), (rejected,), subset)


def _rewardbench2(row: dict[str, Any], where: str, _file: Path) -> Item:
    chosen, rejected = (_texts(row[name]) for name in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise ValueError("chosen and rejected must not be empty")
    if str(row["subset"]).lower() == "ties" and not re.fullmatch(r"(ref|tied):\d+", str(row.get("id"))):
        raise ValueError(f"id={row.get('id')!r}, expected ref:NUMBER or tied:NUMBER in Ties")
    return Item(str(row.get("id", where)), _prompt(row["prompt"]), chosen, rejected, str(row["subset"]))


def _rm_bench(row: dict[str, Any], where: str, file: Path) -> Item:
    chosen, rejected = (_texts(row[name]) for name in ("chosen", "rejected"))
    if len(chosen) != len(STYLES) or len(rejected) != len(STYLES):
        raise ValueError(f"expected {len(STYLES)} styles of each side, found {len(chosen)} and {len(rejected)}")
    return Item(
        str(row.get("id", where)),
        _prompt(row["prompt"]),
        chosen,
        rejected,
        str(row.get("domain") or file.stem.removesuffix("_filtered")),
    )


def _llmbar(row: dict[str, Any], where: str, file: Path) -> Item:
    outputs, label = (str(row["output_1"]), str(row["output_2"])), int(row["label"])
    if label not in (1, 2):
        raise ValueError(f"label={label}, expected 1 or 2")
    subset = file.stem
    if subset == "dataset":
        folder = file.absolute().parent
        above = f"{folder.parent.name}-" if folder.parent.name == "Adversarial" else ""
        subset = f"{above}{folder.name}".lower()
    return Item(f"{subset} {where}", _prompt(str(row["input"])), (outputs[label - 1],), (outputs[2 - label],), subset)


def _files(suite: str, path: Path) -> list[Path]:
    """The files of a published folder that belong to the benchmark, each row in one of them alone."""
    if path.is_file():
        return [path]
    if suite == "llmbar":
        inside = next((folder for folder in (path / "Dataset" / "LLMBar", path / "LLMBar") if folder.is_dir()), path)
        published = sorted(inside.rglob("dataset.json"))
        if published:
            return published
    found = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl", ".parquet"))
    if suite == "rewardbench" and any(_split(file) == "filtered" for file in found):
        found = [file for file in found if _split(file) != "raw"]
    whole = [file for file in found if suite == "rm-bench" and file.stem == "total_dataset"]
    if not found:
        raise DataError(
            f"{path} is no file and holds none in JSON or Parquet; expected a file or folder of a benchmark."
        )
    return whole or found


def _split(file: Path) -> str:
    """``filtered-00000-of-00001.parquet`` holds the split ``filtered``."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
    if text.startswith("version https://git-lfs"):
        raise DataError(f"{file} is a pointer of Git LFS; expected the file itself (git lfs pull).")
    try:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.split("\n") if line.strip())
            return
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(loaded, list):
        raise DataError(f"{file} holds {type(loaded).__name__}; expected a list of rows.")
    yield from loaded


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'telltale[align]'") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error
    return rows


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
