"""Objectives as linear maps of frozen features: one ridge regression each, all from one pass over the rows.

ArmoRM (arXiv 2406.12845), stage 1: min_W E |W h - r|^2 over the ratings that are there, no intercept, alpha per objective from
{1e-4, ..., 1e4} by validation error. Objectives that are rated on the same rows share their Gram matrix and its Cholesky factor
for each alpha (nine of them cost a third of one eigendecomposition). Folds are prompts, not rows: responses to one prompt never
stand on both sides. The final weights are fitted on all rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.align.judge.labels import check_rated
from telltale.align.judge.statistics import Pattern, Statistics
from telltale.configuration import check_choice, check_integer
from telltale.errors import ConfigError, DataError

ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""The official grid."""
VALIDATIONS = ("grouped", "loo", "gcv", "official")
BLOCK = 8192
"""Rows that are converted to float64 at a time."""


@dataclass(frozen=True)
class RidgeFit:
    """One linear map per objective; all tensors float64."""

    weights: Tensor
    """(K, d)."""
    alpha: Tensor
    """(K,)."""
    validation_mse: Tensor
    """(A, K): held-out mean squared error for each alpha."""
    alphas: Tensor
    """(A,)."""
    rows: Tensor
    """(K,): rows that rate the objective."""
    under_determined: Tensor
    """(K,) bool: fewer rows than features, so that the fit leans on alpha alone."""
    intercept: Tensor
    """(K,): 0 unless asked for."""

    def predict(self, features: Tensor) -> Tensor:
        """Rewards (n, K) in the dtype of ``features`` (n, d)."""
        return features @ self.weights.T.to(features.dtype) + self.intercept.to(features.dtype)


def fit_ridge(
    features: Tensor,
    ratings: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    groups: Tensor | None = None,
    folds: int = 5,
    validation: str = "grouped",
    intercept: bool = False,
    weights: Tensor | None = None,
    rows: Sequence[str] | None = None,
    seed: int = 42,
) -> RidgeFit:
    """Ridge regression of each column of ``ratings`` (n, K; NaN: missing) on ``features`` (n, d), alpha chosen per column.

    ``groups`` (n,): prompt ids; rows of one prompt share a fold. ``validation``: "grouped" K-fold over prompts; "loo"
    (exact leave-one-row-out) or "gcv", both of which leak where prompts repeat, with a warning; "official" is the released
    script: a random 80/20 split of rows from ``seed``, weights from the 80% alone. ``weights`` (n,) multiply squared errors.
    ``intercept`` adds one, not penalised. ``rows``: ids for messages.

    Raises :class:`~telltale.errors.ConfigError` for alphas that are not above 0, and
    :class:`~telltale.errors.DataError` for features that are not finite (naming the row), objectives without ratings, or fewer
    prompts than two folds need.
    """
    check_choice("validation", validation, VALIDATIONS)
    grid = _grid(alphas)
    if features.ndim != 2 or ratings.ndim != 2:
        raise DataError(
            f"features and ratings have {features.ndim} and {ratings.ndim} dimensions; expected (n, d) and (n, K)."
        )
    check_rated(ratings, [f"objective {index}" for index in range(ratings.shape[1])])
    x, y, offsets, means = features, ratings, torch.zeros(ratings.shape[1], dtype=torch.float64), None
    if intercept:
        x, y, means, offsets = _centred(features, ratings, weights)
    if validation in ("loo", "gcv"):
        if groups is not None and len(groups.unique()) < len(groups):
            warnings.warn(
                f"{validation!r} leaves out rows, and prompts have several here: its errors are too small.",
                stacklevel=2,
            )
        fit = _from_rows(x, y, grid, weights, leave_one_out=validation == "loo")
    else:
        check_integer("folds", folds, low=2)
        by_hand = official_split(len(x), seed) if validation == "official" else None
        statistics = Statistics(features.shape[1], ratings.shape[1], folds if by_hand is None else 2)
        for first in range(0, len(features), BLOCK):
            part = slice(first, first + BLOCK)
            statistics.add(
                x[part],
                y[part],
                groups=None if groups is None else groups[part],
                weights=None if weights is None else weights[part],
                rows=None if rows is None else rows[part],
                first_row=first,
                fold=None if by_hand is None else by_hand[part],
            )
        fit = fit_from_statistics(statistics, alphas=alphas, official=by_hand is not None)
    if means is None:
        return fit
    return RidgeFit(**vars(fit) | {"intercept": offsets - fit.weights @ means})


