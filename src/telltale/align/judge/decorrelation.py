"""Rewards that no longer follow a nuisance such as predicted verbosity: r' = r T, and the proof on rows that were held out.

ArmoRM (arXiv 2406.12845), stage 2a: r'_i = r_i - lambda_i r_v with lambda_i such that the rank correlation of r'_i and r_v is
zero over a reference set; T is the identity less lambda in row v, so r'_v = 0. The paper pools all rows. Pooled zero can leave any
correlation within a prompt, which is where responses are compared; with ``groups`` the root is taken there instead.

The exact amount of a nuisance to take away: lambda with correlation(r - lambda v, v) = 0.

For ranks this is a weighted median of the slopes (r_a - r_b) / (v_a - v_b) over all pairs of rows: each pair flips its order in
r - lambda v exactly once, at its slope, and every flip lowers the sum of rank(r - lambda v) * rank(v) by the difference of the
v-ranks. So that sum never rises with lambda, and a bracket closes on its root without listing n^2 pairs. Weights are the
difference of ranks for Spearman and 1 for Kendall (the Theil-Sen slope); for Pearson lambda = Cov(r, v) / Var(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError, NumericalError

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


METHODS = ("spearman", "kendall", "pearson")
OFFICIAL_GRID = (
    *(0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15),
    *(round(0.05 * step, 2) for step in range(4, 20)),
)
"""The released script's 24 points; it takes the first with a correlation of at most 0.03, else 1."""
OFFICIAL_THRESHOLD = 0.03
SMALL = 2000
"""Rows up to which the pairwise slopes are listed; above, the root is bracketed."""

Array = np.ndarray


def root(reward: Tensor, nuisance: Tensor, *, method: str = "spearman") -> float:
    """lambda of one objective: ``reward`` (n,) less lambda times ``nuisance`` (n,) does not correlate with it any more.

    Where a correlation of ranks jumps over zero, the jump is the answer: no lambda does better. A constant reward gives 0.
    Raises :class:`~telltale.errors.DataError` for a nuisance that is the same in all rows, or fewer than two rows.
    """
    r, v = _checked(reward, nuisance, method)
    if method == "pearson":
        centred = v - v.mean()
        return float((r - r.mean()) @ centred / (centred @ centred))
    if np.ptp(r) == 0.0:
        return 0.0
    if len(r) <= SMALL:
        slopes, weights = pair_slopes(r, v, method=method)
        return weighted_median(slopes, weights)
    return _bracketed(r, v, _balance(v, method))


def grouped_root(
    reward: Tensor, nuisance: Tensor, groups: Tensor, *, method: str = "spearman", members: list[Array] | None = None
) -> float:
    """lambda from comparisons within groups alone (responses to one prompt): ``groups`` (n,).

    Ranks: the weighted median of all slopes of pairs of one group, whose weights are the nuisance's difference of ranks inside
    the group for Spearman and 1 for Kendall, which is the root of :func:`correlation` with ``groups``; Pearson: the regression
    on values less their group's mean. ``members`` is
    :func:`by_group_size` of ``groups``, for whoever calls this often. Raises :class:`~telltale.errors.DataError` if no group
    has two different values of the nuisance.
    """
    r, v = _checked(reward, nuisance, method, constant_is_fine=True)
    members = by_group_size(groups) if members is None else members
    if method == "pearson":
        product = square = 0.0
        for m in members:
            centred = v[m] - v[m].mean(1, keepdims=True)
            product += float(((r[m] - r[m].mean(1, keepdims=True)) * centred).sum())
            square += float((centred * centred).sum())
        if square <= 0.0:
            raise _tied()
        return product / square
    run, rise = _differences_within(v, members), _differences_within(r, members)
    differ = run != 0.0
    if not differ.any():
        raise _tied()
    weights = np.ones(int(differ.sum()))
    if method == "spearman":
        ranks = np.zeros(len(v))
        for m in members:
            ranks[m] = stats.rankdata(v[m], axis=1)
        weights = np.abs(_differences_within(ranks, members)[differ])
    return weighted_median(rise[differ] / run[differ], weights)


