"""Persistent-homology dimension of a training trajectory, the baseline that arXiv 2604.19740 compares with.

In degree 0 the persistence lifetimes of a Vietoris-Rips filtration are the edge lengths of the minimum spanning tree, so
nothing beyond Prim's algorithm is needed. E_alpha is the sum of lifetimes to the power alpha (arXiv 2407.08723); the
dimension is read off how E_alpha grows with the number of points (arXiv 2111.13171, Algorithm 1). Higher degrees are
out of scope. Fractal dimensions of trajectories are easily confounded by settings and initialisation (arXiv 2406.02234).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError, NumericalError

METRICS = ("euclidean", "loss")
"""Between weight vectors, or the mean absolute difference of per-sample losses (arXiv 2302.02766)."""


@dataclass(frozen=True)
class PersistenceFit:
    """``dimension`` alpha / (1 - slope) of log E_alpha against log points; ``error`` its standard error from the fit.

    ``dimension`` is infinite where the slope reaches 1: E_alpha grows as fast as the number of points.
    """

    dimension: float
    error: float
    slope: float
    sizes: list[int]
    sums: list[float]


def pairwise(points: Tensor, *, metric: str = "euclidean") -> Tensor:
    """Distances between all rows of ``points``: (n, D) -> (n, n), float64.

    For ``metric="loss"`` a row holds the losses of all training samples at one iterate, and the distance is their mean absolute
    difference. Raises :class:`~telltale.errors.DataError` for anything but two or more rows, and
    :class:`~telltale.errors.NumericalError` for values that are not finite.
    """
    check_choice("metric", metric, METRICS)
    if points.ndim != 2 or len(points) < 2:
        raise DataError(f"points of shape {tuple(points.shape)} were given; expected (n, D) with n >= 2.")
    rows = points.detach().double()
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError("the trajectory has NaN or infinite entries; expected finite ones.")
    if metric == "euclidean":
        # The expanded square loses the small distances of a late trajectory to cancellation.
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.cdist(rows, rows, p=1.0) / rows.shape[1]


def lifetimes(distances: Tensor) -> Tensor:
    """Degree-0 persistence lifetimes, the n - 1 edges of a minimum spanning tree: (n, n) -> (n - 1,), ascending.

    Prim's algorithm on the full matrix, O(n^2). Raises :class:`~telltale.errors.DataError` unless ``distances`` is square.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise DataError(f"distances of shape {tuple(distances.shape)} were given; expected a square matrix.")
    count = len(distances)
    reach = distances[0].double().clone()
    reach[0] = math.inf
    outside = torch.ones(count, dtype=torch.bool)
    outside[0] = False
    edges = []
    for _ in range(count - 1):
        nearest = int(reach.argmin())
        edges.append(float(reach[nearest]))
        outside[nearest] = False
        reach = torch.where(outside, torch.minimum(reach, distances[nearest].double()), math.inf)
    return torch.tensor(sorted(edges), dtype=torch.float64)


def lifetime_sum(distances: Tensor, *, alpha: float = 1.0) -> float:
    """E_alpha: the sum of lifetimes to the power ``alpha`` > 0."""
    check_range("alpha", alpha, above=0.0)
    return float(lifetimes(distances).pow(alpha).sum())


def persistence_dimension(
    distances: Tensor,
    *,
    alpha: float = 1.0,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> PersistenceFit:
    """Fit E_alpha of random subsets against their size: (n, n) distances -> dimension.

    ``sizes`` None takes eight sizes evenly spaced in the logarithm from n/10 (at least 8) to n. ``repeats`` subsets per
    size are averaged in the logarithm. Raises :class:`~telltale.errors.ConfigError` for sizes that do not fit and
    :class:`~telltale.errors.NumericalError` if all points of a subset coincide.
    """
    check_range("alpha", alpha, above=0.0)
    check_integer("repeats", repeats, low=1)
    count = len(distances)
    chosen = sorted(set(sizes)) if sizes is not None else _default_sizes(count)
    if len(chosen) < 3 or chosen[0] < 2 or chosen[-1] > count:
        raise ConfigError(
            f"sizes={chosen} is not allowed; expected three or more subset sizes from 2 to {count} points."
        )
    generator = torch.Generator().manual_seed(seed)
    logs = []
    for size in chosen:
        draws = [torch.randperm(count, generator=generator)[:size] for _ in range(repeats)]
        sums = [lifetime_sum(distances[draw][:, draw], alpha=alpha) for draw in draws]
        if min(sums) <= 0.0:
            raise NumericalError(
                f"all {size} points of a subset coincide; a trajectory that does not move has no dimension."
            )
        logs.append(sum(map(math.log, sums)) / repeats)
    slope, slope_error = _fitted(
        torch.tensor(chosen, dtype=torch.float64).log(), torch.tensor(logs, dtype=torch.float64)
    )
    dimension = alpha / (1.0 - slope) if slope < 1.0 else math.inf
    error = alpha * slope_error / (1.0 - slope) ** 2 if slope < 1.0 else math.inf
    return PersistenceFit(dimension, error, slope, chosen, [math.exp(value) for value in logs])


def _default_sizes(count: int) -> list[int]:
    low = max(8, count // 10)
    if count < 3 * low:
        raise DataError(f"{count} points were given; expected at least {3 * low} for a fit over subset sizes.")
    return sorted({round(low * (count / low) ** (index / 7)) for index in range(8)})


def _fitted(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Least-squares slope of ``y`` on ``x`` and its standard error."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    variance = float(residual @ residual) / (len(x) - 2)
    return slope, math.sqrt(variance / float(centred @ centred))
