"""Objectives as linear maps of frozen features: one ridge regression each, all from one pass over the rows.

ArmoRM (arXiv 2406.12845), stage 1: min_W E |W h - r|^2 over the ratings that exist, no intercept, alpha per objective from
{1e-4, ..., 1e4} by validation error. Folds are prompts, not rows: responses to one prompt are never in two folds. The final weights
are fitted on all rows. Objectives that are rated on the same rows share their Gram matrix G, and one reduction of it serves
all alphas. An intercept, which the paper has not, is not penalised: the sums are taken about the means of the rows that are fitted.

(G + alpha) W = C is solved for many alphas from one orthogonal reduction of G to a band: G = Q S Q^T with S of bandwidth b, by
blocks of Householder reflections (Bischof, Lang & Sun 2000, first stage), in 2 d^3 operations, nearly all of them in matrix
products. Then (G + alpha)^-1 C = Q (S + alpha)^-1 Q^T C, and factoring the band costs d b^2. A Cholesky factorisation costs d^3 / 3
for every alpha, at a lower speed; a full eigendecomposition costs more than nine of them.

Rounding in the band is relative to the largest eigenvalue, whatever the scales of the columns; Cholesky's is relative to each
column's own scale. So the band only compares alphas. The chosen solution is refined once against G itself, and solved for by
Cholesky where the correction is more than rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from telltale.align.judge.data import check_rated
from telltale.align.judge.gram import CHUNK, GramStatistics, Moments, equal_columns
from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError

ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""The official grid."""
BLOCK = 32768
"""Rows that are sorted by fold at a time."""
VALIDATIONS = ("grouped", "loo", "gcv", "official")
WIDTH = 64
"""Bandwidth. Wider panels are faster to apply, and slower to factor."""
DIRECT = 384
"""Below this d, factoring anew for each of nine alphas is no slower."""
ROUNDING = 1e-11
"""The largest correction, relative to a column's largest weight, that counts as rounding."""
Reflections = list[tuple[int, Tensor, Tensor]]
"""First row, V and T of each Q_j = I - V T V^T: Q is their product, first to last."""


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
    if len(features) != len(ratings):
        raise DataError(f"there are {len(features)} rows of features and {len(ratings)} of ratings; expected as many.")
    check_rated(ratings, [f"objective {index}" for index in range(ratings.shape[1])])
    if validation in ("loo", "gcv"):
        if groups is not None and len(groups.unique()) < len(groups):
            warnings.warn(
                f"{validation!r} leaves out rows, and prompts have several here: its errors are too small.",
                stacklevel=2,
            )
        return _from_rows(features, ratings, grid, weights, intercept=intercept, leave_one_out=validation == "loo")
    if validation == "official":
        held_out = official_split(len(features), seed).bool()
        return _official(features, ratings, grid, weights, rows, held_out, intercept=intercept)
    check_integer("folds", folds, low=2)
    statistics = GramStatistics(features.shape[1], ratings.shape[1], folds)
    for part in _blocks(len(features)):
        statistics.add(
            features[part],
            ratings[part],
            groups=None if groups is None else groups[part],
            weights=None if weights is None else weights[part],
            rows=None if rows is None else rows[part],
            first_row=part.start,
        )
    return fit_from_statistics(statistics, alphas=alphas, intercept=intercept)


