"""The sums that a ridge regression needs of its rows; their size does not depend on the number of rows.

Rows with the same pattern of missing labels share their Gram matrix X^T X. For each pattern and each fold of prompts, that matrix,
X^T Y and the squares of the labels are kept in float64, as parts of one matrix [X Y]^T [X Y], together with the count. Blocks may
come in any order and from any process, since the sums add up. Removing a fold is a subtraction, so cross-validation needs no
second pass over the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.linalg import blas
from torch import Tensor

from telltale.config import check_integer
from telltale.errors import CheckpointError, DataError
from telltale.runs.files import write_atomically

MissingPattern = tuple[bool, ...]
"""Which of the K objectives a row rates."""


CHUNK = 512
"""Rows that are converted to float64 at a time: they stay in cache, and a rank-k update is at full speed."""
ALIGNMENT = 8
"""Columns of a table come in multiples of this, with zeros: a rank-k update is a tenth slower on others."""


@dataclass
class Moments:
    """Sums over the rows of one pattern and fold; ``count`` is the sum of their weights, ``rows`` their number."""

    table: Tensor
    """Lower triangle of [X Y 0]^T [X Y 0], (width, width) float64; what is above it is not read."""
    size: int
    """d."""
    rated: int
    count: float = 0.0
    rows: int = 0

    @classmethod
    def of_no_rows(cls, size: int, rated: int) -> Moments:
        """All sums 0."""
        width = -(-(size + rated) // ALIGNMENT) * ALIGNMENT
        return cls(torch.zeros(width, width, dtype=torch.float64), size, rated)

    @classmethod
    def of_sums(cls, gram: Tensor, cross: Tensor, squares: Tensor, count: float, rows: int) -> Moments:
        """From X^T X (d, d), X^T Y (d, rated) and the sums of y^2 (rated,)."""
        moments = cls.of_no_rows(*cross.shape)
        moments.gram.copy_(gram)
        moments.cross.copy_(cross)
        moments.squares.copy_(squares)
        moments.count, moments.rows = count, rows
        return moments

    @property
    def gram(self) -> Tensor:
        """X^T X, (d, d), a view; its lower triangle."""
        return self.table[: self.size, : self.size]

    @property
    def cross(self) -> Tensor:
        """X^T Y, (d, rated), a view."""
        return self.table[self.size : self.size + self.rated, : self.size].T

    @property
    def squares(self) -> Tensor:
        """Sum of y^2, (rated,), a view."""
        return self.table.diagonal()[self.size : self.size + self.rated]

    def take(self, rows: Tensor, count: float) -> None:
        """Add the rows [X Y 0] (n, width), whose weights, already in them as square roots, sum to ``count``."""
        # Half the work of a matrix product, and no matrix is made to be added.
        blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=self.table.numpy().T, overwrite_c=True)
        self.count += count
        self.rows += len(rows)

    def copy(self) -> Moments:
        """One that shares no memory."""
        return replace(self, table=self.table.clone())

    def __add__(self, other: Moments) -> Moments:
        return replace(
            self, table=self.table + other.table, count=self.count + other.count, rows=self.rows + other.rows
        )


@dataclass
class GramStatistics:
    """Sufficient statistics of features (n, d) and labels (n, K): ``parts`` by label pattern and fold."""

    size: int
    objectives: int
    folds: int
    parts: dict[tuple[MissingPattern, int], Moments] = field(default_factory=dict)

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
        code = (rated.long() << torch.arange(self.objectives)).sum(1) * self.folds + fold
        # Stable: the order of rows inside a part is that of the block.
        order = code.argsort(stable=True)
        features, gathered = features.detach(), features.new_empty(min(CHUNK, len(features)), self.size)
        values, counts = code[order].unique_consecutive(return_counts=True)
        for value, chosen in zip(values.tolist(), order.split(counts.tolist()), strict=True):
            pattern = tuple(rated[chosen[0]].tolist())
            if not any(pattern):
                continue
            key, members = (pattern, value % self.folds), torch.tensor(pattern).nonzero()[:, 0]
            if key not in self.parts:
                self.parts[key] = Moments.of_no_rows(self.size, len(members))
            moments = self.parts[key]
            space = torch.zeros(min(CHUNK, len(chosen)), len(moments.table), dtype=torch.float64)
            for some in chosen.split(CHUNK):
                block, count = space[: len(some)], float(len(some))
                block[:, : self.size] = torch.index_select(features, 0, some, out=gathered[: len(some)])
                block[:, self.size : self.size + moments.rated] = labels[some][:, members]
                if weights is not None:
                    scale = weights[some].to(torch.float64)
                    block *= scale.sqrt()[:, None]
                    count = float(scale.sum())
                moments.take(block, count)

    def merge(self, other: GramStatistics) -> GramStatistics:
        """Both together, as if one had seen all rows. Raises :class:`~telltale.errors.DataError` for other sizes or folds."""
        mine, theirs = (self.size, self.objectives, self.folds), (other.size, other.objectives, other.folds)
        if mine != theirs:
            raise DataError(
                f"statistics of (features, objectives, folds) {mine} and {theirs} cannot be merged; expected equal ones."
            )
        merged = GramStatistics(*mine)
        for key in self.parts.keys() | other.parts.keys():
            found = [parts[key] for parts in (self.parts, other.parts) if key in parts]
            merged.parts[key] = found[0] + found[1] if len(found) == 2 else found[0].copy()
        return merged

    @property
    def patterns(self) -> list[MissingPattern]:
        """Every pattern of rated objectives that has been seen, sorted."""
        return sorted({pattern for pattern, _ in self.parts})

    def rows_of(self, objective: int) -> int:
        """Rows that rate ``objective``."""
        return sum(moments.rows for (pattern, _), moments in self.parts.items() if pattern[objective])

    def gram(self, patterns: Iterable[MissingPattern], *, only: int | None = None) -> Tensor:
        """X^T X over the rows of ``patterns`` (d, d), of one fold ``only``; not to be written to: it may be a part's own."""
        wanted = set(patterns)
        found = [self.parts[key].gram for key in sorted(self.parts) if key[0] in wanted and only in (None, key[1])]
        if len(found) == 1:
            return _mirrored(found[0])
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for gram in found:
            total += gram
        return _mirrored(total)

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
            tensors[f"{index}.gram"] = _mirrored(moments.gram).contiguous()
            tensors[f"{index}.cross"] = moments.cross.contiguous()
            tensors[f"{index}.squares"] = moments.squares.contiguous()
        metadata = {
            "telltale_ridge_statistics": "1",
            "shape": f"{self.size} {self.objectives} {self.folds}",
            "parts": " ".join(names),
        }
        write_atomically(path, save(tensors or {"none": torch.zeros(1)}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> GramStatistics:
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
                    moments = Moments.of_sums(gram, cross, squares, float.fromhex(count), int(rows))
                    found.parts[tuple(c == "1" for c in pattern), int(fold)] = moments
                return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no ridge statistics: {error}") from error

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
        # One NaN or infinity makes the sum one; only then, or where large numbers overflow, are the rows looked at.
        if not bool(torch.isfinite(features.sum())) and not bool((finite := torch.isfinite(features).all(1)).all()):
            first = int(finite.long().argmin())
            row = rows[first] if rows is not None else f"row {first_row + first}"
            raise DataError(f"{row} has a feature that is NaN or infinite; expected finite features.")
        if bool(labels.isinf().any()):
            raise DataError(f"row {first_row + int(labels.isinf().any(1).nonzero()[0])} has an infinite label.")
        if weights is not None and not bool((weights >= 0).all() & torch.isfinite(weights).all()):
            raise DataError("a row's weight is below 0 or not finite; expected weights >= 0.")


def _mirrored(matrix: Tensor, block: int = 128) -> Tensor:
    """The square matrix with its lower triangle in place of the upper; written block by block, since strides are slow."""
    for first in range(0, len(matrix), block):
        last = min(first + block, len(matrix))
        corner = matrix[first:last, first:last]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[first:last, last:].copy_(matrix[last:, first:last].T)
    return matrix


def fold_of(groups: Tensor, folds: int) -> Tensor:
    """The fold 0..folds-1 of each prompt id (n,): a hash of the id alone, so that shards and processes agree on it."""
    unique, where = groups.unique(return_inverse=True)
    hashed = [
        int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "big") for key in unique.tolist()
    ]
    return torch.tensor([value % folds for value in hashed], dtype=torch.long)[where]
