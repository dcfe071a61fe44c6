"""Statistics of a few episodes: interquartile means, stratified bootstrap, Agresti-Caffo intervals, the planning gap.

IQM, stratified bootstrap and performance profiles as in Agarwal et al. (arXiv 2108.13264); the interval of a difference
of two proportions as in Agresti and Caffo (The American Statistician 54, 2000): one success and one failure are added
to each arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm
from scipy.stats import t as student

from telltale.config import check_integer, check_range, check_seed
from telltale.errors import DataError

Statistic = Callable[[npt.NDArray[Any]], float]


def iqm(values: Any) -> float:
    """Mean of the middle half of all ``values`` (any shape): a quarter, rounded down, is cut at each end.

    Raises :class:`~telltale.errors.DataError` if there are none, or one is not finite.
    """
    scores = np.sort(_clean(values).reshape(-1))
    cut = len(scores) // 4
    return float(scores[cut : len(scores) - cut].mean())


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


def bootstrap(
    values: Any, *, statistic: Statistic = iqm, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of ``statistic`` over ``values`` (runs,) or (runs, tasks), resampling runs within each task.

    The same seed gives the same interval. Raises :class:`~telltale.errors.DataError` as :func:`iqm` does.
    """
    check_seed(seed)
    check_integer("resamples", resamples, low=1)
    check_range("confidence", confidence, low=0.0, below=1.0)
    scores = _clean(values)
    table = scores.reshape(len(scores), -1)
    runs, tasks = table.shape
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, runs, tasks))
    found = [statistic(np.take_along_axis(table, choice, axis=0)) for choice in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(statistic(table)), float(low), float(high), confidence)


def agresti_caffo(
    successes: int, trials: int, successes_2: int, trials_2: int, *, confidence: float = 0.95
) -> Interval:
    """Interval of p1 - p2; the estimate is the plain difference, the interval that of p = (x + 1) / (n + 2) in both arms.

    Raises :class:`~telltale.errors.ConfigError` unless 0 <= successes <= trials and trials >= 1.
    """
    for name, count, total in (("successes", successes, trials), ("successes_2", successes_2, trials_2)):
        check_integer(f"trials of {name}", total, low=1)
        check_integer(name, count, low=0, high=total)
    p, q = (successes + 1) / (trials + 2), (successes_2 + 1) / (trials_2 + 2)
    z = float(norm.ppf(0.5 + confidence / 2))
    half = z * math.sqrt(p * (1 - p) / (trials + 2) + q * (1 - q) / (trials_2 + 2))
    difference = successes / trials - successes_2 / trials_2
    return Interval(difference, max(-1.0, p - q - half), min(1.0, p - q + half), confidence)


def paired_difference(first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95) -> Interval:
    """Interval of p1 - p2 for successes on the same starts, in order: Tango's score interval (Statistics in Medicine 17, 1998),
    which holds its confidence with few discordant pairs.

    Raises :class:`~telltale.errors.DataError` for arms of different length, or none.
    """
    n = len(first)
    if not n or len(second) != n:
        raise DataError(f"{n} and {len(second)} successes; expected the same starts of both arms, at least one.")
    check_range("confidence", confidence, above=0.0, below=1.0)
    only = [
        sum(bool(a) and not b for a, b in zip(one, two, strict=True)) for one, two in ((first, second), (second, first))
    ]
    z = float(norm.ppf(0.5 + confidence / 2))
    low, high = _score_bound(only[0], only[1], n, z), -_score_bound(only[1], only[0], n, z)
    return Interval((only[0] - only[1]) / n, low, high, confidence)


def pairs_needed(margin: float, *, confidence: float = 0.95) -> int:
    """The least number of starts on which two arms that agree everywhere are shown to differ by at most ``margin``, as
    :func:`paired_difference` bounds it."""
    check_range("margin", margin, above=0.0, below=1.0)
    check_range("confidence", confidence, above=0.0, below=1.0)
    z = float(norm.ppf(0.5 + confidence / 2))
    low, high = 0, 1
    while _score_bound(0, 0, high, z) < -margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _score_bound(0, 0, middle, z) < -margin else (low, middle)
    return high