def fit_from_statistics(
    statistics: Statistics, *, alphas: Sequence[float] = ALPHAS, official: bool = False
) -> RidgeFit:
    """:func:`fit_ridge` from merged statistics alone: cross-validation by subtracting folds, final weights on all rows.

    ``official`` holds out fold 1 alone, and never folds it back. Raises :class:`~telltale.errors.DataError` for an objective
    without rows or all of whose rows are in one fold.
    """
    grid = _grid(alphas)
    count = statistics.objectives
    errors = torch.zeros(len(grid), count, dtype=torch.float64)
    weights = torch.zeros(count, statistics.size, dtype=torch.float64)
    chosen = torch.zeros(count, dtype=torch.float64)
    left_out = 1 if official else None
    for patterns, members in _shared_patterns(statistics):
        present = [fold for fold in range(statistics.folds) if any((p, fold) in statistics.parts for p in patterns)]
        held_out = [1] if official else present
        if len(present) < 2:
            raise DataError(
                f"all rows of objective {members[0]} belong to one fold of prompts; expected more prompts than that to "
                f"choose alpha by."
            )
        whole = statistics.gram(patterns)
        number = sum(statistics.square_and_count(members[0], only=fold)[1] for fold in held_out)
        for fold in held_out:
            errors[:, members] += _fold_errors(statistics, patterns, members, fold, grid, whole) / number
        chosen[members] = grid[errors[:, members].argmin(0)]
        gram = statistics.gram(patterns, without=left_out) if official else whole
        for alpha in chosen[members].unique():
            own = [member for member in members if chosen[member] == alpha]
            weights[own] = solved(gram, alpha, _crosses(statistics, own, without=left_out)).T
    rows = torch.tensor([statistics.rows_of(member) for member in range(count)])
    return _result(weights, chosen, errors, grid, rows, statistics.size)


def official_split(rows: int, seed: int = 42) -> Tensor:
    """The released script's random split of rows: 1 for the 20% to choose alpha by, else 0; (rows,)."""
    fold = torch.zeros(rows, dtype=torch.long)
    fold[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: max(1, rows // 5)]] = 1
    return fold


def solved(gram: Tensor, alpha: Tensor, cross: Tensor) -> Tensor:
    """(gram + alpha)^-1 cross, (d, m), for positive semidefinite ``gram`` (d, d)."""
    ridged = gram.clone()
    ridged.diagonal().add_(alpha)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if not int(failed):
        return torch.cholesky_solve(cross, factor)
    # Rounding has made the matrix indefinite: alpha is far below the Gram matrix's own rounding.
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.T @ cross) / (values.clamp_min(0) + alpha)[:, None])


def _fold_errors(
    statistics: Statistics, patterns: list[Pattern], members: list[int], fold: int, grid: Tensor, whole: Tensor
) -> Tensor:
    """Squared errors (A, members) on one fold of the fit without it: y^T y - 2 w^T X^T y + w^T X^T X w, from statistics."""
    others = statistics.gram(patterns, without=fold)
    inside = whole - others
    train, test = _crosses(statistics, members, without=fold), _crosses(statistics, members, only=fold)
    squares = torch.tensor(
        [statistics.square_and_count(member, only=fold)[0] for member in members], dtype=torch.float64
    )
    found = []
    for alpha in grid:
        w = solved(others, alpha, train)
        found.append(squares - 2 * (w * test).sum(0) + (w * (inside @ w)).sum(0))
    return torch.stack(found).clamp_min(0.0)


