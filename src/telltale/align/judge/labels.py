"""Ratings of any scale as numbers in [0, 1], missing ones left out.

ArmoRM's card inverts HelpSteer's 0..4 ratings with 5 r - 0.5: a label is the centre of its bin, (r + 0.5) / 5, not its place
between the ends. Scales without bins are mapped linearly; True and False are 1 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.configuration import check_integer
from telltale.errors import ConfigError, DataError


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
        """The rating that ``label`` stands for; a prediction may lie outside of the scale."""
        place = label if self.bins is None else (label * self.bins - 0.5) / (self.bins - 1)
        return self.low + place * (self.high - self.low)

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON and YAML have it."""
        return {"low": self.low, "high": self.high, "bins": self.bins}


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