def _score_bound(gained: int, lost: int, n: int, z: float) -> float:
    """The least difference d that pairs with ``gained`` and ``lost`` discordant ones of ``n`` do not reject at ``z``: bisection on
    the score statistic, whose nuisance parameter (the share lost) is the maximum likelihood one under d."""
    bottom, top = -1.0, (gained - lost) / n
    for _ in range(60):
        d = (bottom + top) / 2
        b = -gained - lost + (2 * n - gained + lost) * d
        share = max(0.0, (math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n))
        variance = n * (2 * share + d * (1 - d))
        statistic = (gained - lost - n * d) / math.sqrt(variance) if variance > 1e-12 else math.inf
        bottom, top = (d, top) if statistic > z else (bottom, d)
    return bottom


def mean_at_least(values: Any, *, alpha: float) -> float:
    """A lower bound of the mean of ``values`` (n,) that errs with about probability ``alpha``; more if rare losses weigh much.

    Student's bound is too sure of both where rare values are far below the mean. Its degrees of freedom are those that the variance
    is worth by the values' kurtosis, 2 n / (kurtosis - (n - 3) / (n - 1)) (Satterthwaite), at most n - 1; and the bound is
    the lower of that and Hall's transformed t (JRSS B 54, 1992) with the same quantile. Minus infinity for fewer than two values.
    """
    found = _clean(values).reshape(-1)
    n = len(found)
    if n < 2:
        return -math.inf
    mean, deviation = float(found.mean()), float(found.std(ddof=1))
    if deviation <= 1e-12 * abs(mean):
        return mean
    standard = (found - mean) / float(found.std())
    skew, kurtosis = float((standard**3).mean()), float((standard**4).mean())
    freedom = min(n - 1.0, 2 * n / max(kurtosis - (n - 3) / (n - 1), 1e-9))
    quantile = float(student.ppf(1 - alpha, freedom))
    bound = mean - quantile * deviation / math.sqrt(n)
    if skew >= -1e-6:
        return bound
    # Hall's g(T) = T + s T^2 / 3 + s^2 T^3 / 27 + s / 6 with s = skew / root n, solved for T
    s = skew / math.sqrt(n)
    turned = 3 / s * (float(np.cbrt(1 + s * (quantile - s / 6))) - 1)
    return min(bound, mean - turned * deviation / math.sqrt(n))


@dataclass(frozen=True)
class PlanningGap:
    """ASR of the model against that of oracle dynamics under the same planner, and what limits the success.

    ``verdict``: ``model`` where the oracle is better beyond the interval; ``planner`` where the gap is small and the oracle
    itself fails at least half the time; ``none`` where the gap is within ``margin`` and the oracle succeeds;
    ``inconclusive`` where the interval allows both.
    """

    model: float
    oracle: float
    gap: Interval
    verdict: str


def planning_gap(
    model: Sequence[bool], oracle: Sequence[bool], *, margin: float = 0.1, confidence: float = 0.90
) -> PlanningGap:
    """Compare two arms of episodes. ``gap`` is model minus oracle; a two-sided 90% interval is one-sided at 95%."""
    wins, oracle_wins = sum(map(bool, model)), sum(map(bool, oracle))
    gap = agresti_caffo(wins, len(model), oracle_wins, len(oracle), confidence=confidence)
    truth = oracle_wins / len(oracle)
    if gap.high < 0 and gap.estimate < -margin:
        verdict = "model"
    elif gap.low < -margin and not (truth < 0.5 and gap.estimate >= 0):
        verdict = "inconclusive"
    else:
        verdict = "planner" if truth < 0.5 else "none"
    return PlanningGap(wins / len(model), truth, gap, verdict)


def performance_profile(values: Any, thresholds: Sequence[float]) -> list[float]:
    """Share of runs whose score is above each threshold."""
    scores = _clean(values).reshape(-1)
    return [float((scores > threshold).mean()) for threshold in thresholds]


def worst_decile(values: Any) -> float:
    """Mean of the lowest tenth of the scores, at least one of them."""
    scores = np.sort(_clean(values).reshape(-1))
    return float(scores[: max(1, len(scores) // 10)].mean())


def worst_rate(broken: dict[str, float], hard: Iterable[str]) -> float:
    """The share of particles that break the hard law which is broken most in one step."""
    return max((broken[name] for name in hard if name in broken), default=0.0)


def _clean(values: Any) -> npt.NDArray[Any]:
    scores = np.asarray(values, dtype=float)
    if scores.size == 0:
        raise DataError("there are no values; expected at least one.")
    if not np.isfinite(scores).all():
        where = np.argwhere(~np.isfinite(scores))[0].tolist()
        raise DataError(f"value {where} is {scores[tuple(where)]}; expected finite numbers.")
    return scores
