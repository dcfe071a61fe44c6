"""Thresholds with a finite-sample promise, and realised risks with exact intervals. Numbers in, numbers out: no model here.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814) promises the expected loss, learn-then-test (Angelopoulos et al.,
arXiv 2110.01052) a risk with confidence. The unit is the problem, never the step: steps of one problem are not exchangeable. A
problem's drafted steps come as their scores, NaN for a draft that is rejected whatever the threshold, and whether each is wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_law

from telltale.config import check_choice, check_range
from telltale.errors import DataError, MissingExtraError

LOSSES = ("mean", "any", "one")
"""Of a problem: the share of its drafted steps that are accepted and wrong; whether any is; whether one drawn at random is."""
NUISANCE = 1e-3
"""What Berger and Boos's confidence region of the discordant share costs the p-value."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """The drafted steps of one problem, in order: ``scores`` (NaN: never accepted) and whether each is ``wrong``."""

    scores: tuple[float, ...]
    wrong: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.wrong):
            raise DataError(f"{len(self.scores)} scores came with {len(self.wrong)} labels; expected one each.")

    def loss(self, threshold: float, kind: str = "mean") -> float:
        """The loss, in [0, 1], of accepting what scores ``threshold`` or more; 0 for a problem without drafted steps."""
        found = [score >= threshold and bad for score, bad in zip(self.scores, self.wrong, strict=True)]
        if not found:
            return 0.0
        return float(any(found)) if kind == "any" else sum(found) / len(found)


@dataclass(frozen=True)
class Chosen:
    """A threshold, the empirical risk there, and the bound (n R + 1) / (n + 1) that had to be at most alpha."""

    threshold: float
    risk: float
    bound: float


def conformal_threshold(
    problems: Sequence[Judged], *, alpha: float, loss: str = "mean", rng: np.random.Generator | None = None
) -> Chosen:
    """The smallest of the observed scores tau with (n R(tau) + 1) / (n + 1) <= alpha; R is the mean loss over n problems.

    For steps whose prefixes do not depend on tau, where each problem's loss cannot rise with tau. Then the expected loss of a new
    exchangeable problem is at most alpha (arXiv 2208.02814, theorem 1, with losses of at most 1). ``alpha`` < 1/(n + 1) cannot
    be shown with n problems, and there may be no such score: the threshold is then inf, which accepts nothing. ``rng`` draws
    the step for loss="one".
    """
    check_range("alpha", alpha, low=0.0, high=1.0)
    check_choice("loss", loss, LOSSES)
    count = len(problems)
    if not count:
        raise DataError("no problems were given; expected at least one.")
    if loss == "one":
        if rng is None:
            raise DataError("loss='one' draws a step of each problem; expected rng.")
        problems = [one_step(problem, rng) for problem in problems]
    scores, weights = [], []
    for problem in problems:
        bad = [s for s, wrong in zip(problem.scores, problem.wrong, strict=True) if wrong and not math.isnan(s)]
        if bad:
            scores += [max(bad)] if loss == "any" else bad
            weights += [1.0] if loss == "any" else [1 / len(problem.scores)] * len(bad)
    order = np.argsort(scores)
    ordered = np.asarray(scores, dtype=np.float64)[order]
    above = np.concatenate([np.cumsum(np.asarray(weights)[order][::-1])[::-1], [0.0]])
    seen = [score for problem in problems for score in problem.scores if not math.isnan(score)]
    candidates = np.unique(np.asarray(seen, dtype=np.float64))
    risks = above[np.searchsorted(ordered, candidates)] / count
    bounds = (count * risks + 1) / (count + 1)
    # Rounding must not reject a threshold whose bound is exactly alpha.
    passing = np.flatnonzero(bounds <= alpha + 1e-12)
    if not len(passing):
        return Chosen(math.inf, 0.0, 1 / (count + 1))
    best = int(passing[0])
    return Chosen(float(candidates[best]), float(risks[best]), float(bounds[best]))


