"""Rewards that no longer follow a nuisance such as predicted verbosity: r' = r T, and the proof on held-out rows.

ArmoRM (arXiv 2406.12845), stage 2a: r'_i = r_i - lambda_i r_v with lambda_i such that the rank correlation of r'_i and r_v is
zero over a reference set; T is the identity less lambda in row v, so r'_v = 0. The paper pools all rows. A pooled zero can leave
any correlation within a prompt, which is where responses are compared; with ``groups`` lambda is found within prompts instead.

For ranks lambda is a weighted median of the slopes (r_a - r_b) / (v_a - v_b) over all pairs of rows: each pair flips its order in
r - lambda v exactly once, at its slope, and every flip lowers the sum of rank(r - lambda v) * rank(v) by the difference of the
v-ranks. So that sum never rises with lambda, and a bracket closes on its zero without listing n^2 pairs. Weights are the
difference of ranks for Spearman and 1 for Kendall (the Theil-Sen slope); for Pearson lambda = Cov(r, v) / Var(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.statistics import Estimate, Floats, Statistic, bootstrap

METHODS = ("spearman", "kendall", "pearson")
HOW = ("sequential", "joint")
OFFICIAL_GRID = (
    *(0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15),
    *(round(0.05 * step, 2) for step in range(4, 20)),
)
"""The released script's 24 points; it takes the first with a correlation of at most 0.03, else 1."""
OFFICIAL_THRESHOLD = 0.03

_MOST_LISTED = 2000
"""Rows up to which the slopes of all pairs are listed; above, lambda is bracketed."""
_SWEEPS = 100
_HIDDEN, _VISIBLE = 0.05, 0.15
"""A pooled correlation below the first with one above the second within prompts is worth a warning."""

Array = np.ndarray


def decorrelate(
    rewards: Tensor, nuisance: Tensor, *, method: str = "spearman", groups: Tensor | None = None, grid: str = "exact"
) -> Tensor:
    """lambda of every objective, (K,) float64: ``rewards`` (n, K) less lambda * ``nuisance`` (n,) is uncorrelated with it.

    ``groups`` (n,): prompt ids, for lambda within prompts; None is the paper's pooled one. ``method``: "spearman", "kendall" or
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
        found = [official_lambda(column, nuisance) for column in rewards.T]
    else:
        members = None if groups is None else rows_by_group_size(groups)
        found = [decorrelating_lambda(column, nuisance, method=method, members=members) for column in rewards.T]
    return torch.tensor(found, dtype=torch.float64)


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
    lambdas together, in turns, so that every correlation is zero at once.

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


def decorrelating_lambda(
    reward: Tensor,
    nuisance: Tensor,
    *,
    method: str = "spearman",
    groups: Tensor | None = None,
    members: list[Array] | None = None,
) -> float:
    """lambda of one objective: ``reward`` (n,) less lambda times ``nuisance`` (n,) has correlation zero with it.

    ``groups`` (n,) takes comparisons within groups alone (responses to one prompt), as :func:`correlation` does; ``members`` is
    :func:`rows_by_group_size` of them, for callers with many objectives. Where a correlation of ranks jumps over zero, the jump
    is the answer: no lambda does better. A constant reward gives 0.

    Raises :class:`~telltale.errors.DataError` for fewer than two rows, and for a nuisance that is the same in all rows (or in all
    rows of every group).
    """
    check_choice("method", method, METHODS)
    r, v = _arrays(reward, nuisance)
    if groups is not None and members is None:
        members = rows_by_group_size(groups)
    if members is not None:
        return _lambda_within(r, v, members, method)
    if np.ptp(v) == 0.0:
        raise DataError("the nuisance has the same value in every row, so nothing can be decorrelated from it.")
    if method == "pearson":
        centred = v - v.mean()
        return float((r - r.mean()) @ centred / (centred @ centred))
    if np.ptp(r) == 0.0:
        return 0.0
    if len(r) <= _MOST_LISTED:
        slopes, weights = pair_slopes(r, v, method=method)
        return weighted_median(slopes, weights)
    return _bracketed(r, v, _balance(v, method))


def official_lambda(reward: Tensor, nuisance: Tensor) -> float:
    """What the released script takes: the first grid point with Spearman's rho at most 0.03, one-sided; 1 if none has."""
    r, v = _arrays(reward, nuisance)
    if np.ptp(v) == 0.0:
        raise DataError("the nuisance has the same value in every row, so nothing can be decorrelated from it.")
    for candidate in OFFICIAL_GRID:
        rho = float(stats.spearmanr(r - candidate * v, v).statistic)
        if rho <= OFFICIAL_THRESHOLD:
            return candidate
    return 1.0