def fit_from_statistics(
    statistics: GramStatistics,
    *,
    alphas: Sequence[float] = ALPHAS,
    folds: Sequence[int] | None = None,
    intercept: bool = False,
) -> RidgeFit:
    """:func:`fit_ridge` from merged statistics alone: cross-validation by subtracting folds, final weights on all rows.

    ``folds`` are those to fit on and to choose alpha by; None is all of them.
    Raises :class:`~telltale.errors.DataError` for an objective without rows or all of whose rows are in one fold.
    """
    grid = _grid(alphas)
    errors = torch.zeros(len(grid), statistics.objectives, dtype=torch.float64)
    weights = torch.zeros(statistics.objectives, statistics.size, dtype=torch.float64)
    offsets = torch.zeros(statistics.objectives, dtype=torch.float64)
    for block in statistics.blocks:
        members, parts = list(block), statistics.by_fold(block, folds)
        if not parts:
            raise DataError(
                f"no row rates objective {block[0]}; expected at least one rating for every objective to fit on."
            )
        if len(parts) < 2:
            raise _one_fold(block[0])
        whole = statistics.total(block, folds)
        for inside in parts.values():
            errors[:, members] += _fold_errors(whole - inside, inside, grid, intercept=intercept)
        errors[:, members] /= whole.count
        weights[members], offsets[members] = _fitted(whole, grid[errors[:, members].argmin(0)], intercept=intercept)
    rows = torch.tensor([statistics.rows_of(member, folds) for member in range(statistics.objectives)])
    return _result(weights, errors, grid, rows, offsets)


def refitted(statistics: GramStatistics, fit: RidgeFit, *, intercept: bool = False) -> RidgeFit:
    """``fit`` with its alphas and errors, but with the weights of all rows of ``statistics``."""
    weights, offsets = fit.weights.clone(), fit.intercept.clone()
    for block in statistics.blocks:
        members = list(block)
        weights[members], offsets[members] = _fitted(statistics.total(block), fit.alpha[members], intercept=intercept)
    rows = torch.tensor([statistics.rows_of(member) for member in range(statistics.objectives)])
    return replace(fit, weights=weights, intercept=offsets, rows=rows, under_determined=rows < weights.shape[1])


def official_split(rows: int, seed: int = 42) -> Tensor:
    """The released script's random split of rows: 1 for the 20% to choose alpha by, else 0; (rows,)."""
    fold = torch.zeros(rows, dtype=torch.long)
    fold[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: max(1, rows // 5)]] = 1
    return fold


def solved(gram: Tensor, alpha: Tensor, cross: Tensor) -> Tensor:
    """(gram + alpha)^-1 cross, (d, m), for positive semidefinite ``gram`` (d, d); float64."""
    ridged = np.array(gram.numpy(), order="F")
    np.fill_diagonal(ridged, ridged.diagonal() + float(alpha))
    factor, failed = lapack.dpotrf(ridged, lower=1, clean=0, overwrite_a=1)
    if not failed:
        return torch.from_numpy(lapack.dpotrs(factor, cross.numpy(), lower=1)[0])
    # Rounding has made the matrix indefinite: alpha is far below the Gram matrix's own rounding.
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.T @ cross) / (values.clamp_min(0) + alpha)[:, None])


