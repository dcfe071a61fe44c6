"""What a judge is fitted on: rated responses and preferences, their labels, objectives as YAML.

Rows come from JSON lines, a JSON list, CSV or Parquet, packed by gzip or not, in any of the forms of
:mod:`telltale.align.judge.importing`.

Ratings of any scale become labels in [0, 1]; missing ones are NaN. ArmoRM's model card inverts HelpSteer's 0..4 ratings with
5 r - 0.5: a label is the centre of its bin, (r + 0.5) / 5. Scales without bins are mapped linearly; True and False are 1 and 0.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, read_yaml
from telltale.errors import ConfigError, DataError, MissingExtraError
from telltale.models.conversations import Messages

TABLES = {".csv": ",", ".tsv": "\t"}
"""Names that tables end in, and what is between their cells."""
TEXTS = ("prompt", "question", "instruction", "context", "input", "chosen", "rejected", "response", "answer", "output")
"""Columns of a table that begin so hold texts; a cell of another column may be a number."""
LARGEST_CELL = 2**27
"""Characters."""


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
    """Two responses to one prompt, the first the better one, or as good."""

    id: str
    prompt: Messages
    chosen: str
    rejected: str
    votes: tuple[float, float] = (1.0, 0.0)
    """For the chosen and for the rejected response; a tie is half a vote for each."""


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


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row) of every row of JSON lines, a JSON list, a table or Parquet; names that end in .gz are unpacked.

    A table (.csv, .tsv) has a header. Its cells are texts; where one is a JSON list or mapping, such as messages, it is read as
    that, and numbers are read in columns that hold no texts. Raises :class:`~telltale.errors.DataError` naming the line for what
    is no JSON object, or a line of a table with more or fewer cells than the header.
    """
    file = Path(path)
    if file.suffix == ".parquet":
        rows: list[Any] = parquet_rows(file)
        found = [(f"{file.name} row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        text = _text_of(file)
        suffix = Path(file.name.removesuffix(".gz")).suffix
        if suffix in TABLES:
            yield from _table(file, text, TABLES[suffix])
            return
        listed = text.lstrip().startswith("[") and file.name.removesuffix(".gz").endswith(".json")
        found = (_listed(file, text) if listed else []) or list(_lines(file, text))
    if not found:
        raise DataError(f"{path} is empty; expected JSON lines, a JSON list, a table or Parquet.")
    for where, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {type(row).__name__}; expected a JSON object.")
        yield where, row


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a Parquet file. Raises :class:`~telltale.errors.DataError`, and MissingExtraError without pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'telltale[align]'") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error
    return rows


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


def _text_of(file: Path) -> str:
    try:
        packed = file.read_bytes()
        text = (gzip.decompress(packed) if file.suffix == ".gz" else packed).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
    if text.startswith("version https://git-lfs"):
        raise DataError(f"{file} is a pointer of Git LFS; expected the file itself (git lfs pull).")
    return text


def _table(file: Path, text: str, between: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table; the first line names the columns."""
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        lines = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter=between, strict=True)
        header = [name.strip() for name in next(lines, [])]
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{file.name} has the column {twice!r} more than once; expected every name once.")
        count = 0
        for cells in lines:
            if not cells:
                continue
            where = f"{file.name} line {lines.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{where} has {len(cells)} cells; expected {len(header)}, one for each column.")
            count += 1
            yield where, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{file.name} line {lines.line_num} is no line of a table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not count:
        raise DataError(f"{file} is empty; expected a header and rows.")


def _cell(name: str, cell: str) -> Any:
    """What a cell of the column ``name`` means."""
    is_text = name.lower().startswith(TEXTS)
    if not cell:
        return "" if is_text else None
    if not is_text or cell.lstrip().startswith('[{"'):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(value, (list, dict)) or (not is_text and isinstance(value, (int, float))):
            return value
    return cell


def _listed(file: Path, text: str) -> list[tuple[str, Any]]:
    """The rows of one JSON list; none if the text is something else, such as lines."""
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [(f"{file.name} row {number}", row) for number, row in enumerate(loaded, 1)]


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON strings may hold other separators of lines as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file.name} line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error


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