def one_step(problem: Judged, rng: np.random.Generator) -> Judged:
    """One drafted step of the problem at random; its expected loss is the problem's mean loss."""
    if not problem.scores:
        return problem
    place = int(rng.integers(len(problem.scores)))
    return Judged((problem.scores[place],), (problem.wrong[place],))


@dataclass(frozen=True)
class Tried:
    """A threshold at which the policy was run over all problems. ``p_value`` is there for learn-then-test."""

    threshold: float
    risk: float
    bound: float
    passed: bool
    acceptance: float
    p_value: float | None = None


class Descent:
    """Conformal risk control when the threshold changes what is accepted later, so that losses need not be monotone.

    Thresholds are tried from the highest down, the policy run at each. A problem's loss at tau is taken as the largest at tau or
    above (arXiv 2208.02814, on general losses), which is monotone, so theorem 1 holds for it and with it for the loss itself: the
    expected loss of the policy *as it runs at the chosen threshold* is at most alpha. The thresholds must not depend on these
    problems. Once one fails, lower ones cannot pass.
    """

    def __init__(self, *, alpha: float) -> None:
        check_range("alpha", alpha, low=0.0, high=1.0)
        self.alpha = alpha
        self.tried: list[Tried] = []
        self._worst: Floats | None = None

    def feasible(self, count: int) -> bool:
        """Whether ``count`` problems without any loss would pass."""
        return 1 / (count + 1) <= self.alpha

    def try_at(self, threshold: float, losses: Sequence[float], *, acceptance: float) -> bool:
        """Whether ``threshold`` passes, given each problem's loss there."""
        if self.tried and threshold >= self.tried[-1].threshold:
            raise DataError(f"threshold {threshold} does not lie below {self.tried[-1].threshold}; expected a descent.")
        own = np.asarray(losses, dtype=np.float64)
        self._worst = own if self._worst is None else np.maximum(self._worst, own)
        bound = (float(self._worst.sum()) + 1) / (len(own) + 1)
        passed = bound <= self.alpha + 1e-12 and all(one.passed for one in self.tried)
        self.tried.append(Tried(threshold, float(own.mean()), bound, passed, acceptance))
        return passed

    @property
    def threshold(self) -> float:
        """The lowest that passed; inf if none did."""
        return min((one.threshold for one in self.tried if one.passed), default=math.inf)


def drop_p_value(differences: Sequence[int], tolerance: float) -> float:
    """p-value of "the accuracy drops by more than ``tolerance``", exact for any number of problems.

    ``differences`` has for each problem 1 if only the target was right, -1 if only the policy was, else 0. The share of problems
    on which they differ is a nuisance: the p-value is the largest over a 99.9% confidence region of that share, plus 0.001 (Berger
    and Boos, JASA 89, 1994). The region is searched on 65 points; the tail is a smooth function of the share.
    """
    check_range("tolerance", tolerance, low=0.0, below=1.0)
    found = np.asarray(differences)
    if not len(found) or not np.isin(found, (-1, 0, 1)).all():
        raise DataError(
            "expected for at least one problem whether the target (1), the policy (-1) or neither was better."
        )
    return _drop_p_value(len(found), int(found.sum()), int(np.abs(found).sum()), float(tolerance))


def mean_p_value(losses: Sequence[float], alpha: float) -> float:
    """p-value of "the mean loss is above ``alpha``" for losses in [0, 1]: Hoeffding and Bentkus, as MAPIE computes it."""
    methods = _mapie("mapie.risk_control.methods")
    own = np.asarray(losses, dtype=np.float64)
    binary = bool(np.isin(own, (0.0, 1.0)).all())
    found = methods.compute_hoeffding_bentkus_p_value(own.mean(keepdims=True), len(own), alpha, binary=binary)
    return min(1.0, float(found[0, 0]))


