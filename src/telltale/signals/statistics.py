"""Rank agreement between a measure and a generalisation gap: Kendall's tau, its partial form, and granulated coefficients.

The granulated coefficients are those of Jiang et al. (arXiv 1912.02178), which arXiv 2604.19740 reports as
psi_LR and psi_BS: tau among runs that differ in one setting only. All are tau-b, so ties on either side count neither
for nor against. Resampled runs enter with multiplicities: a run never forms a pair with its own copy.

AUROC of a signal for right steps, raw and at fixed step length, with intervals from resampled problems.

At fixed length only pairs of steps of equal length are compared: a signal that merely falls with length, as grounding does by
construction, then says nothing. Groups are pooled by their numbers of pairs.

Two policies on the same problems: differences with paired bootstrap intervals, and McNemar's exact test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from telltale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Estimate:
    """A coefficient with its interval; NaN where it is not defined. ``count``: runs or seeds that it rests on."""

    value: float
    low: float
    high: float
    count: int


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two equally long sequences; NaN for fewer than two runs or where one side is constant.

    Raises :class:`~telltale.errors.DataError` for lengths that differ and for values that are not finite.
    """
    pairs = _Pairs(x, y)
    return float(pairs.tau(torch.ones(1, pairs.count, dtype=torch.float64))[0])


def partial_tau(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Kendall's partial tau of ``x`` and ``y`` with ``given`` held fixed; NaN where ``given`` orders one side perfectly.

    (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2)(1 - t_yz^2)); the discipline of arXiv 2406.02234 against confounded measures.
    """
    xy, xz, yz = kendall_tau(x, y), kendall_tau(x, given), kendall_tau(y, given)
    rest = (1.0 - xz * xz) * (1.0 - yz * yz)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-12 else math.nan


def granulated(
    measure: Sequence[float],
    gap: Sequence[float],
    settings: Mapping[str, Sequence[Any]],
    *,
    blocks: Sequence[Any] | None = None,
) -> dict[str, float]:
    """psi of every setting, and their mean under the name ``mean``.

    ``settings`` maps a name (learning rate, batch size, ...) to its value for each run. psi of a name is the mean of tau
    over the groups of runs that agree in all *other* settings, and in ``blocks`` (such as the seed of each run). Groups in
    which tau is not defined are left out; psi is NaN if none is left.
    """
    one = torch.ones(1, len(measure), dtype=torch.float64)
    return {name: float(psi[0]) for name, psi in _granulated(measure, gap, settings, blocks, one).items()}


def bootstrap(
    measure: Sequence[float],
    gap: Sequence[float],
    settings: Mapping[str, Sequence[Any]],
    *,
    blocks: Sequence[Any] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """tau (under ``tau``) and every psi with percentile intervals over resampled runs.

    For runs without repeated seeds: the interval answers "other runs of this kind", not "other seeds of these runs".
    Raises :class:`~telltale.errors.ConfigError` for ``resamples`` below 1 or a ``level`` outside (0, 1).
    """
    _check_level(level)
    if resamples < 1:
        raise ConfigError(f"resamples={resamples!r} is not allowed; expected an integer >= 1.")
    pairs = _Pairs(measure, gap)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(max(1, pairs.count), (resamples, pairs.count), generator=generator)
    weights = torch.zeros(resamples, pairs.count, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    points = granulated(measure, gap, settings, blocks=blocks) | {"tau": kendall_tau(measure, gap)}
    samples = {"tau": pairs.tau(weights)} | _granulated(measure, gap, settings, blocks, weights)
    return {name: _percentile(points[name], values, level, pairs.count) for name, values in samples.items()}


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """The mean of one coefficient per seed with Student's interval; undefined seeds (NaN) are left out of mean and count.

    The interval is NaN with fewer than two seeds. Raises :class:`~telltale.errors.ConfigError` for a ``level`` outside (0, 1).
    """
    _check_level(level)
    defined = [float(value) for value in values if not math.isnan(value)]
    count = len(defined)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = sum(defined) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in defined) / (count - 1))
    reach = _student_reach(level, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - reach, mean + reach, count)


class _Pairs:
    """Signs of all pairs of runs on both sides; tau of any multiplicities is then three quadratic forms."""

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        if len(x) != len(y):
            raise DataError(f"{len(x)} measures and {len(y)} gaps were given; expected one of each per run.")
        left, right = _signs(x), _signs(y)
        self.count = len(x)
        self.agreement, self.left, self.right = left * right, left.abs(), right.abs()

    def tau(self, weights: Tensor) -> Tensor:
        """tau-b for each row of multiplicities: (resamples, runs) -> (resamples,), NaN where a side is constant."""
        agreement, left, right = (
            torch.einsum("bi,ij,bj->b", weights, signs, weights) for signs in (self.agreement, self.left, self.right)
        )
        return agreement / (left * right).sqrt()


def _signs(values: Sequence[float]) -> Tensor:
    line = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if not bool(torch.isfinite(line).all()):
        raise DataError("a measure or gap is NaN or infinite; expected finite numbers. Leave such runs out and say so.")
    return torch.sign(line[:, None] - line[None, :])


def _granulated(
    measure: Sequence[float],
    gap: Sequence[float],
    settings: Mapping[str, Sequence[Any]],
    blocks: Sequence[Any] | None,
    weights: Tensor,
) -> dict[str, Tensor]:
    """psi of every setting and their mean for each row of multiplicities (resamples, runs)."""
    columns = {name: list(values) for name, values in settings.items()}
    fixed = list(blocks) if blocks is not None else [None] * len(measure)
    for name, values in (columns | {"blocks": fixed}).items():
        if len(values) != len(measure):
            raise DataError(f"{name!r} has {len(values)} values for {len(measure)} runs; expected one per run.")
    psis = {}
    for name, values in columns.items():
        others = [fixed, *(column for other, column in columns.items() if other != name)]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for run in range(len(measure)):
            groups[tuple(column[run] for column in others)].append(run)
        taus = [
            _Pairs([measure[run] for run in runs], [gap[run] for run in runs]).tau(weights[:, runs])
            for runs in groups.values()
            if len({values[run] for run in runs}) > 1
        ]
        undefined = torch.full((len(weights),), math.nan, dtype=torch.float64)
        psis[name] = torch.stack(taus).nanmean(dim=0) if taus else undefined
    if psis:
        psis["mean"] = torch.stack(list(psis.values())).nanmean(dim=0)
    return psis


def _percentile(point: float, samples: Tensor, level: float, count: int) -> Estimate:
    defined = samples[~samples.isnan()].double()
    if defined.numel() == 0 or math.isnan(point):
        return Estimate(point, math.nan, math.nan, count)
    tail = (1.0 - level) / 2
    low, high = torch.quantile(defined, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Estimate(point, low, high, count)


def _student_reach(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = ``level`` for an integer number of degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""

    odd = freedom % 2

    def inside(angle: float) -> float:
        term, series = math.cos(angle) ** odd, 0.0
        for exponent in range(odd, freedom - 1, 2):
            series += term
            term *= (exponent + 1) / (exponent + 2) * math.cos(angle) ** 2
        return 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level={level!r} is not allowed; expected a number between 0 and 1.")


DRAWS = 1000
"""Resamples of a discrimination_bootstrap."""
_BLOCK = 4_000_000
"""Weights that are held at a time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Auroc:
    """The chance that a right step scores above a wrong one, ties counting half, and its interval.

    NaN without a pair to compare (the interval, with fewer than two problems that have one). ``pairs`` were compared, of ``right``
    and ``wrong`` steps.
    """

    value: float
    low: float
    high: float
    right: int
    wrong: int
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it; NaN is None."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def auroc(
    scores: Sequence[float] | Floats,
    right: Sequence[bool] | NDArray[np.bool_],
    *,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    clusters: Sequence[int] | NDArray[np.int64] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Auroc:
    """AUROC of ``scores`` (n,) for ``right`` (n,); only pairs within a stratum (a step length) are compared.

    ``clusters``: the problem of each step; whole problems are resampled. Raises :class:`~telltale.errors.DataError` for lengths
    that differ or NaN scores.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    groups = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    if not len(values) == len(labels) == len(groups):
        raise DataError(f"{len(values)} scores came with {len(labels)} labels; expected one each.")
    if np.isnan(values).any():
        raise DataError("a score is NaN; expected numbers.")
    ones = np.ones((1, len(values)))
    concordant, pairs = _concordance(values, labels, groups, ones)
    value = float(concordant[0] / pairs[0]) if pairs[0] else math.nan
    low = high = math.nan
    if clusters is not None and pairs[0]:
        low, high = interval(
            discrimination_bootstrap([(values, labels, groups)], clusters, draws=draws, seed=seed)[0], level=level
        )
    return Auroc(value, low, high, int(labels.sum()), int((~labels).sum()), int(pairs[0]))


def discrimination_bootstrap(
    tables: Sequence[tuple[Floats, NDArray[np.bool_], NDArray[np.int64]]],
    clusters: Sequence[int] | NDArray[np.int64],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Floats:
    """AUROCs (tables, draws) of several (scores, right, strata) over the same steps, under the same resamples of problems."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    rng = np.random.default_rng(seed)
    found = np.full((len(tables), draws), np.nan)
    block = max(1, _BLOCK // max(1, len(index)))
    for start in range(0, draws, block):
        stop = min(draws, start + block)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=stop - start)
        weights = counts[:, index].astype(np.float64)
        for row, (scores, right, strata) in enumerate(tables):
            concordant, pairs = _concordance(scores, right, strata, weights)
            with np.errstate(invalid="ignore"):
                found[row, start:stop] = concordant / pairs
    return found