def correlation(first: Tensor, second: Tensor, *, method: str = "spearman", groups: Tensor | None = None) -> float:
    """Correlation of two (n,) in [-1, 1]; with ``groups`` of what is left within them, pooled. NaN where one side is constant.

    Within groups: ranks are taken inside each group (for Kendall: concordant less discordant pairs of one group over all that
    are not tied), and centred there.
    """
    check_choice("method", method, METHODS)
    if groups is not None:
        return float(_from_sums(group_sums(first, second, groups, method=method).sum(0)))
    return _pooled(*(_array(part) for part in (first, second)), method=method)


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
    check_range("level", level, above=0.0, below=1.0)
    check_integer("resamples", resamples, low=1)
    before, after = rewards.double(), rewards.double() @ transform.double()
    others = [member for member in range(len(names)) if member not in nuisances]
    rows, warned = [], []
    for nuisance in nuisances:
        values = before[:, nuisance]
        sides = [side[:, member] for member in others for side in (before, after)]
        pooled = pooled_estimates(sides, values, groups, method=method, resamples=resamples, level=level, seed=seed)
        within = [
            within_estimate(side, values, groups, method=method, resamples=resamples, level=level, seed=seed)
            for side in sides
        ]
        for place, member in enumerate(others):
            ends = slice(2 * place, 2 * place + 2)
            row = DecorrelationRow(names[member], names[nuisance], *pooled[ends], *within[ends])
            rows.append(row)
            if abs(row.pooled_after.value) < _HIDDEN and abs(row.within_after.value) > _VISIBLE:
                warned.append(
                    f"{row.objective} is uncorrelated with {row.nuisance} over all rows ({row.pooled_after.value:+.2f}) but not "
                    f"within prompts ({row.within_after.value:+.2f}), where responses are compared; decorrelate within prompts."
                )
    return DecorrelationReport(tuple(rows), method, level, tuple(warned))


def pooled_estimates(
    firsts: Sequence[Tensor],
    second: Tensor,
    groups: Tensor,
    *,
    method: str = "spearman",
    resamples: int,
    level: float,
    seed: int,
) -> list[Estimate]:
    """Correlation of each of ``firsts`` (n,) with ``second`` (n,) over all rows; intervals resample whole ``groups`` (n,)."""
    y = _array(second)

    def statistic_of(x: Array) -> Statistic:
        def statistic(weights: Floats) -> Floats:
            drawn = (np.repeat(np.arange(len(x)), counts) for counts in weights.astype(int))
            return np.array([_pooled(x[rows], y[rows], method=method) for rows in drawn])

        return statistic

    return bootstrap(
        [statistic_of(_array(first)) for first in firsts],
        groups.cpu().numpy(),
        resamples=resamples,
        level=level,
        seed=seed,
    )


def within_estimate(
    first: Tensor,
    second: Tensor,
    groups: Tensor,
    *,
    method: str = "spearman",
    resamples: int,
    level: float,
    seed: int,
) -> Estimate:
    """Correlation of two (n,) within ``groups`` (n,); the interval resamples groups, among those with at least two rows."""
    sums = group_sums(first, second, groups, method=method)
    if not len(sums):
        return Estimate(math.nan, math.nan, math.nan)
    # Ranks inside a group do not change when whole groups are drawn, so a resample adds up their sums.
    return bootstrap(
        [lambda weights: _from_sums(weights @ sums)], np.arange(len(sums)), resamples=resamples, level=level, seed=seed
    )[0]


