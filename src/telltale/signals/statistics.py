"""Estimates with intervals: one bootstrap for every statistic, and the statistics that several subsystems use.

Rows that belong together (steps of a problem, responses to a prompt) are one cluster, and the bootstrap draws whole clusters with
replacement. A resample is a row of weights: how often each row of the data counts. A statistic takes a block of such weights, so
that a resample costs a product of matrices where the statistic allows it.

Rank agreement is Kendall's tau-b, so ties on either side count neither for nor against. AUROC can be restricted to pairs within a
stratum: at equal step length, a signal that merely falls with length says nothing. Proportions have Wilson's interval, means over
seeds Student's; two policies on the same problems are compared by McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from telltale.config import check_integer, check_range
from telltale.errors import DataError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights (resamples, n) of the n rows -> the statistic of each resample, (resamples,); NaN where it is not defined."""

_BLOCK = 4_000_000
"""Weights that are held at a time."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. NaN where the number, or its interval, is not defined."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether the interval includes ``value``."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class CountedEstimate(Estimate):
    """An estimate that rests on ``count`` items, runs or seeds."""

    count: int


@dataclass(frozen=True)
class Auroc(Estimate):
    """The chance that a right step scores above a wrong one, ties counting half.

    NaN without a pair to compare. ``pairs`` were compared, of ``right`` and ``wrong`` steps.
    """

    right: int
    wrong: int
    pairs: int


def bootstrap(
    statistics: Sequence[Statistic],
    clusters: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
    fewer: int = 0,
) -> list[Estimate]:
    """Each of ``statistics`` with its percentile interval over the same resamples of whole ``clusters`` (n,).

    ``strata`` (n,): each stratum keeps its number of clusters. ``fewer=1`` draws one cluster less than there are (of each stratum),
    which makes the variance right where there are few (Rao & Wu 1988). Resamples without a value are left out.
    Raises :class:`~telltale.errors.ConfigError` for ``resamples`` below 1 or a ``level`` outside (0, 1).
    """
    check_range("level", level, above=0.0, below=1.0)
    rows = len(np.asarray(clusters))
    blocks = resampled_weights(clusters, strata=strata, resamples=resamples, seed=seed, fewer=fewer)
    samples = [[statistic(weights) for statistic in statistics] for weights in blocks]
    found = []
    for place, statistic in enumerate(statistics):
        value = float(statistic(np.ones((1, rows)))[0])
        found.append(_percentile(value, np.concatenate([block[place] for block in samples]), level))
    return found


def resampled_weights(
    clusters: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    resamples: int,
    seed: int | np.random.Generator = 0,
    fewer: int = 0,
) -> Iterator[Floats]:
    """How often each row counts in each resample, in blocks (resamples, n); arguments as for :func:`bootstrap`."""
    check_integer("resamples", resamples, low=1)
    names, first, cluster_of = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    stratum = np.zeros(len(names), dtype=np.int64) if strata is None else np.asarray(strata)[first]
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(names)), dtype=np.int32)
    for one in np.unique(stratum):
        members = np.flatnonzero(stratum == one)
        drawn = max(1, len(members) - fewer)
        counts[:, members] = rng.multinomial(drawn, np.full(len(members), 1 / len(members)), size=resamples)
    block = max(1, _BLOCK // max(1, len(cluster_of)))
    for start in range(0, resamples, block):
        yield counts[start : start + block, cluster_of].astype(np.float64)


def mean_with_interval(
    values: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """The mean of one value a problem (n,), with a bootstrap interval that resamples problems, within strata if given.

    For a paired difference, give the differences: resampling a problem then takes both sides along. Average several seeds of a
    problem first, since they are not independent problems.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise DataError(f"values have shape {found.shape}; expected one number a problem.")
    return bootstrap(
        [lambda weights: weights @ found / weights.sum(1)],
        np.arange(len(found)),
        strata=strata,
        resamples=resamples,
        level=level,
        seed=seed,
    )[0]


def mean_over_seeds(values: Sequence[float], *, level: float = 0.95) -> CountedEstimate:
    """The mean of one value per seed with Student's interval; undefined seeds (NaN) are left out of mean and count.

    The interval is NaN with fewer than two seeds. Raises :class:`~telltale.errors.ConfigError` for a ``level`` outside (0, 1).
    """
    check_range("level", level, above=0.0, below=1.0)
    defined = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    count = len(defined)
    mean = float(defined.mean()) if count else math.nan
    if count < 2:
        return CountedEstimate(mean, math.nan, math.nan, count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1) * defined.std(ddof=1)) / math.sqrt(count)
    return CountedEstimate(mean, mean - reach, mean + reach, count)


