"""Statistics against hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from telltale.errors import ConfigError, DataError
from telltale.world import iqm
from telltale.world.metrics import (
    agresti_caffo,
    bootstrap,
    mean_at_least,
    paired_difference,
    performance_profile,
    planning_gap,
    worst_decile,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2, 3, 100], 2.5), ([5], 5), ([0, 1, 2, 3, 4, 5, 6, 100], 3.5), ([[1, 2], [3, 100]], 2.5), ([3, 1, 2], 2)],
)
def test_iqm_by_hand(values, expected):
    assert iqm(values) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_iqm_refuses_what_is_no_number(values):
    with pytest.raises(DataError):
        iqm(values)


def test_iqm_and_profile_are_rliables():
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(0).normal(size=(7, 3))
    assert iqm(scores) == pytest.approx(float(metrics.aggregate_iqm(scores)))


def test_the_bootstrap_is_decided_by_its_seed_and_keeps_tasks_apart():
    scores = np.stack([np.zeros(6), np.random.default_rng(0).normal(size=6) + 100], 1)
    one, two, other = (bootstrap(scores, statistic=lambda v: float(v.mean()), seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert (one.low, one.high) != (other.low, other.high)
    mean = bootstrap(scores, statistic=lambda values: float(values.mean()), seed=0)
    # resampling rows across the two columns would give means far from 50
    assert 49 < mean.low < mean.estimate < mean.high < 51


def test_a_bootstrap_interval_covers_a_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = bootstrap(rng.normal(size=30), statistic=lambda v: float(v.mean()), resamples=200, seed=1)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_agresti_caffo_by_hand():
    found = agresti_caffo(8, 10, 5, 10)
    p, q = 9 / 12, 6 / 12
    half = 1.959964 * math.sqrt(p * (1 - p) / 12 + q * (1 - q) / 12)
    assert found.estimate == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-6)


def test_a_paired_difference_is_tango_s():
    # 14 and 3 discordant pairs of 50: Tango (1998) solved by a root finder of another kind
    first = [True] * 14 + [False] * 3 + [True] * 33
    second = [False] * 14 + [True] * 3 + [True] * 33
    found = paired_difference(first, second)

    def score(d):
        b = -17 + (100 - 14 + 3) * d
        share = (math.sqrt(b * b + 8 * 50 * 3 * d * (1 - d)) - b) / 200
        return (11 - 50 * d) / math.sqrt(50 * (2 * share + d * (1 - d)))

    low = brentq(lambda d: score(d) - norm.ppf(0.975), -0.5, 0.219)
    assert (found.estimate, found.low) == pytest.approx((0.22, low), abs=1e-6)
    other = paired_difference(second, first)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    # agreement counts: the interval of independent arms is wider
    agreed = [True] * 24 + [False] * 6
    assert (
        paired_difference(agreed, agreed, confidence=0.9).low > agresti_caffo(24, 30, 24, 30, confidence=0.9).low + 0.08
    )
    same = paired_difference([True] * 30, [True] * 30, confidence=0.9)
    assert same.low == pytest.approx(-(norm.ppf(0.95) ** 2) / (30 + norm.ppf(0.95) ** 2), abs=1e-6)
    with pytest.raises(DataError, match="same starts"):
        paired_difference([True], [])


def test_a_mean_s_lower_bound_holds_for_skewed_values():
    rng = np.random.default_rng(0)
    wrong = {"t": 0, "bound": 0, "normal": 0}
    for _ in range(2000):
        skewed = 1 - rng.lognormal(0.0, 1.0, 40) / math.exp(0.5)
        wrong["t"] += skewed.mean() - 1.6849 * skewed.std(ddof=1) / math.sqrt(40) > 0
        wrong["bound"] += mean_at_least(skewed, alpha=0.05) > 0
        wrong["normal"] += mean_at_least(rng.normal(size=40), alpha=0.05) > 0
    assert wrong["t"] > 180  # Student's t errs in more than 9% instead of 5%
    assert wrong["bound"] < 0.7 * wrong["t"]
    assert 60 < wrong["normal"] < 110
    assert mean_at_least([1.0], alpha=0.05) == -math.inf
    assert mean_at_least([2.0] * 10, alpha=0.05) == 2.0


@pytest.mark.parametrize("case", [(11, 10, 0, 10), (0, 0, 0, 10), (-1, 10, 0, 10)])
def test_agresti_caffo_refuses_impossible_counts(case):
    with pytest.raises(ConfigError):
        agresti_caffo(*case)


@pytest.mark.parametrize(
    ("model", "oracle", "verdict"),
    [
        ((30, 0), (30, 0), "none"),
        ((3, 27), (30, 0), "model"),
        ((2, 28), (1, 29), "planner"),
        ((27, 3), (30, 0), "inconclusive"),
    ],
)
def test_the_verdict_of_the_planning_gap(model, oracle, verdict):
    arms = [[True] * won + [False] * lost for won, lost in (model, oracle)]
    assert planning_gap(*arms).verdict == verdict


def test_profile_and_tail():
    assert performance_profile([1, 2, 3, 4], [0, 2, 4]) == [1.0, 0.5, 0.0]
    assert worst_decile(range(20)) == 0.5
