"""A probability for each pair, and "don't know": what a difference of scores is worth on prompts that nothing was fitted on.

P(first is better) = sigma(slope * difference). The slope is fitted on the prompts that training stopped by; how well it does is
measured on those to compare on: the calibration error without the bias that bins of few pairs give it, and the log loss beside a
constant and a judge of length alone.

A judge that may abstain answers where the difference is large enough. The threshold comes from the prompts to compare on by
learning then testing (Angelopoulos et al. 2021): from the largest differences down, the hypothesis that more than alpha of the
answers are wrong is tested with one pair a prompt, which is binomial, and the first threshold that is not rejected ends the
search. So with probability 1 - delta over the choice of prompts, at most alpha of the answers are wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor

from telltale.align.judge.gate_fit import PairFeatures, credits
from telltale.signals.statistics import (
    CountedEstimate,
    Estimate,
    clustered_mean,
    clustered_proportion,
    resampled_weights,
)

ALPHA, DELTA = 0.1, 0.1
"""Share of wrong answers that is promised, and the chance that the promise fails."""
BINS, PAIRS_OF_A_BIN = 10, 20
THRESHOLDS = 20
"""At most so many are tested."""
RESAMPLES = 500
SEPARATED = 0.9
"""From this part of the largest slope on, the fit has run away: all pairs are on one side."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Abstention:
    """Which differences of scores are answered."""

    threshold: float | None
    """The least |difference|; None answers nothing, since no threshold keeps the promise on so few prompts, or at all."""
    alpha: float
    delta: float
    answered: CountedEstimate
    """The share of pairs."""
    wrong: CountedEstimate
    """Of the answered pairs; they have chosen the threshold, so the promise is alpha, not this."""


@dataclass(frozen=True)
class Calibration:
    """The probability and the abstention, and how the probability does on prompts that it was not fitted on."""

    slope: float
    error: Estimate
    """Root of the mean squared difference between probability and frequency, debiased; 95% over prompts."""
    log_loss: CountedEstimate
    """In nats per vote."""
    gain: dict[str, CountedEstimate]
    """Log loss of "constant" (ln 2) and, where lengths are known, of "length alone", less this one's: above 0 is better."""
    abstention: Abstention

    def to_config(self) -> dict[str, Any]:
        """What a judge needs of it."""
        told = self.abstention
        return {"slope": self.slope, "threshold": told.threshold, "alpha": told.alpha, "delta": told.delta}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where the probability is worth no more than a constant or the length, and where nothing is answered."""
        found = [
            f"the log loss of the judge's probability is not below that of {name}: {gap.value:+.3f} [{gap.low:+.3f}, "
            f"{gap.high:+.3f}] nats on {gap.count} prompts."
            for name, gap in self.gain.items()
            if not gap.low > 0.0
        ]
        if self.abstention.threshold is None:
            found.append(
                f'the judge answers "don\'t know" to every pair: on {self.abstention.answered.count} prompts no threshold can '
                f"promise at most {self.abstention.alpha:g} of the answers wrong."
            )
        return tuple(found)


def calibrate(
    stop_margins: Tensor,
    stop: PairFeatures,
    margins: Tensor,
    compare: PairFeatures,
    *,
    alpha: float = ALPHA,
    delta: float = DELTA,
    seed: int = 0,
) -> Calibration:
    """The slope from ``stop_margins`` (m,) on the pairs ``stop``, everything else from ``margins`` (n,) on the pairs
    ``compare``."""
    slope = fitted_slope(stop_margins.double().numpy(), _votes(stop))
    values, votes, prompts = margins.double().numpy(), _votes(compare), compare.groups.numpy()
    own = _log_losses(slope * values, votes)
    others = {"a constant": np.full(len(values), math.log(2.0))}
    if stop.lengths is not None and compare.lengths is not None:
        along = fitted_slope(_longer(stop.lengths), _votes(stop), signed=True)
        others["length alone"] = _log_losses(along * _longer(compare.lengths), votes)
    decided = compare.decided
    right = credits(margins, decided).numpy()
    there = (decided != 0).numpy()
    sure = special.expit(slope * np.abs(values[there]))
    return Calibration(
        slope,
        calibration_error(sure, right, prompts[there], seed=seed),
        clustered_mean(own, prompts),
        {name: clustered_mean(other - own, prompts) for name, other in others.items()},
        abstention(np.abs(values[there]), right, prompts[there], alpha=alpha, delta=delta, seed=seed),
    )


def fitted_slope(margins: Floats, votes: Floats, *, signed: bool = False) -> float:
    """The slope with the smallest log loss of ``margins`` (n,) under ``votes`` (n, 2); not below 0 unless ``signed``.

    Where no pair speaks against any slope, a few pairs would give certainty. There Platt's targets stand in (1999): one vote more
    on either side, shared among the pairs. Margins of nothing but 0 have the slope 0.
    """
    size = float(np.abs(margins).mean())
    if size == 0.0:
        return 0.0
    reach = 20.0 / size
    bounds = (-reach if signed else 0.0, reach)

    def best(weights: Floats) -> float:
        found = optimize.minimize_scalar(
            lambda slope: float((_log_losses(slope * margins, weights) * weights.sum(1)).sum()),
            bounds=bounds,
            method="bounded",
        )
        return float(found.x)

    slope = best(votes)
    return slope if abs(slope) < SEPARATED * reach else best(votes + 1.0 / len(votes))


def calibration_error(sure: Floats, right: Floats, prompts: NDArray[Any], *, seed: int = 0) -> Estimate:
    """Root mean squared difference of ``sure`` (n,), the probability of the answer, and ``right`` (n,), over bins of equal size.

    The variance of each bin's difference (over ``prompts``) is taken off its square, so that a calibrated judge has 0 on
    average before the root and not what small bins give; the interval resamples prompts. NaN for fewer than two bins' pairs.
    """
    bins = min(BINS, len(sure) // PAIRS_OF_A_BIN)
    if bins < 2:
        return Estimate(math.nan, math.nan, math.nan)
    place = np.empty(len(sure), dtype=np.int64)
    place[np.argsort(sure, kind="stable")] = np.arange(len(sure)) * bins // len(sure)
    names, owner = np.unique(prompts, return_inverse=True)
    gaps, counts = np.zeros((len(names), bins)), np.zeros((len(names), bins))
    np.add.at(gaps, (owner, place), right - sure)
    np.add.at(counts, (owner, place), 1.0)
    total = counts.sum(0)
    residuals = gaps - counts * (gaps.sum(0) / total)
    noise = (residuals**2).sum(0) * len(names) / max(1, len(names) - 1) / total**2
    share = total / total.sum()
    plain = _squared(np.ones((1, len(names))), gaps, counts)[0]
    excess = float(share @ noise)
    blocks = resampled_weights(np.arange(len(names)), resamples=RESAMPLES, seed=seed)
    drawn = np.concatenate([_squared(weights, gaps, counts) for weights in blocks])
    low, high = np.quantile(drawn, [0.025, 0.975])
    # A resample has the noise twice: that of the data, and its own.
    return Estimate(*(math.sqrt(max(0.0, value)) for value in (plain - excess, low - 2 * excess, high - 2 * excess)))


def abstention(
    sizes: Floats, right: Floats, prompts: NDArray[Any], *, alpha: float = ALPHA, delta: float = DELTA, seed: int = 0
) -> Abstention:
    """The least of ``sizes`` (n,) that is answered, so that at most ``alpha`` of the answers are wrong with probability 1 -
    ``delta``.

    ``right`` (n,) are credits of the answers. Prompts count alike: of each one pair, drawn by ``seed``, is tested.
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    threshold: float | None = None
    for candidate in _candidates(sizes, prompts, alpha, delta):
        answered = order[sizes[order] >= candidate]
        first = answered[np.unique(prompts[answered], return_index=True)[1]]
        wrong = int((right[first] < 1.0).sum())
        if stats.binom.cdf(wrong, len(first), alpha) > delta:
            break
        threshold = float(candidate)
    kept = np.zeros(len(sizes), dtype=bool) if threshold is None else sizes >= threshold
    return Abstention(
        threshold,
        alpha,
        delta,
        clustered_proportion(kept.astype(np.float64), prompts),
        clustered_proportion(1.0 - right[kept], prompts[kept]),
    )