class RidgePath:
    """(gram + alpha)^-1 cross for positive semidefinite ``gram`` (d, d), float64, and several alphas above 0.

    ``width`` of the band; None: 64, or no band for a small ``gram``, where it does not pay.
    """

    def __init__(self, gram: Tensor, *, width: int | None = None) -> None:
        self._gram = gram
        self._band: np.ndarray | None = None
        if width is not None or len(gram) >= DIRECT:
            # Rows a power of two apart would fall into the same few sets of the cache.
            space = gram.new_empty(len(gram), len(gram) + 8)[:, : len(gram)]
            reduced, self._reflections = _reduced(space.copy_(gram), width or WIDTH)
            self._band = _diagonals(reduced, width or WIDTH)

    def solutions(self, alphas: Tensor, cross: Tensor) -> Tensor:
        """For all alphas (A,), near enough to choose one by: (A, d, m)."""
        factors = [factor for alpha in alphas.tolist() if (factor := self._factor(alpha)) is not None]
        if len(factors) < len(alphas):
            return torch.stack([solved(self._gram, alpha, cross) for alpha in alphas])
        return self._through(factors, cross).view(len(cross), len(alphas), -1).transpose(0, 1)

    def refined(self, alpha: Tensor, cross: Tensor, near: Tensor) -> Tensor:
        """For one alpha, from what :meth:`solutions` found for it, as exact as :func:`solved`: (d, m)."""
        factor = self._factor(float(alpha))
        if factor is not None:
            correction = self._through([factor], cross - self._gram @ near - alpha * near)
            if bool((correction.abs().amax(0) <= ROUNDING * near.abs().amax(0)).all()):
                return near + correction
        return solved(self._gram, alpha, cross)

    def _factor(self, alpha: float) -> np.ndarray | None:
        """Of S + alpha; None without a band, or if rounding has made it indefinite."""
        if self._band is None:
            return None
        ridged = self._band.copy(order="F")
        ridged[0] += alpha
        factor, failed = lapack.dpbtrf(ridged, lower=1, overwrite_ab=1)
        return None if failed else factor

    def _through(self, factors: list[np.ndarray], cross: Tensor) -> Tensor:
        """Q (S + alpha)^-1 Q^T cross of several factors side by side, (d, A m)."""
        turned = _apply(self._reflections, cross.clone(), transposed=True).numpy()
        solutions = [lapack.dpbtrs(factor, turned, lower=1)[0] for factor in factors]
        return _apply(self._reflections, torch.from_numpy(np.concatenate(solutions, axis=1)))


def _official(
    x: Tensor,
    y: Tensor,
    grid: Tensor,
    weights: Tensor | None,
    rows: Sequence[str] | None,
    held_out: Tensor,
    *,
    intercept: bool,
) -> RidgeFit:
    """The released script's way: alpha by the rows ``held_out`` (n,), which no Gram matrix holds; weights of the others."""
    statistics = GramStatistics(x.shape[1], y.shape[1], 1)
    for part in _blocks(len(x)):
        statistics.add(
            x[part],
            y[part].masked_fill(held_out[part, None], torch.nan),
            weights=None if weights is None else weights[part],
            rows=None if rows is None else rows[part],
            first_row=part.start,
            fold=torch.zeros(len(x[part]), dtype=torch.long),
        )
    rated = ~y.isnan()
    for member in range(y.shape[1]):
        if not bool(rated[held_out, member].any() & rated[~held_out, member].any()):
            raise _one_fold(member)
    errors = torch.zeros(len(grid), y.shape[1], dtype=torch.float64)
    fitted = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
    offsets = torch.zeros(y.shape[1], dtype=torch.float64)
    for block in statistics.blocks:
        members, normal = list(block), _normal(statistics.total(block), intercept=intercept)
        solver = RidgePath(normal.gram)
        candidates = solver.solutions(grid, normal.cross)
        # Objectives that share their training rows may be rated on different ones of the others.
        for places in equal_columns(rated[held_out][:, members]):
            these = [members[place] for place in places]
            there = (held_out & rated[:, these[0]]).nonzero()[:, 0]
            shift = normal.offsets(candidates)[:, places]
            errors[:, these] = _errors_on(there, x, y[:, these], weights, candidates[:, :, places], shift)
        chosen = errors[:, members].argmin(0)
        for index in chosen.unique().tolist():
            own_places = (chosen == index).nonzero()[:, 0]
            near = candidates[index][:, own_places]
            found = solver.refined(grid[index], normal.cross[:, own_places], near)
            fitted[torch.tensor(members)[own_places]] = found.T
        offsets[members] = normal.offsets(fitted[members].T)
    return _result(fitted, errors, grid, rated.sum(0), offsets)


@dataclass(frozen=True)
class _Normal:
    """What the normal equations are made of: about the rows' means with an intercept, about zero without."""

    gram: Tensor
    cross: Tensor
    means: Tensor
    label_means: Tensor

    def offsets(self, weights: Tensor) -> Tensor:
        """The intercepts of ``weights`` (..., d, m): (..., m)."""
        return self.label_means - torch.einsum("d,...dm->...m", self.means, weights)


