"""Two policies on the same problems: differences with paired bootstrap intervals, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from telltale.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
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
) -> Estimate:
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
    return Estimate(float(found.mean()), float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Problems that only one of two policies gets right, and the exact two-sided p-value that neither is better."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise DataError(f"{len(a)} results came with {len(b)}; expected the same problems.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    differing = only_first + only_second
    p_value = 1.0 if differing == 0 else float(binomtest(only_first, differing, 0.5).pvalue)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}
