"""Rewards that no longer follow a nuisance such as predicted verbosity: r' = r T, and the proof on rows that were held out.

ArmoRM (arXiv 2406.12845), stage 2a: r'_i = r_i - lambda_i r_v with lambda_i such that the rank correlation of r'_i and r_v is
zero over a reference set; T is the identity less lambda in row v, so r'_v = 0. The paper pools all rows. Pooled zero can leave any
correlation within a prompt, which is where responses are compared; with ``groups`` the root is taken there instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from telltale.align.judge.roots import (
    METHODS,
    by_group_size,
    correlation,
    from_sums,
    group_sums,
    grouped_root,
    official_root,
    root,
)
from telltale.configuration import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError

HOW = ("sequential", "joint")
SWEEPS = 100
HIDDEN, SEEN = 0.05, 0.15
"""A pooled correlation below the first with one above the second within prompts is worth a warning."""


def decorrelate(
    rewards: Tensor, nuisance: Tensor, *, method: str = "spearman", groups: Tensor | None = None, grid: str = "exact"
) -> Tensor:
    """lambda of every objective, (K,) float64: ``rewards`` (n, K) less lambda * ``nuisance`` (n,) is uncorrelated with it.

    ``groups`` (n,): prompt ids, for the root within prompts; None is the paper's pooled one. ``method``: "spearman", "kendall" or
    "pearson". ``grid`` "official" is the released script's 24 points and one-sided threshold. The nuisance's own column
    gives 1, a constant objective 0.

    Raises :class:`~telltale.errors.DataError` for a nuisance that is tied throughout (within every group, with ``groups``) or
    fewer than two rows, and :class:`~telltale.errors.NumericalError` for values that are not finite.
    """
    check_choice("method", method, METHODS)
    check_choice("grid", grid, ("exact", "official"))
    if rewards.ndim != 2 or nuisance.shape != rewards.shape[:1]:
        raise DataError(
            f"rewards and nuisance have shapes {tuple(rewards.shape)} and {tuple(nuisance.shape)}; expected (n, K) and (n,)."
        )
    if grid == "official":
        if groups is not None or method != "spearman":
            raise ConfigError("grid='official' is pooled and Spearman's; leave out groups and method.")
        found = [official_root(column, nuisance) for column in rewards.T]
    elif groups is None:
        found = [root(column, nuisance, method=method) for column in rewards.T]
    else:
        members = by_group_size(groups)
        found = [grouped_root(column, nuisance, groups, method=method, members=members) for column in rewards.T]
    return torch.tensor(found, dtype=torch.float64)


def transform_matrix(lambdas: Tensor, nuisances: Sequence[int]) -> Tensor:
    """T (K, K) for ``lambdas`` (K,) of one nuisance or (M, K) of several columns ``nuisances``: r' = r T.

    The identity less lambda in each nuisance's row; the nuisances' own columns are zero.
    """
    rows = lambdas.reshape(len(nuisances), -1)
    transform = torch.eye(rows.shape[1], dtype=torch.float64)
    for row, nuisance in zip(rows, nuisances, strict=True):
        transform[nuisance] -= row
    transform[:, list(nuisances)] = 0.0
    return transform


def fit_transform(
    rewards: Tensor,
    nuisances: Sequence[int],
    *,
    method: str = "spearman",
    groups: Tensor | None = None,
    how: str = "sequential",
    grid: str = "exact",
) -> Tensor:
    """T (K, K) that decorrelates every column of ``rewards`` (n, K) from the columns ``nuisances``.

    Several nuisances: "sequential" takes away one after the other, each as the earlier ones have left it; "joint" finds all
    lambdas together, by cyclic roots, so that every correlation is zero at once.

    Raises what :func:`decorrelate` raises, and :class:`~telltale.errors.ConfigError` for nuisances that are repeated or no columns.
    """
    check_choice("how", how, HOW)
    columns = list(nuisances)
    if len(set(columns)) < len(columns) or not all(0 <= column < rewards.shape[1] for column in columns):
        raise ConfigError(f"nuisances={columns} are not distinct columns of {rewards.shape[1]} objectives.")
    exact = rewards.double()
    if how == "joint" and len(columns) > 1:
        return transform_matrix(_joint(exact, columns, method, groups), columns)
    transform = torch.eye(rewards.shape[1], dtype=torch.float64)
    for column in columns:
        current = exact @ transform
        lambdas = decorrelate(current, current[:, column], method=method, groups=groups, grid=grid)
        transform = transform @ transform_matrix(lambdas, [column])
    return transform


def _joint(rewards: Tensor, columns: list[int], method: str, groups: Tensor | None) -> Tensor:
    """lambdas (M, K): cyclic roots, one nuisance at a time, until none moves."""
    lambdas = torch.zeros(len(columns), rewards.shape[1], dtype=torch.float64)
    for member in range(rewards.shape[1]):
        if member in columns:
            lambdas[columns.index(member), member] = 1.0
            continue
        rest = rewards[:, member].clone()
        for _ in range(SWEEPS):
            moved = 0.0
            for index, column in enumerate(columns):
                nuisance = rewards[:, column]
                step = float(decorrelate(rest[:, None], nuisance, method=method, groups=groups))
                lambdas[index, member] += step
                rest = rest - step * nuisance
                moved = max(moved, abs(step) * float(nuisance.std()))
            if moved <= 1e-9 * float(rewards[:, member].std() + 1e-300):
                break
    return lambdas


@dataclass(frozen=True)
class Estimate:
    """A correlation with its bootstrap interval over groups; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DecorrelationRow:
    """One objective against one nuisance on held-out rows."""

    objective: str
    nuisance: str
    pooled_before: Estimate
    pooled_after: Estimate
    within_before: Estimate
    within_after: Estimate