def proportion(credits: Sequence[float], *, level: float = 0.95) -> CountedEstimate:
    """The mean of credits in [0, 1], with the Wilson score interval for that many items."""
    check_range("level", level, above=0.0, below=1.0)
    count = len(credits)
    if not count:
        return CountedEstimate(math.nan, math.nan, math.nan, 0)
    p, z = sum(credits) / count, float(stats.norm.ppf((1 + level) / 2))
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return CountedEstimate(p, max(0.0, min(p, middle - reach)), min(1.0, max(p, middle + reach)), count)


def clustered_mean(values: ArrayLike, clusters: ArrayLike, *, level: float = 0.95) -> CountedEstimate:
    """The mean of ``values`` (n,) over rows, with Student's interval over ``clusters`` (n,), which are independent; rows of one
    need not be. ``count`` is the number of clusters.

    The mean is a ratio, sum over rows / number of rows, whose variance is that of the clusters' residual sums (linearised, with
    m / (m - 1) for m clusters). For a paired difference, give the differences. The interval is NaN for a single cluster.
    """
    check_range("level", level, above=0.0, below=1.0)
    found = np.asarray(values, dtype=np.float64)
    count, mean, error = _clustered(found, np.asarray(clusters))
    if count < 2:
        return CountedEstimate(mean, math.nan, math.nan, count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    return CountedEstimate(mean, mean - reach, mean + reach, count)


def clustered_proportion(credits: ArrayLike, clusters: ArrayLike, *, level: float = 0.95) -> CountedEstimate:
    """The mean of credits in [0, 1] (n,), with Clopper and Pearson's interval for as many rows as the ``clusters`` (n,) are worth.

    That number is p (1 - p) over the variance of :func:`clustered_mean`, at most n, and less by the square of the ratio of
    Student's quantiles for n rows and for the clusters (Korn & Graubard 1998). Credits without any variance are worth one row a
    cluster. ``count`` is the number of clusters.
    """
    check_range("level", level, above=0.0, below=1.0)
    found = np.asarray(credits, dtype=np.float64)
    count, p, error = _clustered(found, np.asarray(clusters))
    if not count:
        return CountedEstimate(math.nan, math.nan, math.nan, 0)
    rows, upper, worth = len(found), (1 + level) / 2, float(count)
    if count > 1 and error > 0:
        fewer = float(stats.t.ppf(upper, rows - 1) / stats.t.ppf(upper, count - 1)) ** 2
        worth = min(float(rows), max(1.0, fewer * p * (1 - p) / error**2))
    right, wrong = p * worth, (1 - p) * worth
    low = float(stats.beta.ppf(1 - upper, right, wrong + 1)) if right > 0 else 0.0
    high = float(stats.beta.ppf(upper, right + 1, wrong)) if wrong > 0 else 1.0
    return CountedEstimate(p, min(p, low), max(p, high), count)


def _clustered(values: Floats, clusters: NDArray[Any]) -> tuple[int, float, float]:
    """The number of clusters, the mean over rows, and its standard error."""
    if values.ndim != 1 or values.shape != clusters.shape:
        raise DataError(
            f"values have shape {values.shape} and clusters {clusters.shape}; expected one cluster a value."
        )
    if not len(values):
        return 0, math.nan, math.nan
    names, place = np.unique(clusters, return_inverse=True)
    mean, count = float(values.mean()), len(names)
    residuals = np.bincount(place, weights=values - mean, minlength=count)
    variance = float(residuals @ residuals) * count / max(1, count - 1) / len(values) ** 2
    return count, mean, math.sqrt(variance)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two equally long sequences; NaN for fewer than two runs or where one side is constant.

    Raises :class:`~telltale.errors.DataError` for lengths that differ and for values that are not finite.
    """
    left, right = _paired(x, y)
    return float(stats.kendalltau(left, right).statistic) if len(left) > 1 else math.nan


def kendall_statistic(x: Sequence[float], y: Sequence[float]) -> Statistic:
    """tau-b of ``x`` and ``y`` for :func:`bootstrap`; two copies of one run are tied on both sides and do not count.

    sum_ij w_i w_j sgn(x_i - x_j) sgn(y_i - y_j) over the root of the two sums of squares.
    """
    left, right = (np.sign(side[:, None] - side[None, :]) for side in _paired(x, y))
    pairs = (left * right, np.abs(left), np.abs(right))

    def statistic(weights: Floats) -> Floats:
        agreement, one, other = (((weights @ signs) * weights).sum(1) for signs in pairs)
        with np.errstate(invalid="ignore"):
            found: Floats = agreement / np.sqrt(one * other)
        return found

    return statistic


def partial_tau(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Kendall's partial tau of ``x`` and ``y`` with ``given`` held fixed; NaN where ``given`` orders one side perfectly.

    (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2)(1 - t_yz^2)); arXiv 2406.02234 uses it against confounded measures.
    """
    xy, xz, yz = kendall_tau(x, y), kendall_tau(x, given), kendall_tau(y, given)
    rest = (1.0 - xz * xz) * (1.0 - yz * yz)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-12 else math.nan


def auroc(
    scores: ArrayLike,
    right: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Auroc:
    """AUROC of ``scores`` (n,) for ``right`` (n,); only pairs within a stratum (a step length) are compared.

    ``clusters``: the problem of each step, for an interval that resamples whole problems. Raises
    :class:`~telltale.errors.DataError` for lengths that differ or NaN scores.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    groups = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    if not len(values) == len(labels) == len(groups):
        raise DataError(f"{len(values)} scores came with {len(labels)} labels; expected one each.")
    if np.isnan(values).any():
        raise DataError("a score is NaN; expected numbers.")
    concordant, pairs = _concordance(values, labels, groups, np.ones((1, len(values))))
    value, low, high = (float(concordant[0] / pairs[0]) if pairs[0] else math.nan), math.nan, math.nan
    if clusters is not None and pairs[0]:
        statistic = auroc_statistic(values, labels, groups)
        found = bootstrap([statistic], clusters, resamples=resamples, level=level, seed=seed)[0]
        low, high = found.low, found.high
    return Auroc(value, low, high, int(labels.sum()), int((~labels).sum()), int(pairs[0]))


def auroc_statistic(scores: Floats, right: NDArray[np.bool_], strata: NDArray[Any]) -> Statistic:
    """AUROC within ``strata`` for :func:`bootstrap`; all three (n,)."""

    def statistic(weights: Floats) -> Floats:
        concordant, pairs = _concordance(scores, right, strata, weights)
        with np.errstate(invalid="ignore"):
            found: Floats = concordant / pairs
        return found

    return statistic


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Problems that only one of two policies gets right, and the exact two-sided p-value that neither is better."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise DataError(f"{len(a)} results came with {len(b)}; expected the same problems.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    differing = only_first + only_second
    p_value = 1.0 if differing == 0 else float(stats.binomtest(only_first, differing, 0.5).pvalue)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def _percentile(value: float, samples: Floats, level: float) -> Estimate:
    """``value`` with the percentile interval of ``samples``; without one where fewer than two samples are defined."""
    known = samples[np.isfinite(samples)]
    if len(known) < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _paired(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    if len(x) != len(y):
        raise DataError(f"{len(x)} measures and {len(y)} gaps were given; expected one of each per run.")
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError("a measure or gap is NaN or infinite; expected finite numbers. Leave such runs out and say so.")
    return left, right


def _concordance(
    scores: Floats, right: NDArray[np.bool_], strata: NDArray[Any], weights: Floats
) -> tuple[Floats, Floats]:
    """Weighted concordant pairs and all pairs, (resamples,) each, summed over strata; ``weights`` (resamples, n)."""
    concordant, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        places = np.flatnonzero(strata == stratum)
        if right[places].all() or not right[places].any():
            continue
        places = places[np.argsort(scores[places], kind="stable")]
        ordered = scores[places]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        own = weights[:, places]
        good = np.add.reduceat(own * right[places], starts, axis=1)
        bad = np.add.reduceat(own * ~right[places], starts, axis=1)
        below = np.cumsum(bad, axis=1) - bad
        concordant += (good * (below + 0.5 * bad)).sum(1)
        pairs += good.sum(1) * bad.sum(1)
    return concordant, pairs
