"""Reading the files that a judge is fitted on: ratings and preferences as JSON lines, objectives as YAML.

Ratings: ``{"messages": [...], "ratings": {name: number}}`` or ``{"prompt", "response", "ratings"}``. Preferences: ``{"prompt",
"chosen", "rejected"}``, each a text or messages; TRL's form whose chosen and rejected hold the prompt is understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from telltale.align.judge.labels import Scale, label_matrix
from telltale.align.judge.templating import Messages, check_messages
from telltale.configuration import read_yaml
from telltale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Conversation:
    """A prompt and a response under an id."""

    id: str
    messages: Messages


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first the better one."""

    id: str
    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Ratings:
    """Rated conversations: ``labels`` (n, K) float64 in [0, 1] (in the scales' units), NaN where missing."""

    conversations: list[Conversation]
    labels: Tensor
    scales: dict[str, Scale]

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.scales)


def read_objectives(path: str | Path) -> dict[str, Scale]:
    """Objectives and their scales from YAML: ``helpfulness: {low: 0, high: 4, bins: 5}``.

    Raises :class:`~telltale.errors.ConfigError` for a file that is none.
    """
    found = {}
    for name, fields in read_yaml(path).items():
        values = {} if fields is None else fields
        if not isinstance(values, dict) or set(values) - {"low", "high", "bins"}:
            raise ConfigError(f"{path}: objective {name!r} is {fields!r}; expected low, high and (optionally) bins.")
        found[str(name)] = Scale(**values)
    if not found:
        raise ConfigError(
            f"{path} names no objectives; expected a mapping such as helpfulness: {{low: 0, high: 4, bins: 5}}."
        )
    return found


def read_ratings(path: str | Path, scales: dict[str, Scale] | None = None) -> Ratings:
    """Rated conversations of a JSON-lines file. ``scales`` None: every objective that occurs, on a scale from 0 to 1.

    Raises :class:`~telltale.errors.DataError` naming the line for a row that is none or a rating off its scale.
    """
    rows = []
    for where, row in json_lines(path):
        rated = row.get("ratings")
        if not isinstance(rated, dict):
            raise DataError(f"{where} has no ratings; expected a mapping from objectives to numbers.")
        rows.append((Conversation(str(row.get("id", where)), _conversation(row, where)), rated))
    if scales is None:
        scales = {name: Scale() for _, rated in rows for name in rated}
    conversations = [conversation for conversation, _ in rows]
    labels = label_matrix(
        [rated for _, rated in rows], scales, rows=[conversation.id for conversation in conversations]
    )
    return Ratings(conversations, labels, scales)


def read_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of a JSON-lines file, rated or not."""
    return [Conversation(str(row.get("id", where)), _conversation(row, where)) for where, row in json_lines(path)]


def read_preferences(path: str | Path) -> tuple[list[Pair], int]:
    """Pairs of a JSON-lines file, and how many were left out because both responses are the same text.

    Raises :class:`~telltale.errors.DataError` naming the line for a row that is no pair.
    """
    found, same = [], 0
    for where, row in json_lines(path):
        pair = _pair(row, where)
        if pair.chosen == pair.rejected:
            same += 1
        else:
            found.append(pair)
    if not found:
        raise DataError(f"{path}: both responses are the same in every pair; expected pairs that differ.")
    return found, same


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row) of every line that holds something."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    empty = True
    # Not splitlines(): JSON strings may hold other separators of lines as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        empty, where = False, f"{Path(path).name} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {type(row).__name__}; expected a JSON object.")
        yield where, row
    if empty:
        raise DataError(f"{path} is empty; expected JSON lines.")


def _conversation(row: dict[str, Any], where: str) -> Messages:
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and isinstance(row.get("response"), str):
        messages = [*_prompt(row["prompt"]), {"role": "assistant", "content": row["response"]}]
    else:
        raise DataError(f"{where} has {', '.join(row) or 'nothing'}; expected messages, or prompt and response.")
    return _checked(messages, where)


def _pair(row: dict[str, Any], where: str) -> Pair:
    if "chosen" not in row or "rejected" not in row:
        raise DataError(f"{where} has {', '.join(row) or 'nothing'}; expected prompt, chosen and rejected.")
    sides = []
    for name in ("chosen", "rejected"):
        side = row[name]
        if isinstance(side, str):
            side = [{"role": "assistant", "content": side}]
        if not isinstance(side, list):
            raise DataError(f"{where}: {name} is {side!r:.80}; expected a text or messages.")
        sides.append(_checked([*_prompt(row.get("prompt", [])), *side], f"{where} ({name})"))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: chosen and rejected follow different prompts; expected one prompt for both.")
    return Pair(str(row.get("id", where)), chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _prompt(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])


def _checked(messages: Any, where: str) -> Messages:
    try:
        check_messages(messages)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return [{"role": message["role"], "content": message["content"]} for message in messages]