@dataclass(frozen=True)
class DecorrelationReport:
    """What is left of each correlation on rows that lambda was not fitted on."""

    rows: tuple[DecorrelationRow, ...]
    method: str
    level: float
    warnings: tuple[str, ...]

    @property
    def worst_pooled(self) -> float:
        """The largest |pooled correlation| that is left; NaN if none is defined."""
        return _worst(row.pooled_after.value for row in self.rows)

    @property
    def worst_within(self) -> float:
        """The largest |correlation within prompts| that is left; NaN if none is defined."""
        return _worst(row.within_after.value for row in self.rows)


def decorrelation_report(
    rewards: Tensor,
    transform: Tensor,
    nuisances: Sequence[int],
    names: Sequence[str],
    *,
    groups: Tensor,
    method: str = "spearman",
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> DecorrelationReport:
    """Correlations of r and of r T with each nuisance on held-out ``rewards`` (n, K), pooled and within ``groups`` (n,).

    Intervals resample whole groups. A warning is given for every objective whose pooled correlation is near zero while the one
    within prompts is not.
    """
    check_range("level", level, low=0.0, below=1.0)
    check_integer("resamples", resamples, low=1)
    before, after = rewards.double(), rewards.double() @ transform.double()
    draws = _resampled_rows(groups, resamples, seed)
    rows, warned = [], []
    for nuisance in nuisances:
        values = before[:, nuisance]
        for member, name in enumerate(names):
            if member in nuisances:
                continue
            sides = before[:, member], after[:, member]
            pooled = [_pooled(side, values, draws, method, level) for side in sides]
            within = [_within(side, values, groups, resamples, method, level, seed) for side in sides]
            row = DecorrelationRow(name, names[nuisance], pooled[0], pooled[1], within[0], within[1])
            rows.append(row)
            if abs(row.pooled_after.value) < HIDDEN and abs(row.within_after.value) > SEEN:
                warned.append(
                    f"{name} is uncorrelated with {names[nuisance]} over all rows ({row.pooled_after.value:+.2f}) but not within "
                    f"prompts ({row.within_after.value:+.2f}), where responses are compared; decorrelate within prompts."
                )
    return DecorrelationReport(tuple(rows), method, level, tuple(warned))


def _pooled(first: Tensor, second: Tensor, draws: list[Tensor], method: str, level: float) -> Estimate:
    found = [correlation(first[rows], second[rows], method=method) for rows in draws]
    return _estimate(correlation(first, second, method=method), found, level)


def _within(
    first: Tensor, second: Tensor, groups: Tensor, resamples: int, method: str, level: float, seed: int
) -> Estimate:
    sums = group_sums(first, second, groups, method=method)
    if not len(sums):
        return Estimate(math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    return _estimate(from_sums(sums.sum(0)), [from_sums(row) for row in drawn @ sums], level)


def _estimate(value: float, found: list[float], level: float) -> Estimate:
    known = np.array([number for number in found if math.isfinite(number)])
    if not len(known):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _resampled_rows(groups: Tensor, resamples: int, seed: int) -> list[Tensor]:
    """Rows of as many groups as there are, drawn with replacement."""
    order = torch.argsort(groups, stable=True)
    counts = groups[order].unique_consecutive(return_counts=True)[1]
    parts = order.split(counts.tolist())
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(parts), (resamples, len(parts)), generator=generator).tolist()
    return [torch.cat([parts[index] for index in drawn]) for drawn in draws]


def _worst(values: object) -> float:
    known = [abs(value) for value in values if math.isfinite(value)]  # type: ignore[attr-defined]
    return max(known, default=math.nan)
