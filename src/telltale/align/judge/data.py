"""The files that a judge is fitted on: ratings and preferences as JSON lines, objectives as YAML.

Ratings: ``{"messages": [...], "ratings": {name: number}}`` or ``{"prompt", "response", "ratings"}``. Preferences: ``{"prompt",
"chosen", "rejected"}``, each a text or messages, or TRL's form, whose chosen and rejected include the prompt.

Ratings of any scale become labels in [0, 1]; missing ones are NaN. ArmoRM's model card inverts HelpSteer's 0..4 ratings with
5 r - 0.5: a label is the centre of its bin, (r + 0.5) / 5. Scales without bins are mapped linearly; True and False are 1 and 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, read_yaml
from telltale.errors import ConfigError, DataError
from telltale.models.conversations import Messages, read_conversation, read_messages, read_prompt, read_text


@dataclass(frozen=True)
class Scale:
    """Ratings from ``low`` to ``high``; with ``bins`` they are that many equally spaced steps, whose centres are the labels."""

    low: float = 0.0
    high: float = 1.0
    bins: int | None = None

    def __post_init__(self) -> None:
        numbers = all(isinstance(end, (int, float)) and math.isfinite(end) for end in (self.low, self.high))
        if not (numbers and self.low < self.high):
            raise ConfigError(
                f"a scale from low={self.low!r} to high={self.high!r} is none; expected finite low < high."
            )
        if self.bins is not None:
            check_integer("bins", self.bins, low=2)

    def to_unit(self, rating: float) -> float:
        """The label of ``rating``, in [0, 1]."""
        place = (float(rating) - self.low) / (self.high - self.low)
        return place if self.bins is None else (place * (self.bins - 1) + 0.5) / self.bins

    def from_unit(self, label: float) -> float:
        """The rating that ``label`` stands for; a prediction may be outside of the scale."""
        place = label if self.bins is None else (label * self.bins - 0.5) / (self.bins - 1)
        return self.low + place * (self.high - self.low)

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON and YAML have it."""
        return {"low": self.low, "high": self.high, "bins": self.bins}


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


def read_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of a JSON-lines file, rated or not."""
    return [Conversation(str(row.get("id", where)), _conversation(row, where)) for where, row in json_lines(path)]


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


def label_matrix(
    ratings: Sequence[Mapping[str, Any]], scales: Mapping[str, Scale], *, rows: Sequence[str] | None = None
) -> Tensor:
    """Labels (n, K) in float64, NaN where a rating is missing or None; columns are ``scales`` in their order.

    ``ratings[i]`` maps objectives to numbers or booleans. ``rows`` are ids for messages (None: row numbers).

    Raises :class:`~telltale.errors.DataError` for no ratings, an objective that is not in ``scales``, a value that is no number
    or outside of its scale (nothing is clipped), naming row and objective, and for objectives that no row rates.
    """
    names = list(scales)
    if not names or not ratings:
        raise DataError(f"{len(ratings)} rows and {len(names)} objectives were given; expected at least one of each.")
    labels = torch.full((len(ratings), len(names)), math.nan, dtype=torch.float64)
    column = {name: index for index, name in enumerate(names)}
    for number, rated in enumerate(ratings):
        row = rows[number] if rows is not None else f"row {number}"
        for name, value in rated.items():
            if name not in column:
                raise DataError(f"{row} rates {name!r}; expected one of the objectives {', '.join(names)}.")
            if value is not None:
                labels[number, column[name]] = _label(row, name, value, scales[name])
    check_rated(labels, names)
    return labels


def check_rated(labels: Tensor, names: Sequence[str]) -> None:
    """Raise :class:`~telltale.errors.DataError` naming the columns of ``labels`` (n, K) that hold no number at all."""
    empty = [name for name, seen in zip(names, (~labels.isnan()).any(0).tolist(), strict=True) if not seen]
    if empty:
        raise DataError(
            f"no row rates {', '.join(map(repr, empty))}; expected at least one rating for every objective."
        )


def _conversation(row: dict[str, Any], where: str) -> Messages:
    if "messages" in row:
        return read_conversation(row["messages"], name=f"{where}: messages")
    if "prompt" not in row or not isinstance(row.get("response"), str):
        raise DataError(f"{where} has {', '.join(row) or 'nothing'}; expected messages, or prompt and response.")
    response = {"role": "assistant", "content": read_text(row["response"], f"{where}: response")}
    return [*read_prompt(row["prompt"], name=f"{where}: prompt"), response]


def _pair(row: dict[str, Any], where: str) -> Pair:
    if "chosen" not in row or "rejected" not in row:
        raise DataError(f"{where} has {', '.join(row) or 'nothing'}; expected prompt, chosen and rejected.")
    prompt = read_prompt(row["prompt"], name=f"{where}: prompt") if row.get("prompt") not in (None, []) else []
    sides = []
    for name in ("chosen", "rejected"):
        side: Any = row[name]
        if isinstance(side, str):
            side = [{"role": "assistant", "content": side}]
        whole = [*prompt, *read_messages(side, name=f"{where}: {name}")]
        sides.append(read_conversation(whole, name=f"{where}: prompt and {name}"))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: chosen and rejected follow different prompts; expected one prompt for both.")
    return Pair(str(row.get("id", where)), chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _label(row: str, name: str, value: Any, scale: Scale) -> float:
    if isinstance(value, bool):
        return scale.to_unit(scale.high if value else scale.low) if scale.bins else float(value)
    if not isinstance(value, (int, float)):
        raise DataError(f"{row} rates {name!r} as {value!r}; expected a number, True or False.")
    if not scale.low <= value <= scale.high:
        raise DataError(
            f"{row} rates {name!r} as {value!r}; expected a number from {scale.low:g} to {scale.high:g}, its declared scale."
        )
    return scale.to_unit(value)
