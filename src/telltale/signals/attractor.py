"""The Sharpness Dimension over several points of one attractor, such as the last checkpoints of a run.

Definition 4.1 of arXiv 2604.19740 takes lambda_k = E_omega[sup over w in A(omega) of ln sigma_k]; the paper, like everybody,
measures one final w. Here the supremum is over the points that are given: from below, and nearer to the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from telltale.configuration import check_choice
from telltale.errors import DataError
from telltale.signals.exponents import AGGREGATES, by_rank, sharpness_dimension

OVER = ("sup", "mean")
Member = tuple[Tensor, Tensor]
"""Exponents (atoms,) and their masses (atoms,) of one minibatch at one point."""


def attractor_dimension(points: Sequence[Sequence[Member]], *, over: str = "sup", aggregate: str = "mixture") -> float:
    """SD of K points, each with its minibatches in the same order: K sequences of (exponents, masses).

    ``over`` "sup" takes the largest exponent of each rank among the points, "mean" their average; ``aggregate`` as in
    :func:`~telltale.signals.exponents.sharpness_dimension`: "rank" does so for each minibatch and averages over minibatches,
    "mixture" pools the minibatches of a point first. "sup" is at least the SD of every single point.

    Raises :class:`~telltale.errors.DataError` for no points, or points that differ in minibatches or in total mass.
    """
    check_choice("over", over, OVER)
    check_choice("aggregate", aggregate, AGGREGATES)
    if not points or not points[0] or len({len(point) for point in points}) > 1:
        raise DataError(
            f"points with {[len(point) for point in points]} minibatches; expected at least one point, and as many minibatches "
            f"at each."
        )
    totals = torch.tensor([float(mass.sum()) for point in points for _, mass in point], dtype=torch.float64)
    if bool((totals - totals[0]).abs().max() > 1e-9 * totals[0]):
        raise DataError("the points or their minibatches differ in total mass; expected points of one model.")
    if aggregate == "mixture":
        points = [[_pooled(point)] for point in points]
    combined = [by_rank(list(minibatch), over=over) for minibatch in zip(*points, strict=True)]
    return sharpness_dimension(*by_rank(combined, over="mean"))


def _pooled(point: Sequence[Member]) -> Member:
    return torch.cat([values for values, _ in point]), torch.cat([mass for _, mass in point]) / len(point)
