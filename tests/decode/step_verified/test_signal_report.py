"""AUROCs against brute force, length control that unmasks a proxy, increments, curves and comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from telltale.decode.calibration.signal_quality import LENGTH, StepTable, acceptance_curve, increment, signal_reports
from telltale.errors import DataError
from telltale.runs.files import strict_json
from telltale.signals.statistics import auroc, auroc_statistic, mcnemar, mean_with_interval, resampled_weights


def by_pairs(scores, right, strata):
    good = total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if right[i] and not right[j] and strata[i] == strata[j]:
                total += 1
                good += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
    return good / total if total else math.nan


def test_auroc_counts_pairs_within_strata_with_ties_half():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 40))
        scores = rng.integers(0, 5, n) / 4
        scores[rng.random(n) < 0.1] = -np.inf
        right, strata = rng.random(n) < 0.6, rng.integers(0, 3, n)
        found = auroc(scores, right, strata=strata)
        assert found.value == pytest.approx(by_pairs(scores, right, strata), nan_ok=True)
        if right.any() and not right.all():
            assert auroc(scores, right).value == pytest.approx(roc_auc_score(right, np.maximum(scores, -1)), abs=1e-12)
            assert auroc(scores, right).pairs == right.sum() * (~right).sum()


def test_bootstrap_weights_are_those_of_resampled_problems():
    rng = np.random.default_rng(0)
    problem = np.repeat(np.arange(12), 4)
    scores, right, strata = rng.normal(size=48), rng.random(48) < 0.5, rng.integers(0, 2, 48)
    statistic = auroc_statistic(scores, right, strata)
    found = np.concatenate([statistic(weights) for weights in resampled_weights(problem, resamples=5, seed=3)])
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=5)
    for value, count in zip(found, counts, strict=True):
        places = np.concatenate([np.tile(np.flatnonzero(problem == p), count[p]) for p in range(12)])
        assert value == pytest.approx(by_pairs(scores[places], right[places], strata[places]))


def test_intervals_are_wider_when_steps_of_a_problem_go_together():
    rng = np.random.default_rng(1)
    problem = np.repeat(np.arange(60), 5)
    right = np.repeat(rng.random(60) < 0.5, 5)
    scores = np.repeat(rng.normal(size=60), 5) + 0.5 * right
    clustered = auroc(scores, right, clusters=problem)
    alone = auroc(scores, right, clusters=np.arange(300))
    assert clustered.value == alone.value
    assert clustered.high - clustered.low > 1.5 * (alone.high - alone.low)
    assert clustered.low < clustered.value < clustered.high


def table(n_problems=150, seed=1):
    """Right steps are shorter, the proxy follows length alone, the signal tells right from wrong, the echo repeats it."""
    rng = np.random.default_rng(seed)
    problem = np.repeat(np.arange(n_problems), 4)
    right = rng.random(len(problem)) < 0.6
    length = np.where(right, rng.integers(4, 9, len(right)), rng.integers(6, 11, len(right)))
    signal = 1.2 * right + rng.normal(size=len(right))
    error = [
        None if ok else ("slip" if kind < 0.5 else "guess")
        for ok, kind in zip(right, rng.random(len(right)), strict=True)
    ]
    # A guess is as convincing as a right step.
    signal += np.where(np.array([one == "guess" for one in error]), 1.2, 0.0)
    return StepTable(
        problem=problem,
        length=length,
        right=right,
        error=error,
        signals={
            "signal": signal,
            "proxy": -length + 0.01 * rng.normal(size=len(right)),
            "echo": signal + 0.5 * rng.normal(size=len(right)),
            "other": 1.0 * right + rng.normal(size=len(right)),
        },
    )


def test_length_control_unmasks_a_proxy_and_error_types_are_told_apart():
    found = {one.name: one for one in signal_reports(table(), draws=300)}
    assert found[LENGTH].raw.value > 0.75
    assert found[LENGTH].fixed_length.value == 0.5
    assert found["proxy"].raw.value > 0.75
    assert found["proxy"].fixed_length.low < 0.5 < found["proxy"].fixed_length.high
    assert found["signal"].fixed_length.low > 0.5
    assert found["signal"].by_error["slip"].low > 0.6
    assert found["signal"].by_error["guess"].low < 0.5 < found["signal"].by_error["guess"].high
    assert next(iter(found)) == LENGTH


def test_what_adds_is_told_from_what_repeats_and_from_length():
    rows = table()
    adds, repeats, proxy = (increment(rows, "signal", name, draws=300) for name in ("other", "echo", "proxy"))
    assert adds.low > 0
    assert adds.with_extra > adds.without
    assert repeats.low <= 0.005
    assert abs(proxy.difference) < 0.02
    assert adds.difference == pytest.approx(adds.with_extra - adds.without)


def test_too_few_steps_to_hold_out_give_no_increment():
    rows = table(n_problems=3)
    assert increment(rows, "signal", "other") is None
    rows = table()
    rows.right[:] = True
    assert increment(rows, "signal", "other") is None
    assert math.isnan(auroc(rows.signals["signal"], rows.right, clusters=rows.problem).value)
    assert strict_json(auroc(rows.signals["signal"], rows.right))["value"] is None


def test_the_acceptance_curve_counts_what_each_threshold_accepts():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.5
    points = acceptance_curve(scores, right)
    assert [one.threshold for one in points] == sorted(set(scores), reverse=True)
    for one in points:
        own = scores >= one.threshold
        assert one.accepted == own.mean()
        assert one.accepted_and_wrong == pytest.approx((own & ~right).mean())
        assert one.wrong_among_accepted == pytest.approx((~right[own]).mean())
        assert one.right_steps_accepted == pytest.approx(own[right].mean())
    assert points[-1].accepted == 1
    assert len(acceptance_curve(rng.normal(size=500), rng.random(500) < 0.5, points=10)) == 10


def test_paired_intervals_cover_and_strata_are_resampled_apart():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        draws = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=120)
        covered += mean_with_interval(draws, resamples=400).covers(0.05)
    assert covered >= 180
    apart = np.repeat([0.0, 1.0], 50)
    assert mean_with_interval(apart, strata=np.repeat([0, 1], 50)).high == 0.5
    assert mean_with_interval(apart).high > 0.55


def test_mcnemar_is_the_binomial_test_of_what_differs():
    first = [True] * 9 + [False] * 3 + [True] * 20
    second = [False] * 9 + [True] * 3 + [True] * 20
    found = mcnemar(first, second)
    assert (found["only_first"], found["only_second"]) == (9, 3)
    assert found["p_value"] == pytest.approx(binomtest(9, 12).pvalue)
    assert mcnemar(first, first)["p_value"] == 1.0


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="labels"):
        auroc([0.1], [True, False])
    with pytest.raises(DataError, match="NaN"):
        auroc([math.nan], [True])
    with pytest.raises(DataError, match="one number a problem"):
        mean_with_interval([])
    with pytest.raises(DataError, match="same problems"):
        mcnemar([True], [True, False])
