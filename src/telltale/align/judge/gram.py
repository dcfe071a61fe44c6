"""The sums that a ridge regression needs of its rows; their size does not depend on the number of rows.

Objectives that every row so far rates together, or leaves out together, share one Gram matrix X^T X. The first row that rates some
of them alone splits them, and each side goes on with a copy: the rows until then are the same. So there is at most one matrix per
objective and fold of prompts, whatever the pattern of missing labels, and one for all objectives where every row rates all.

X^T X, X^T Y, the squares of the labels and the sums of both are kept in float64, as parts of one matrix [X Y 1]^T [X Y 1].
Blocks may come in any order and from any process, since the sums add up. Removing a fold is a subtraction, so cross-validation
needs no second pass over the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

Members = tuple[int, ...]
"""Objectives that are rated on the same rows, in ascending order."""

CHUNK = 512
"""Rows that are converted to float64 at a time: they stay in cache, and a rank-k update is at full speed."""
ALIGNMENT = 8
"""Columns of a table come in multiples of this, with zeros: a rank-k update is a tenth slower on others."""


@dataclass
class Moments:
    """Sums over the rows of some objectives and folds; ``count`` is the sum of their weights, ``rows`` their number."""

    table: Tensor
    """Lower triangle of [X Y 1 0]^T [X Y 1 0], (width, width) float64; what is above it is not read."""
    size: int
    """d."""
    rated: int
    rows: int = 0

    @classmethod
    def of_no_rows(cls, size: int, rated: int) -> Moments:
        """All sums 0."""
        width = -(-(size + rated + 1) // ALIGNMENT) * ALIGNMENT
        return cls(torch.zeros(width, width, dtype=torch.float64), size, rated)

    @property
    def gram(self) -> Tensor:
        """X^T X, (d, d), whole."""
        # Rows a power of two apart would fall into the same few sets of the cache.
        space = self.table.new_empty(self.size, self.size + ALIGNMENT)[:, : self.size]
        return _mirrored(space.copy_(self.table[: self.size, : self.size]))

    @property
    def cross(self) -> Tensor:
        """X^T Y, (d, rated), a view."""
        return self.table[self.size : self.size + self.rated, : self.size].T

    @property
    def squares(self) -> Tensor:
        """Sum of y^2, (rated,), a view."""
        return self.table.diagonal()[self.size : self.size + self.rated]

    @property
    def sums(self) -> Tensor:
        """Sum of x, (d,), a view."""
        return self.table[self.size + self.rated, : self.size]

    @property
    def label_sums(self) -> Tensor:
        """Sum of y, (rated,), a view."""
        return self.table[self.size + self.rated, self.size : self.size + self.rated]

    @property
    def count(self) -> float:
        """Sum of the rows' weights."""
        return float(self.table[self.size + self.rated, self.size + self.rated])

    def take(self, rows: Tensor) -> None:
        """Add the rows [X Y 1 0] (n, width), times the square roots of their weights."""
        # Half the work of a matrix product, and no matrix is made to be added.
        blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=self.table.numpy().T, overwrite_c=True)
        self.rows += len(rows)

    def only(self, places: Sequence[int]) -> Moments:
        """The same rows with some of their labels alone, by their places among them; shares no memory."""
        found = Moments.of_no_rows(self.size, len(places))
        kept = torch.tensor([*range(self.size), *(self.size + place for place in places), self.size + self.rated])
        # The order of columns stays, so the lower triangle remains one.
        found.table[: len(kept), : len(kept)] = self.table[kept][:, kept]
        found.rows = self.rows
        return found

    def copy(self) -> Moments:
        """One that shares no memory."""
        return replace(self, table=self.table.clone())

    def __add__(self, other: Moments) -> Moments:
        return replace(self, table=self.table + other.table, rows=self.rows + other.rows)

    def __sub__(self, other: Moments) -> Moments:
        return replace(self, table=self.table - other.table, rows=self.rows - other.rows)


