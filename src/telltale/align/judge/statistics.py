"""Everything a ridge regression needs of its rows, in a size that does not depend on how many there are.

Rows with the same pattern of missing labels share their Gram matrix X^T X; for each pattern and each fold of prompts that
matrix, X^T Y, the labels' squares and the count are kept in float64. Blocks may come in any order and from any process:
statistics add up. Removing one fold is a subtraction, so cross-validation needs no second pass over the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from telltale.configuration import check_integer
from telltale.errors import CheckpointError, DataError
from telltale.runs.atomic import write_atomically

Pattern = tuple[bool, ...]
"""Which of the K objectives a row rates."""


@dataclass
class Moments:
    """Sums over the rows of one pattern and fold; ``count`` is the sum of their weights, ``rows`` their number."""

    gram: Tensor
    """X^T X, (d, d)."""
    cross: Tensor
    """X^T Y, (d, rated)."""
    squares: Tensor
    """Sum of y^2, (rated,)."""
    count: float
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.squares + other.squares,
            self.count + other.count,
            self.rows + other.rows,
        )


@dataclass
class Statistics:
    """Sufficient statistics of features (n, d) and labels (n, K): ``parts`` by label pattern and fold."""

    size: int
    objectives: int
    folds: int
    parts: dict[tuple[Pattern, int], Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("size", self.size, low=1)
        check_integer("objectives", self.objectives, low=1)
        check_integer("folds", self.folds, low=1)

    def add(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
        rows: Sequence[str] | None = None,
        first_row: int = 0,
        fold: Tensor | None = None,
    ) -> None:
        """Take in a block: features (n, d), labels (n, K) with NaN for missing, ``groups`` (n,) integer prompt ids.

        A prompt's fold depends on its id alone, so all its rows share one, in whatever block or process they come; without
        groups every row (numbered from ``first_row``) is a prompt of its own. ``fold`` (n,) sets folds by hand instead.
        ``weights`` (n,) multiply squared errors.

        Raises :class:`~telltale.errors.DataError` for shapes that do not fit, a feature that is not finite (naming its row), an
        infinite label, or a weight below 0.
        """
        self._check(features, labels, groups, weights, rows, first_row)
        rated = ~labels.isnan()
        if fold is None:
            keys = torch.arange(first_row, first_row + len(features)) if groups is None else groups
            fold = fold_of(keys, self.folds)
        # One matrix product per pattern and fold: the order of rows inside a part is that of the block.
        code = (rated.long() << torch.arange(self.objectives)).sum(1) * self.folds + fold
        for value in code.unique().tolist():
            chosen = (code == value).nonzero()[:, 0]
            pattern = tuple(rated[chosen[0]].tolist())
            if not any(pattern):
                continue
            x = features[chosen].to(torch.float64)
            y = labels[chosen][:, list(pattern)].to(torch.float64)
            w = torch.ones(len(chosen), dtype=torch.float64) if weights is None else weights[chosen].to(torch.float64)
            weighted = x if weights is None else x * w[:, None]
            moments = Moments(
                weighted.T @ x, weighted.T @ y, (w[:, None] * y.square()).sum(0), float(w.sum()), len(chosen)
            )
            key = (pattern, value % self.folds)
            self.parts[key] = self.parts[key] + moments if key in self.parts else moments

    def merge(self, other: Statistics) -> Statistics:
        """Both together, as if one had seen all rows. Raises :class:`~telltale.errors.DataError` for other sizes or folds."""
        mine, theirs = (self.size, self.objectives, self.folds), (other.size, other.objectives, other.folds)
        if mine != theirs:
            raise DataError(
                f"statistics of (features, objectives, folds) {mine} and {theirs} cannot be merged; expected equal ones."
            )
        merged = Statistics(*mine, parts=dict(self.parts))
        for key, moments in other.parts.items():
            merged.parts[key] = merged.parts[key] + moments if key in merged.parts else moments
        return merged

    @property
    def patterns(self) -> list[Pattern]:
        """Every pattern of rated objectives that has been seen, sorted."""
        return sorted({pattern for pattern, _ in self.parts})

    def rows_of(self, objective: int) -> int:
        """Rows that rate ``objective``."""
        return sum(moments.rows for (pattern, _), moments in self.parts.items() if pattern[objective])

    def gram(self, patterns: Iterable[Pattern], *, without: int | None = None) -> Tensor:
        """X^T X over the rows of ``patterns`` (d, d), ``without`` one fold."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for key in self._keys(patterns, without):
            total += self.parts[key].gram
        return total

    def cross(self, objective: int, *, without: int | None = None, only: int | None = None) -> Tensor:
        """X^T y of one objective, (d,), ``without`` one fold or of one fold ``only``."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for (pattern, fold), moments in sorted(self.parts.items(), key=lambda item: item[0]):
            if pattern[objective] and fold != without and only in (None, fold):
                total += moments.cross[:, sum(pattern[:objective])]
        return total

    def square_and_count(self, objective: int, *, only: int | None = None) -> tuple[float, float]:
        """Sum of weight * y^2 and of weights of one objective."""
        square = count = 0.0
        for (pattern, fold), moments in sorted(self.parts.items(), key=lambda item: item[0]):
            if pattern[objective] and only in (None, fold):
                square += float(moments.squares[sum(pattern[:objective])])
                count += moments.count
        return square, count

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors, names = {}, []
        for index, ((pattern, fold), moments) in enumerate(sorted(self.parts.items(), key=lambda item: item[0])):
            names.append("".join("01"[rated] for rated in pattern) + f":{fold}:{moments.count.hex()}:{moments.rows}")
            for name in ("gram", "cross", "squares"):
                tensors[f"{index}.{name}"] = getattr(moments, name).contiguous()
        metadata = {
            "telltale_ridge_statistics": "1",
            "shape": f"{self.size} {self.objectives} {self.folds}",
            "parts": " ".join(names),
        }
        write_atomically(path, save(tensors or {"none": torch.zeros(1)}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote; raises :class:`~telltale.errors.CheckpointError` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("telltale_ridge_statistics") != "1":
                    raise KeyError("telltale_ridge_statistics")
                size, objectives, folds = (int(number) for number in metadata["shape"].split())
                found = cls(size, objectives, folds)
                for index, name in enumerate(metadata["parts"].split()):
                    pattern, fold, count, rows = name.split(":")
                    gram, cross, squares = (file.get_tensor(f"{index}.{part}") for part in ("gram", "cross", "squares"))
                    moments = Moments(gram, cross, squares, float.fromhex(count), int(rows))
                    found.parts[tuple(c == "1" for c in pattern), int(fold)] = moments
                return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} holds no ridge statistics: {error}") from error

    def _keys(self, patterns: Iterable[Pattern], without: int | None) -> list[tuple[Pattern, int]]:
        wanted = set(patterns)
        return sorted(key for key in self.parts if key[0] in wanted and key[1] != without)

    def _check(
        self,
        features: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        weights: Tensor | None,
        rows: Sequence[str] | None,
        first_row: int,
    ) -> None:
        count = len(features)
        if features.shape != (count, self.size) or labels.shape != (count, self.objectives):
            raise DataError(
                f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; expected (n, {self.size}) and "
                f"(n, {self.objectives})."
            )
        for name, given in (("groups", groups), ("weights", weights)):
            if given is not None and given.shape != (count,):
                raise DataError(f"{name} has shape {tuple(given.shape)}; expected ({count},), one for each row.")
        bad = (~torch.isfinite(features)).any(1).nonzero()[:, 0]
        if len(bad):
            row = rows[int(bad[0])] if rows is not None else f"row {first_row + int(bad[0])}"
            raise DataError(f"{row} has a feature that is NaN or infinite; expected finite features.")
        if bool(labels.isinf().any()):
            raise DataError(f"row {first_row + int(labels.isinf().any(1).nonzero()[0])} has an infinite label.")
        if weights is not None and not bool((weights >= 0).all() & torch.isfinite(weights).all()):
            raise DataError("a row's weight is below 0 or not finite; expected weights >= 0.")


def fold_of(groups: Tensor, folds: int) -> Tensor:
    """The fold 0..folds-1 of each prompt id (n,): a hash of the id alone, so that shards and processes agree on it."""
    unique, where = groups.unique(return_inverse=True)
    hashed = [
        int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "big") for key in unique.tolist()
    ]
    return torch.tensor([value % folds for value in hashed], dtype=torch.long)[where]