def interval(values: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled ``values``; those without a pair are left out."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _concordance(
    scores: Floats, right: NDArray[np.bool_], strata: NDArray[np.int64], weights: Floats
) -> tuple[Floats, Floats]:
    """Weighted concordant pairs and all pairs, (draws,) each, summed over strata; ``weights`` (draws, n)."""
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


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class ComparisonsEstimate:
    """A mean over problems, or a difference of two, with its percentile interval over resampled problems."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As JSON writes it."""
        return asdict(self)

    def covers(self, value: float) -> bool:
        """Whether the interval includes ``value``."""
        return self.low <= value <= self.high


def mean_with_interval(
    values: Sequence[float] | Floats,
    *,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> ComparisonsEstimate:
    """The mean of one value a problem (n,), with a bootstrap interval that resamples problems, within strata if given.

    For a paired difference, give the differences: resampling a problem then takes both sides along. Several seeds of a problem
    are to be averaged first, they are no problems of their own.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise DataError(f"values have shape {found.shape}; expected one number a problem.")
    groups = np.zeros(len(found), dtype=np.int64) if strata is None else np.asarray(strata)
    rng = np.random.default_rng(seed)
    sums = np.zeros(draws)
    for group in np.unique(groups):
        own = found[groups == group]
        counts = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
        sums += counts @ own
    low, high = np.quantile(sums / len(found), [(1 - level) / 2, (1 + level) / 2])
    return ComparisonsEstimate(float(found.mean()), float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Problems that only one of two policies gets right, and the exact two-sided p-value that neither is better."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise DataError(f"{len(a)} results came with {len(b)}; expected the same problems.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    differing = only_first + only_second
    p_value = 1.0 if differing == 0 else float(binomtest(only_first, differing, 0.5).pvalue)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}