def group_sums(first: Tensor, second: Tensor, groups: Tensor, *, method: str) -> Array:
    """(x.y, x.x, y.y) of every group with at least two rows, (G, 3), of what :func:`correlation` compares inside it."""
    x, y = _array(first), _array(second)
    found = []
    for m in rows_by_group_size(groups):
        a, b = x[m], y[m]
        if method == "kendall":
            i, j = np.triu_indices(m.shape[1], 1)
            a, b = np.sign(a[:, i] - a[:, j]), np.sign(b[:, i] - b[:, j])
        else:
            if method == "spearman":
                a, b = stats.rankdata(a, axis=1), stats.rankdata(b, axis=1)
            a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        found.append(np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 3))


def rows_by_group_size(groups: Tensor) -> list[Array]:
    """Row numbers of the groups with at least two rows, (groups, size) for each size, to work on all groups of a size at once."""
    order = torch.argsort(groups, stable=True).cpu()
    counts = groups.cpu()[order].unique_consecutive(return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    found = []
    for size in counts.unique().tolist():
        if size > 1:
            rows = starts[counts == size][:, None] + torch.arange(size)
            found.append(order[rows].numpy())
    return found


def pair_slopes(r: Array, v: Array, *, method: str) -> tuple[Array, Array]:
    """Slopes of all pairs that differ in v, and their weights: |difference of v-ranks| for Spearman, 1 for Kendall."""
    first, second = np.triu_indices(len(r), 1)
    run = v[first] - v[second]
    differ = run != 0.0
    first, second, run = first[differ], second[differ], run[differ]
    if method == "kendall":
        return (r[first] - r[second]) / run, np.ones(len(run))
    ranks = stats.rankdata(v)
    return (r[first] - r[second]) / run, np.abs(ranks[first] - ranks[second])


def weighted_median(values: Array, weights: Array) -> float:
    """The value at which half of the weight is reached; the middle of two where one ends exactly at half."""
    order = np.argsort(values, kind="stable")
    ordered, mass = values[order], np.cumsum(weights[order])
    half = mass[-1] / 2
    place = int(np.searchsorted(mass, half, side="left"))
    if mass[place] == half and place + 1 < len(ordered):
        return float((ordered[place] + ordered[place + 1]) / 2)
    return float(ordered[place])


def _joint(rewards: Tensor, columns: list[int], method: str, groups: Tensor | None) -> Tensor:
    """lambdas (M, K): one nuisance at a time, in turns, until none moves."""
    lambdas = torch.zeros(len(columns), rewards.shape[1], dtype=torch.float64)
    members = None if groups is None else rows_by_group_size(groups)
    for member in range(rewards.shape[1]):
        if member in columns:
            lambdas[columns.index(member), member] = 1.0
            continue
        rest = rewards[:, member].clone()
        for _ in range(_SWEEPS):
            moved = 0.0
            for index, column in enumerate(columns):
                nuisance = rewards[:, column]
                step = decorrelating_lambda(rest, nuisance, method=method, members=members)
                lambdas[index, member] += step
                rest = rest - step * nuisance
                moved = max(moved, abs(step) * float(nuisance.std()))
            if moved <= 1e-9 * float(rewards[:, member].std() + 1e-300):
                break
    return lambdas


def _lambda_within(r: Array, v: Array, members: list[Array], method: str) -> float:
    """lambda from comparisons inside groups.

    Ranks: the weighted median of the slopes of all pairs of one group, whose weights are the nuisance's difference of ranks inside
    the group for Spearman and 1 for Kendall; Pearson: the regression on values less their group's mean.
    """
    tied = DataError(
        "no group has two rows that differ in the nuisance, so nothing can be decorrelated within groups; expected several "
        "responses to a prompt, or take the pooled form (scope pooled, groups=None)."
    )
    if method == "pearson":
        product = square = 0.0
        for m in members:
            centred = v[m] - v[m].mean(1, keepdims=True)
            product += float(((r[m] - r[m].mean(1, keepdims=True)) * centred).sum())
            square += float((centred * centred).sum())
        if square <= 0.0:
            raise tied
        return product / square
    run, rise = _differences_within(v, members), _differences_within(r, members)
    differ = run != 0.0
    if not differ.any():
        raise tied
    weights = np.ones(int(differ.sum()))
    if method == "spearman":
        ranks = np.zeros(len(v))
        for m in members:
            ranks[m] = stats.rankdata(v[m], axis=1)
        weights = np.abs(_differences_within(ranks, members)[differ])
    return weighted_median(rise[differ] / run[differ], weights)


def _differences_within(values: Array, members: list[Array]) -> Array:
    """First less second over all pairs of rows of one group."""
    found = []
    for m in members:
        i, j = np.triu_indices(m.shape[1], 1)
        found.append((values[m[:, i]] - values[m[:, j]]).reshape(-1))
    return np.concatenate(found) if found else np.zeros(0)


def _bracketed(r: Array, v: Array, balance: Callable[[Array], float]) -> float:
    """The place where ``balance`` of r - lambda v, which never rises with lambda, changes its sign."""
    centred = v - v.mean()
    middle = float((r - r.mean()) @ centred / (centred @ centred))
    reach = 0.01 * float(np.std(r) / np.std(v))
    low, high = middle - reach, middle + reach
    while balance(r - low * v) < 0:
        low, reach = low - 4 * reach, 4 * reach
    while balance(r - high * v) > 0:
        high, reach = high + 4 * reach, 4 * reach
    # Brent's method: superlinear while the steps are too fine to see, bisection where they are not.
    return float(optimize.brentq(lambda x: balance(r - x * v), low, high, xtol=1e-14 * max(1.0, reach), rtol=1e-14))


def _balance(v: Array, method: str) -> Callable[[Array], float]:
    """A number with the sign of the correlation of its argument with v: one sort, or a merge sort for Kendall."""
    if method == "kendall":
        # A rest without any spread, such as the nuisance's own, is balanced: tau is not defined there.
        return lambda rest: 0.0 if np.ptp(rest) == 0.0 else float(stats.kendalltau(rest, v).statistic)
    ranks = stats.rankdata(v)
    centred = ranks - ranks.mean()

    def spearman(rest: Array) -> float:
        order = np.argsort(rest)
        ordered = rest[order]
        if (ordered[1:] != ordered[:-1]).all():
            return float(np.arange(len(rest)) @ centred[order])
        return float(stats.rankdata(rest) @ centred)

    return spearman


def _pooled(x: Array, y: Array, *, method: str) -> float:
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return math.nan
    found = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}[method](x, y)
    return float(found.statistic)


def _from_sums(sums: Array) -> Array:
    """x.y / sqrt(x.x y.y) of sums (..., 3), NaN where one side is constant."""
    both = np.sqrt(sums[..., 1] * sums[..., 2])
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(both > 0, sums[..., 0] / both, math.nan)
    return found


def _arrays(reward: Tensor, nuisance: Tensor) -> tuple[Array, Array]:
    if reward.ndim != 1 or reward.shape != nuisance.shape or len(reward) < 2:
        raise DataError(
            f"reward and nuisance have shapes {tuple(reward.shape)} and {tuple(nuisance.shape)}; expected two (n,) of at least "
            f"two rows."
        )
    r, v = _array(reward), _array(nuisance)
    if not (np.isfinite(r).all() and np.isfinite(v).all()):
        raise NumericalError("a reward or nuisance is NaN or infinite; expected finite values in the reference rows.")
    return r, v


def _array(values: Tensor) -> Array:
    found: Array = values.detach().double().cpu().numpy()
    return found


def _worst(values: Iterable[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=math.nan)