def _crosses(
    statistics: Statistics, members: list[int], *, without: int | None = None, only: int | None = None
) -> Tensor:
    """X^T y of several objectives, (d, members)."""
    return torch.stack([statistics.cross(member, without=without, only=only) for member in members], dim=1)


def _shared_patterns(statistics: Statistics) -> list[tuple[list[Pattern], list[int]]]:
    """Objectives that are rated on exactly the same rows share all matrices: (their patterns, the objectives)."""
    found: dict[tuple[Pattern, ...], list[int]] = {}
    for member in range(statistics.objectives):
        patterns = tuple(pattern for pattern in statistics.patterns if pattern[member])
        if not patterns:
            raise DataError(f"no row rates objective {member}; expected at least one rating for every objective.")
        found.setdefault(patterns, []).append(member)
    return [(list(patterns), members) for patterns, members in found.items()]


def _from_rows(x: Tensor, y: Tensor, grid: Tensor, weights: Tensor | None, *, leave_one_out: bool) -> RidgeFit:
    """Leave-one-out residuals e_i / (1 - h_ii), or the generalised form with the mean of h, for each objective's own rows."""
    count = y.shape[1]
    errors = torch.zeros(len(grid), count, dtype=torch.float64)
    found = torch.zeros(count, x.shape[1], dtype=torch.float64)
    chosen = torch.zeros(count, dtype=torch.float64)
    rows = torch.zeros(count, dtype=torch.long)
    for member in range(count):
        rated = ~y[:, member].isnan()
        rows[member] = int(rated.sum())
        scale = torch.ones(len(y), dtype=torch.float64) if weights is None else weights.double()
        own, target = x[rated].double() * scale[rated, None].sqrt(), y[rated, member].double() * scale[rated].sqrt()
        values, vectors = torch.linalg.eigh(own.T @ own)
        values = values.clamp_min(0)
        turned, cross = own @ vectors, vectors.T @ (own.T @ target)
        for index, alpha in enumerate(grid):
            residual = target - turned @ (cross / (values + alpha))
            leverage = turned.square() @ (1 / (values + alpha))
            kept = 1 - (leverage if leave_one_out else leverage.mean())
            errors[index, member] = (residual / kept).square().sum() / scale[rated].sum()
        chosen[member] = grid[int(errors[:, member].argmin())]
        found[member] = vectors @ (cross / (values + chosen[member]))
    return _result(found, chosen, errors, grid, rows, x.shape[1])


def _centred(x: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and ratings without their means; all objectives have to share their rows for one mean of the features."""
    rated = ~y.isnan()
    if not bool((rated == rated[:, :1]).all()):
        raise ConfigError("intercept=True needs objectives that are rated on the same rows; fit them one at a time.")
    scale = rated[:, 0].double() * (1.0 if weights is None else weights.double())
    means = (scale[:, None] * x.double()).sum(0) / scale.sum()
    offsets = (scale[:, None] * y.double().nan_to_num()).sum(0) / scale.sum()
    return x.double() - means, y.double() - offsets, means, offsets


def _grid(alphas: Sequence[float]) -> Tensor:
    grid = torch.tensor([float(alpha) for alpha in alphas], dtype=torch.float64)
    if not len(grid) or not bool((torch.isfinite(grid) & (grid > 0)).all()):
        raise ConfigError(f"alphas={list(alphas)} is not allowed; expected at least one number, all above 0.")
    return grid


def _result(weights: Tensor, chosen: Tensor, errors: Tensor, grid: Tensor, rows: Tensor, size: int) -> RidgeFit:
    return RidgeFit(weights, chosen, errors, grid, rows, rows < size, torch.zeros(len(weights), dtype=torch.float64))
