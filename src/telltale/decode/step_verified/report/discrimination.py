"""AUROC of a signal for right steps, raw and at fixed step length, with intervals from resampled problems.

At fixed length only pairs of steps of equal length are compared: a signal that merely falls with length, as grounding does by
construction, then says nothing. Groups are pooled by their numbers of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telltale.errors import DataError

DRAWS = 1000
"""Resamples of a bootstrap."""
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
        low, high = interval(bootstrap([(values, labels, groups)], clusters, draws=draws, seed=seed)[0], level=level)
    return Auroc(value, low, high, int(labels.sum()), int((~labels).sum()), int(pairs[0]))


def bootstrap(
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