@dataclass
class GramStatistics:
    """Sufficient statistics of features (n, d) and labels (n, K): ``parts`` by objectives that share their rows, and fold."""

    size: int
    objectives: int
    folds: int
    parts: dict[tuple[Members, int], Moments] = field(default_factory=dict)
    blocks: list[Members] = field(default_factory=list)
    """The objectives by which rows they share; together all of them."""

    def __post_init__(self) -> None:
        check_integer("size", self.size, low=1)
        check_integer("objectives", self.objectives, low=1)
        check_integer("folds", self.folds, low=1)
        self.blocks = self.blocks or [tuple(range(self.objectives))]

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
        self._split({tuple(column): None for column in equal_columns(rated)})
        features, gathered = features.detach(), features.new_empty(min(CHUNK, len(features)), self.size)
        for members in self.blocks:
            there = rated[:, members[0]].nonzero()[:, 0]
            # Stable: the order of rows inside a part is that of the block.
            order = there[fold[there].argsort(stable=True)]
            values, counts = fold[order].unique_consecutive(return_counts=True)
            for value, chosen in zip(values.tolist(), order.split(counts.tolist()), strict=True):
                if (members, value) not in self.parts:
                    self.parts[members, value] = Moments.of_no_rows(self.size, len(members))
                moments = self.parts[members, value]
                space = torch.zeros(min(CHUNK, len(chosen)), len(moments.table), dtype=torch.float64)
                for some in chosen.split(CHUNK):
                    block = space[: len(some)]
                    block[:, : self.size] = torch.index_select(features, 0, some, out=gathered[: len(some)])
                    block[:, self.size : self.size + moments.rated] = labels[some][:, list(members)]
                    block[:, self.size + moments.rated] = 1.0
                    if weights is not None:
                        block *= weights[some].to(torch.float64).sqrt()[:, None]
                    moments.take(block)

    def merge(self, other: GramStatistics) -> GramStatistics:
        """Both together, as if one had seen all rows. Raises :class:`~telltale.errors.DataError` for other sizes or folds."""
        mine, theirs = (self.size, self.objectives, self.folds), (other.size, other.objectives, other.folds)
        if mine != theirs:
            raise DataError(
                f"statistics of (features, objectives, folds) {mine} and {theirs} cannot be merged; expected equal ones."
            )
        sides = []
        for one, another in ((self, other), (other, self)):
            side = GramStatistics(*mine, dict(one.parts), list(one.blocks))
            side._split(dict.fromkeys(another.blocks))
            sides.append(side.parts)
        merged = GramStatistics(*mine, blocks=side.blocks)
        for key in sides[0].keys() | sides[1].keys():
            found = [parts[key] for parts in sides if key in parts]
            merged.parts[key] = found[0] + found[1] if len(found) == 2 else found[0].copy()
        return merged

    def block_of(self, objective: int) -> Members:
        """The objectives that share their rows with ``objective``."""
        return next(members for members in self.blocks if objective in members)

    def rows_of(self, objective: int, folds: Sequence[int] | None = None) -> int:
        """Rows that rate ``objective``, of some folds (None: all)."""
        return sum(moments.rows for moments in self.by_fold(self.block_of(objective), folds).values())

    def by_fold(self, members: Members, folds: Sequence[int] | None = None) -> dict[int, Moments]:
        """The sums of one of ``blocks`` in each of ``folds`` (None: all) that has rows."""
        wanted = range(self.folds) if folds is None else folds
        return {fold: self.parts[members, fold] for fold in wanted if (members, fold) in self.parts}

    def total(self, members: Members, folds: Sequence[int] | None = None) -> Moments:
        """The sums of one of ``blocks`` over ``folds`` (None: all); a part's own where it is alone, so not to be written to."""
        found = list(self.by_fold(members, folds).values())
        if len(found) == 1:
            return found[0]
        total = Moments.of_no_rows(self.size, len(members))
        for moments in found:
            total.table += moments.table
            total.rows += moments.rows
        return total

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors, names = {}, []
        for index, ((members, fold), moments) in enumerate(sorted(self.parts.items(), key=lambda item: item[0])):
            names.append(f"{','.join(map(str, members))}:{fold}:{moments.rows}")
            tensors[str(index)] = moments.table
        metadata = {
            "telltale_ridge_statistics": "2",
            "shape": f"{self.size} {self.objectives} {self.folds}",
            "blocks": " ".join(",".join(map(str, members)) for members in self.blocks),
            "parts": " ".join(names),
        }
        write_atomically(path, save(tensors or {"none": torch.zeros(1)}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> GramStatistics:
        """Read what :meth:`save` wrote; raises :class:`~telltale.errors.CheckpointError` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("telltale_ridge_statistics") != "2":
                    raise KeyError("telltale_ridge_statistics")
                size, objectives, folds = (int(number) for number in metadata["shape"].split())
                blocks = [_members(text) for text in metadata["blocks"].split()]
                found = cls(size, objectives, folds, blocks=blocks)
                for index, name in enumerate(metadata["parts"].split()):
                    members, fold, rows = name.split(":")
                    own = _members(members)
                    found.parts[own, int(fold)] = Moments(file.get_tensor(str(index)), size, len(own), int(rows))
                return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no ridge statistics: {error}") from error

    def _split(self, others: dict[Members, None]) -> None:
        """Make every block lie inside one of ``others``, which together are all objectives."""
        blocks: list[Members] = []
        for members in self.blocks:
            inside = [tuple(member for member in members if member in other) for other in others]
            pieces = [piece for piece in inside if piece]
            blocks += pieces
            if len(pieces) == 1:
                continue
            for fold in range(self.folds):
                moments = self.parts.pop((members, fold), None)
                if moments is not None:
                    for piece in pieces:
                        self.parts[piece, fold] = moments.only([members.index(member) for member in piece])
        self.blocks = sorted(blocks)

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


def equal_columns(rated: Tensor) -> list[list[int]]:
    """The columns of a mask (n, K) in sets of equal ones, in ascending order."""
    found: dict[bytes, list[int]] = {}
    for member, column in enumerate(rated.T.contiguous().numpy()):
        found.setdefault(column.tobytes(), []).append(member)
    return list(found.values())


def _members(text: str) -> Members:
    return tuple(int(member) for member in text.split(","))


def fold_of(groups: Tensor, folds: int) -> Tensor:
    """The fold 0..folds-1 of each prompt id (n,): a hash of the id alone, so that shards and processes agree on it."""
    unique, where = groups.unique(return_inverse=True)
    hashed = [
        int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "big") for key in unique.tolist()
    ]
    return torch.tensor([value % folds for value in hashed], dtype=torch.long)[where]