def _normal(moments: Moments, *, intercept: bool) -> _Normal:
    if not intercept:
        zero = torch.zeros_like(moments.sums)
        return _Normal(moments.gram, moments.cross, zero, torch.zeros(moments.rated, dtype=torch.float64))
    means, label_means = moments.sums / moments.count, moments.label_sums / moments.count
    gram = moments.gram.addr_(means, moments.sums, alpha=-1)
    return _Normal(gram, moments.cross - torch.outer(moments.sums, label_means), means, label_means)


def _fitted(moments: Moments, alphas: Tensor, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Weights (m, d) and intercepts (m,) of the objectives of ``moments``, each with its own of ``alphas`` (m,)."""
    normal, weights = _normal(moments, intercept=intercept), torch.zeros(moments.rated, moments.size).double()
    for alpha in alphas.unique():
        own = (alphas == alpha).nonzero()[:, 0]
        weights[own] = solved(normal.gram, alpha, normal.cross[:, own]).T
    return weights, normal.offsets(weights.T)


def _blocks(rows: int) -> list[slice]:
    return [slice(first, first + BLOCK) for first in range(0, rows, BLOCK)]


def _errors_on(
    rows: Tensor, x: Tensor, y: Tensor, weights: Tensor | None, candidates: Tensor, offsets: Tensor
) -> Tensor:
    """Mean squared errors (A, m) of ``candidates`` (A, d, m) with ``offsets`` (A, m) on some rows."""
    alphas, size, members = candidates.shape
    side_by_side = candidates.permute(1, 0, 2).reshape(size, alphas * members)
    total, count = torch.zeros(alphas, members, dtype=torch.float64), 0.0
    for some in rows.split(CHUNK):
        predicted = (x[some].double() @ side_by_side).view(len(some), alphas, members) + offsets
        scale = torch.ones(len(some), dtype=torch.float64) if weights is None else weights[some].double()
        total += torch.einsum("n,nam->am", scale, (predicted - y[some][:, None]).square())
        count += float(scale.sum())
    return total / count


def _fold_errors(train: Moments, inside: Moments, grid: Tensor, *, intercept: bool) -> Tensor:
    """Squared errors (A, m) on one fold of the fit on the others, from statistics alone.

    Sum of (y - w^T x - b)^2 = y^T y - 2 w^T X^T y + w^T X^T X w - 2 b (1^T y - w^T X^T 1) + n b^2.
    """
    normal = _normal(train, intercept=intercept)
    w = RidgePath(normal.gram).solutions(grid, normal.cross)
    b = normal.offsets(w)
    side_by_side = w.permute(1, 0, 2).reshape(inside.size, -1)
    curved = (side_by_side * (inside.gram @ side_by_side)).sum(0).view(len(grid), inside.rated)
    plain = inside.squares - 2 * (w * inside.cross).sum(1) + curved
    beside = inside.label_sums - torch.einsum("d,adm->am", inside.sums, w)
    return (plain - 2 * b * beside + inside.count * b.square()).clamp_min(0.0)


def _one_fold(member: int) -> DataError:
    return DataError(
        f"all rows of objective {member} belong to one fold of prompts; expected more prompts than that to choose "
        f"alpha by."
    )


def _from_rows(
    x: Tensor, y: Tensor, grid: Tensor, weights: Tensor | None, *, intercept: bool, leave_one_out: bool
) -> RidgeFit:
    """Leave-one-out residuals e_i / (1 - h_ii), or the generalised form with the mean of h, for each objective's own rows."""
    count = y.shape[1]
    errors = torch.zeros(len(grid), count, dtype=torch.float64)
    found, offsets = torch.zeros(count, x.shape[1], dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    rows = torch.zeros(count, dtype=torch.long)
    for member in range(count):
        rated = ~y[:, member].isnan()
        rows[member] = int(rated.sum())
        scale = torch.ones(len(y), dtype=torch.float64) if weights is None else weights.double()
        scale, own, target = scale[rated], x[rated].double(), y[rated, member].double()
        mean, label_mean = own.new_zeros(own.shape[1]), own.new_zeros(())
        if intercept:
            mean, label_mean = (scale @ own) / scale.sum(), scale @ target / scale.sum()
        own, target = (own - mean) * scale[:, None].sqrt(), (target - label_mean) * scale.sqrt()
        values, vectors = torch.linalg.eigh(own.T @ own)
        values = values.clamp_min(0)
        turned, cross = own @ vectors, vectors.T @ (own.T @ target)
        # The mean is one more direction, without a penalty.
        along_mean = scale / scale.sum() if intercept else torch.zeros_like(scale)
        for index, alpha in enumerate(grid):
            residual = target - turned @ (cross / (values + alpha))
            leverage = turned.square() @ (1 / (values + alpha)) + along_mean
            kept = 1 - (leverage if leave_one_out else leverage.mean())
            errors[index, member] = (residual / kept).square().sum() / scale.sum()
        found[member] = vectors @ (cross / (values + grid[int(errors[:, member].argmin())]))
        offsets[member] = label_mean - found[member] @ mean
    return _result(found, errors, grid, rows, offsets)


def _grid(alphas: Sequence[float]) -> Tensor:
    grid = torch.tensor([float(alpha) for alpha in alphas], dtype=torch.float64)
    if not len(grid) or not bool((torch.isfinite(grid) & (grid > 0)).all()):
        raise ConfigError(f"alphas={list(alphas)} is not allowed; expected at least one number, all above 0.")
    return grid


def _result(weights: Tensor, errors: Tensor, grid: Tensor, rows: Tensor, offsets: Tensor) -> RidgeFit:
    return RidgeFit(weights, grid[errors.argmin(0)], errors, grid, rows, rows < weights.shape[1], offsets)


def _reduced(matrix: Tensor, width: int) -> tuple[Tensor, Reflections]:
    """Q^T matrix Q, of which the lower band is right, in place of ``matrix``, and Q."""
    reflections = []
    for column in range(0, len(matrix) - width - 1, width):
        row = column + width
        panel = np.array(matrix[row:, column:row].numpy(), order="F")
        count = min(panel.shape)
        factored, triangle, _ = lapack.dgeqrt(count, panel, overwrite_a=1)
        matrix[row : row + count, column:row] = torch.from_numpy(np.triu(factored[:count]))
        v = torch.from_numpy(np.tril(factored[:, :count], -1))
        v.diagonal().fill_(1.0)
        t = torch.from_numpy(np.triu(triangle[:count, :count]))
        rest = matrix[row:, row:]
        # Q^T A Q = A - V W^T - W V^T with Y = A V T and W = Y - V T^T V^T Y / 2.
        y = rest @ (v @ t)
        w = torch.addmm(y, v, t.T @ (v.T @ y), alpha=-0.5)
        rest.addmm_(torch.cat([v, w], dim=1), torch.cat([w, v], dim=1).T, alpha=-1)
        reflections.append((row, v, t))
    return matrix, reflections


def _diagonals(matrix: Tensor, width: int) -> np.ndarray:
    """The main diagonal and the ``width`` below it, in LAPACK's rows (width + 1, d)."""
    values = matrix.numpy()
    band = np.zeros((min(width, len(values) - 1) + 1, len(values)), order="F")
    for below in range(len(band)):
        band[below, : len(values) - below] = values.diagonal(-below)
    return band


def _apply(reflections: Reflections, columns: Tensor, *, transposed: bool = False) -> Tensor:
    """Q columns, or Q^T columns, in place of ``columns`` (d, m)."""
    for row, v, t in reflections if transposed else reversed(reflections):
        rows = columns[row:]
        rows.addmm_(v, (t.T if transposed else t) @ (v.T @ rows), alpha=-1)
    return columns
