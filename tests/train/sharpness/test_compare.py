"""Rank agreement against SciPy and hand counts; comparisons over seeds and over runs; what cannot be compared."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest
from scipy import stats

from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.signals.statistics import (
    bootstrap,
    kendall_statistic,
    kendall_tau,
    mean_over_seeds,
    partial_tau,
    resampled_weights,
)
from telltale.train.sharpness.compare import POINT_FILE, Point, compare, granulated

RATES, BATCHES = (0.1, 0.2, 0.4), (16, 32, 64)
GRID = list(itertools.product(RATES, BATCHES))
SETTINGS = {"learning_rate": [rate for rate, _ in GRID], "batch_size": [batch for _, batch in GRID]}


def draws(count, seed, levels=None):
    source = random.Random(seed)
    return [float(source.randrange(levels)) if levels else source.random() for _ in range(count)]


@pytest.mark.parametrize("levels", [None, 3, 6])
def test_tau_is_scipys_also_with_ties(levels):
    for seed in range(5):
        x, y = draws(15, seed, levels), draws(15, 100 + seed, levels)
        assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_tau_is_undefined_for_a_constant_side_and_for_one_run():
    assert math.isnan(kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(kendall_tau([1.0], [2.0]))


def test_partial_tau_removes_what_the_control_explains():
    control = [float(value) for value in range(40)]
    measure = [value + 12 * noise for value, noise in zip(control, draws(40, 1), strict=True)]
    gap = [value + 12 * noise for value, noise in zip(control, draws(40, 2), strict=True)]
    xy, xz, yz = (stats.kendalltau(*pair).statistic for pair in ((measure, gap), (measure, control), (gap, control)))
    partial = partial_tau(measure, gap, control)
    assert partial == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    assert xy > 0.6
    assert abs(partial) < 0.25, "measure and gap share nothing but the control"
    assert math.isnan(partial_tau(control, gap, control)), "nothing is left once a measure is held fixed by itself"


def test_granulated_coefficients_follow_one_setting_at_a_time():
    # Rises with the rate within each batch size, falls with the batch size within each rate.
    gap = [rate - 10 * batch for rate, batch in GRID]
    by_rate = granulated(SETTINGS["learning_rate"], gap, SETTINGS)
    assert by_rate["learning_rate"] == pytest.approx(1.0)
    assert math.isnan(by_rate["batch_size"]), "the measure is constant within a rate"
    by_batch = granulated(SETTINGS["batch_size"], gap, SETTINGS)
    assert by_batch["batch_size"] == pytest.approx(-1.0)
    assert by_batch["mean"] == pytest.approx(-1.0)


def test_granulated_is_the_mean_of_taus_within_groups():
    measure, gap = draws(9, 1), draws(9, 2)
    expected = []
    for batch in BATCHES:
        rows = [index for index, (_, other) in enumerate(GRID) if other == batch]
        expected.append(stats.kendalltau([measure[i] for i in rows], [gap[i] for i in rows]).statistic)
    psi = granulated(measure, gap, SETTINGS)
    assert psi["learning_rate"] == pytest.approx(sum(expected) / 3)
    assert psi["mean"] == pytest.approx((psi["learning_rate"] + psi["batch_size"]) / 2)


def test_blocks_are_never_mixed():
    measure, gap = [1.0, 2.0, 10.0, 20.0], [1.0, 2.0, -9.0, -8.0]
    rates = {"learning_rate": [0.1, 0.2, 0.1, 0.2]}
    assert granulated(measure, gap, rates, blocks=[0, 0, 1, 1])["learning_rate"] == 1.0
    assert granulated(measure, gap, rates)["learning_rate"] < 1.0


def tau_of_runs(x, y, **options):
    return bootstrap([kendall_statistic(x, y)], range(len(x)), **options)[0]


def test_a_resample_never_pairs_a_run_with_its_own_copy():
    x = draws(12, 3)
    perfect = tau_of_runs(x, x, resamples=200, seed=1)
    assert (perfect.value, perfect.low, perfect.high) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("levels", [None, 4])
def test_tau_of_weights_is_scipys_of_repeated_runs(levels):
    x, y = draws(12, 6, levels), draws(12, 7, levels)
    weights = np.concatenate(list(resampled_weights(range(12), resamples=20, seed=5)))
    for row, found in zip(weights.astype(int), kendall_statistic(x, y)(weights), strict=True):
        assert found == pytest.approx(stats.kendalltau(np.repeat(x, row), np.repeat(y, row)).statistic, abs=1e-12)


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say():
    # For a Gaussian pair of correlation r, tau is (2 / pi) asin r.
    correlation, inside = 0.6, 0
    truth = 2 / math.pi * math.asin(correlation)
    for trial in range(60):
        source = random.Random(trial)
        x = [source.gauss(0, 1) for _ in range(40)]
        y = [correlation * value + math.sqrt(1 - correlation**2) * source.gauss(0, 1) for value in x]
        inside += tau_of_runs(x, y, resamples=300, level=0.9, seed=trial).covers(truth)
    assert inside >= 48, "three standard deviations of a binomial below 54"


def test_bootstrap_is_seeded_and_takes_a_generator():
    x, y = draws(9, 4), draws(9, 5)
    assert tau_of_runs(x, y, seed=3) == tau_of_runs(x, y, seed=3) == tau_of_runs(x, y, seed=np.random.default_rng(3))
    assert tau_of_runs(x, y, seed=3) != tau_of_runs(x, y, seed=4)


def test_weights_draw_whole_clusters_and_keep_strata():
    clusters, strata = [0, 0, 1, 2, 2, 3], [0, 0, 0, 1, 1, 1]
    weights = np.concatenate(list(resampled_weights(clusters, strata=strata, resamples=50)))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, 0] + weights[:, 2] == 2).all()
    assert (weights[:, 3] + weights[:, 5] == 2).all()
    fewer = np.concatenate(list(resampled_weights(range(6), resamples=50, fewer=1)))
    assert (fewer.sum(1) == 5).all()


def test_the_mean_over_seeds_has_students_interval_and_leaves_out_what_is_undefined():
    values = [0.1, 0.4, 0.3, 0.2]
    estimate = mean_over_seeds([*values, math.nan], level=0.9)
    expected = stats.t.interval(0.9, 3, loc=0.25, scale=stats.sem(values))
    assert (estimate.value, estimate.count) == (pytest.approx(0.25), 4)
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert math.isnan(mean_over_seeds([0.5]).low)
    assert mean_over_seeds([]).count == 0


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 41])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_students_quantile_is_scipys(count, level):
    values = draws(count, seed=count)
    estimate = mean_over_seeds(values, level=level)
    expected = stats.t.interval(level, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-9)


def points(seeds, noise=0.0):
    made = []
    for seed in range(seeds):
        source = random.Random(seed)
        for rate, batch in GRID:
            gap = batch * 0.01 + rate + noise * source.random()
            measures = {"sd": gap + noise * source.random(), "minus_batch": -float(batch)}
            settings = {"learning_rate": rate, "batch_size": batch, "depth": 4}
            made.append(Point(f"{seed}/{rate}/{batch}", measures, {"loss": gap}, settings, seed))
    return made


def test_with_enough_seeds_intervals_are_mean_over_seeds():
    result = compare(points(4, noise=0.3), given=["minus_batch"])
    assert (result.runs, result.seeds, result.intervals) == (36, 4, "Student over 4 seeds")
    row = result.of("sd", "loss")
    assert row.tau.count == 4
    assert row.tau.low < row.tau.value < row.tau.high
    assert set(row.psi) == {"learning_rate", "batch_size", "mean"}, "a setting that does not vary has no psi"
    taus = [
        stats.kendalltau([p.measures["sd"] for p in part], [p.gaps["loss"] for p in part]).statistic
        for part in ([p for p in points(4, noise=0.3) if p.seed == seed] for seed in range(4))
    ]
    assert row.tau.value == pytest.approx(sum(taus) / 4)
    assert set(row.given) == {"minus_batch"}
    assert result.of("minus_batch", "loss").given == {}
    alone = compare(points(4, noise=0.3), measures=["sd"], given=["minus_batch"])
    assert alone.rows == [row], "what is held fixed needs no row of its own"


def test_with_few_seeds_intervals_are_over_runs():
    result = compare(points(1))
    row = result.of("sd", "loss")
    assert result.intervals == "bootstrap over 9 runs"
    assert row.tau.value == pytest.approx(1.0)
    assert row.psi["learning_rate"].value == pytest.approx(1.0)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    batch_row = next(entry for entry in document["rows"] if entry["measure"] == "minus_batch")
    assert batch_row["psi"]["learning_rate"]["value"] is None


def test_rows_come_strongest_first_and_undefined_last():
    made = [Point(str(i), {"flat": 1.0, "weak": [1, 3, 2][i], "strong": -i}, {"loss": float(i)}) for i in range(3)]
    assert [row.measure for row in compare(made).rows] == ["strong", "weak", "flat"]


def test_points_survive_a_file(tmp_path):
    point = points(1)[0]
    point.save(tmp_path)
    assert Point.load(tmp_path) == point


def test_what_cannot_be_compared_is_refused(tmp_path):
    pair = points(1)[:2]
    with pytest.raises(DataError, match="at least two"):
        compare(pair[:1])
    with pytest.raises(DataError, match="not every run has the measure 'trace'"):
        compare(pair, measures=["trace"])
    with pytest.raises(DataError, match="share no gap"):
        compare([Point("a", {"sd": 1.0}, {}), Point("b", {"sd": 2.0}, {})])
    with pytest.raises(DataError, match="not every run has the measure 'trace'"):
        compare(pair, given=["trace"])
    with pytest.raises(DataError, match="NaN or infinite"):
        kendall_tau([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(DataError, match="one of each per run"):
        kendall_tau([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="'learning_rate' has 1 values"):
        granulated([1.0, 2.0], [1.0, 2.0], {"learning_rate": [0.1]})
    with pytest.raises(ConfigError, match=r"level=1\.5"):
        mean_over_seeds([1.0], level=1.5)
    with pytest.raises(ConfigError, match="resamples=0"):
        tau_of_runs([1.0, 2.0], [1.0, 2.0], resamples=0)
    with pytest.raises(CheckpointError, match=POINT_FILE):
        Point.load(tmp_path)
    (tmp_path / POINT_FILE).write_text('{"name": "x"')
    with pytest.raises(DataError, match="not a measured point"):
        Point.load(tmp_path)
    with pytest.raises(ConfigError, match="no row"):
        compare(pair).of("trace", "loss")