def correlation(first: Tensor, second: Tensor, *, method: str = "spearman", groups: Tensor | None = None) -> float:
    """Correlation of two (n,) in [-1, 1]; with ``groups`` of what is left within them, pooled. NaN where one side is constant.

    Within groups: ranks are taken inside each group (for Kendall: concordant less discordant pairs of one group over all that
    are not tied), and centred there.
    """
    check_choice("method", method, METHODS)
    if groups is not None:
        return from_sums(group_sums(first, second, groups, method=method).sum(0))
    x, y = (part.detach().double().cpu().numpy() for part in (first, second))
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return math.nan
    found = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}[method](x, y)
    return float(found.statistic)


def group_sums(first: Tensor, second: Tensor, groups: Tensor, *, method: str) -> Array:
    """(x.y, x.x, y.y) of every group with at least two rows, (G, 3), of what :func:`correlation` compares inside it.

    A bootstrap over groups adds up rows of this: ranks inside a group do not change when whole groups are drawn.
    """
    x, y = (part.detach().double().cpu().numpy() for part in (first, second))
    found = []
    for m in by_group_size(groups):
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


def from_sums(sums: Array) -> float:
    """x.y / sqrt(x.x y.y), NaN where one side is constant."""
    both = math.sqrt(sums[1] * sums[2])
    return float(sums[0] / both) if both > 0 else math.nan


def official_root(reward: Tensor, nuisance: Tensor) -> float:
    """What the released script takes: the first grid point with Spearman's rho at most 0.03, one-sided; 1 if none has."""
    r, v = _checked(reward, nuisance, "spearman")
    for candidate in OFFICIAL_GRID:
        rho = float(stats.spearmanr(r - candidate * v, v).statistic)
        if rho <= OFFICIAL_THRESHOLD:
            return candidate
    return 1.0


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
        return lambda rest: float(stats.kendalltau(rest, v).statistic)
    ranks = stats.rankdata(v)
    centred = ranks - ranks.mean()

    def spearman(rest: Array) -> float:
        order = np.argsort(rest)
        ordered = rest[order]
        if (ordered[1:] != ordered[:-1]).all():
            return float(np.arange(len(rest)) @ centred[order])
        return float(stats.rankdata(rest) @ centred)

    return spearman


def by_group_size(groups: Tensor) -> list[Array]:
    """Row numbers of the groups with at least two rows, (groups, size) for each size: all groups of a size are worked at once."""
    order = torch.argsort(groups, stable=True).cpu()
    counts = groups.cpu()[order].unique_consecutive(return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    found = []
    for size in counts.unique().tolist():
        if size > 1:
            rows = starts[counts == size][:, None] + torch.arange(size)
            found.append(order[rows].numpy())
    return found


def _differences_within(values: Array, members: list[Array]) -> Array:
    """First less second over all pairs of rows of one group."""
    found = []
    for m in members:
        i, j = np.triu_indices(m.shape[1], 1)
        found.append((values[m[:, i]] - values[m[:, j]]).reshape(-1))
    return np.concatenate(found) if found else np.zeros(0)


def _checked(reward: Tensor, nuisance: Tensor, method: str, *, constant_is_fine: bool = False) -> tuple[Array, Array]:
    check_choice("method", method, METHODS)
    if reward.ndim != 1 or reward.shape != nuisance.shape or len(reward) < 2:
        raise DataError(
            f"reward and nuisance have shapes {tuple(reward.shape)} and {tuple(nuisance.shape)}; expected two (n,) of at least "
            f"two rows."
        )
    r, v = (part.detach().double().cpu().numpy() for part in (reward, nuisance))
    if not (np.isfinite(r).all() and np.isfinite(v).all()):
        raise NumericalError("a reward or nuisance is NaN or infinite; expected finite values in the reference rows.")
    if not constant_is_fine and np.ptp(v) == 0.0:
        raise DataError("the nuisance has the same value in every row, so nothing can be decorrelated from it.")
    return r, v


def _tied() -> DataError:
    return DataError(
        "no group has two rows that differ in the nuisance, so nothing can be decorrelated within groups; expected several "
        "responses to a prompt, or take the pooled form (scope pooled, groups=None)."
    )