def fixed_sequence(p_values: Sequence[float], *, level: float) -> list[int]:
    """Which hypotheses, tested in this order, are rejected with a family-wise error of at most ``level`` (by MAPIE)."""
    control = _mapie("mapie.risk_control").control_fwer
    return [int(place) for place in control(np.asarray(p_values), level, fwer_method="fixed_sequence")]


@dataclass(frozen=True)
class RealisedRisk:
    """How often accepted steps were wrong, on problems that were not used to choose the threshold.

    ``rate`` is the mean over problems of the share of drafted steps that were accepted and wrong (or of the loss chosen), with
    its Clopper-Pearson interval over one step drawn per problem, which are independent. ``pooled`` counts all steps, and its
    interval takes them for independent, which makes it too narrow.
    """

    rate: float
    low: float
    high: float
    pooled: float
    pooled_low: float
    pooled_high: float
    wrong_among_accepted: float | None
    problems: int
    steps: int
    accepted: int
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)


def realised_risk(
    problems: Sequence[Judged], threshold: float, *, loss: str = "mean", seed: int = 0, level: float = 0.95
) -> RealisedRisk:
    """The realised risk of accepting what scores ``threshold`` or more in ``problems``."""
    if not problems:
        raise DataError("no problems were given; expected at least one.")
    check_choice("loss", loss, LOSSES)
    rng = np.random.default_rng(seed)
    drawn = [
        problem.loss(threshold, "any") if loss == "any" else one_step(problem, rng).loss(threshold)
        for problem in problems
    ]
    low, high = clopper_pearson(int(sum(drawn)), len(problems), level=level)
    pairs = [pair for problem in problems for pair in zip(problem.scores, problem.wrong, strict=True)]
    accepted = sum(score >= threshold for score, _ in pairs)
    wrong = sum(score >= threshold and bad for score, bad in pairs)
    pooled_low, pooled_high = clopper_pearson(wrong, len(pairs), level=level) if pairs else (0.0, 1.0)
    return RealisedRisk(
        rate=float(np.mean([problem.loss(threshold, loss) for problem in problems])),
        low=low,
        high=high,
        pooled=wrong / len(pairs) if pairs else 0.0,
        pooled_low=pooled_low,
        pooled_high=pooled_high,
        wrong_among_accepted=wrong / accepted if accepted else None,
        problems=len(problems),
        steps=len(pairs),
        accepted=accepted,
        level=level,
    )


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a probability (Clopper and Pearson, Biometrika 26, 1934)."""
    if not 0 <= successes <= trials or trials < 1:
        raise DataError(f"{successes} of {trials} is no count of successes; expected 0 <= successes <= trials.")
    outside = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta_law.ppf(outside, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta_law.ppf(1 - outside, successes + 1, trials - successes))
    return low, high


@functools.lru_cache(maxsize=4096)
def _drop_p_value(count: int, net: int, differing: int, tolerance: float) -> float:
    low, high = clopper_pearson(differing, count, level=1 - NUISANCE)
    if high < tolerance:
        # A drop of that size needs more disagreement than the region allows.
        return NUISANCE
    shares = np.linspace(max(low, tolerance), high, 65)
    return min(1.0, float(_tails(count, net, (shares + tolerance) / 2, (shares - tolerance) / 2).max()) + NUISANCE)


def _tails(count: int, net: int, up: Floats, down: Floats) -> Floats:
    """P(sum <= net) for the sum of ``count`` draws of 1 (with ``up``), -1 (with ``down``) and 0, for each pair of these."""
    size = 1 << (2 * count + 1).bit_length()
    turn = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    steps = (1 - up - down)[:, None] + up[:, None] * turn + down[:, None] * turn.conj()
    sums = np.fft.irfft(steps**count, size)
    # Place s holds the probability of the sum s, negative sums from the end.
    return np.clip(sums[:, np.arange(-count, net + 1)].sum(1), 0.0, 1.0)


def _mapie(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("learn-then-test needs MAPIE: pip install 'telltale[calibrate]'") from error