def _candidates(sizes: Floats, prompts: NDArray[Any], alpha: float, delta: float) -> list[float]:
    """Thresholds from the largest down. The first leaves enough prompts that a test can pass with a few errors; none sees
    ``right``."""
    fewest = math.ceil(1.5 * math.log(delta) / math.log1p(-alpha))
    largest = np.sort([sizes[prompts == prompt].max() for prompt in np.unique(prompts)])[::-1]
    if len(largest) < fewest:
        return []
    least = float(sizes.min())
    places = np.unique(np.linspace(fewest - 1, len(largest) - 1, THRESHOLDS).astype(int))
    return [*dict.fromkeys([*(float(largest[place]) for place in places), least])]


def _squared(weights: Floats, gaps: Floats, counts: Floats) -> Floats:
    """Mean squared difference over bins, (resamples,), under weights of prompts."""
    totals, sums = weights @ counts, weights @ gaps
    share = totals / totals.sum(1, keepdims=True)
    return (share * (sums / np.maximum(totals, 1e-12)) ** 2).sum(1)


def _log_losses(margins: Floats, votes: Floats) -> Floats:
    """Nats per vote of each pair, (n,)."""
    both = votes[:, 0] * np.logaddexp(0.0, -margins) + votes[:, 1] * np.logaddexp(0.0, margins)
    found: Floats = both / votes.sum(1)
    return found


def _votes(pairs: PairFeatures) -> Floats:
    if pairs.votes is None:
        return np.tile([1.0, 0.0], (len(pairs), 1))
    found: Floats = pairs.votes.double().numpy()
    return found


def _longer(lengths: Tensor) -> Floats:
    found: Floats = lengths.double().log1p().diff(dim=1)[:, 0].neg().numpy()
    return found
