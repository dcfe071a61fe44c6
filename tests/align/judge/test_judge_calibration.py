"""The probability, "don't know", R2 beside its ceiling, and the range of features, each against a truth that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

from telltale.align.judge.calibration import abstention, calibrate, calibration_error, fitted_slope
from telltale.align.judge.feature_range import FeatureRange
from telltale.align.judge.fit_report import paired_difference
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.objective_quality import objective_quality, response_keys
from telltale.align.judge.prompt_split import COMPARE, STOP, TRAIN, split_prompts
from telltale.errors import DataError
from telltale.signals.statistics import clustered_mean, clustered_proportion


def pairs_of(count: int, margins: torch.Tensor, *, lengths: torch.Tensor | None = None) -> PairFeatures:
    """Pairs whose outcome is turned around by their votes where the margin says so."""
    chosen = torch.arange(count, dtype=torch.float32)[:, None]
    return PairFeatures(chosen, chosen + 0.5, chosen, torch.arange(count), lengths=lengths)


def drawn(count: int, slope: float, seed: int) -> torch.Tensor:
    """Margins of the better response where the truth is sigma(slope * margin)."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(size=count)
    first = rng.random(count) < special.expit(slope * margins)
    return torch.from_numpy(np.where(first, margins, -margins))


def test_the_slope_is_found_and_noise_has_none():
    votes = np.tile([1.0, 0.0], (20000, 1))
    assert fitted_slope(drawn(20000, 2.0, 0).numpy(), votes) == pytest.approx(2.0, abs=0.1)
    assert fitted_slope(drawn(20000, 0.0, 0).numpy(), votes) == pytest.approx(0.0, abs=0.05)
    assert fitted_slope(drawn(20000, -1.0, 0).numpy(), votes) == pytest.approx(0.0, abs=1e-3)
    assert fitted_slope(drawn(20000, -1.0, 0).numpy(), votes, signed=True) == pytest.approx(-1.0, abs=0.1)


def test_the_calibration_error_has_no_bias_of_small_bins():
    """Squares average to 0 for a calibrated judge, where the plain estimate has the bins' noise; and a real error is found."""
    rng = np.random.default_rng(0)
    squares, covered = [], 0
    for seed in range(100):
        sure = rng.uniform(0.5, 1.0, 300)
        found = calibration_error(sure, (rng.random(300) < sure).astype(float), np.arange(300), seed=seed)
        squares.append(found.value**2)
        covered += found.low == 0.0
    assert np.mean(squares) < 0.002  # clipped at 0, so not quite 0; the noise of a bin of 30 is 0.006
    assert covered >= 90
    wrong = calibration_error(np.full(4000, 0.9), (rng.random(4000) < 0.7).astype(float), np.arange(4000))
    assert wrong.value == pytest.approx(0.2, abs=0.03)
    assert wrong.low > 0.1
    assert math.isnan(calibration_error(sure[:30], sure[:30], np.arange(30)).value)


def test_answers_are_wrong_as_rarely_as_promised():
    """The truth is known: the share of seeds in which more than alpha of the answers are wrong is at most delta."""
    broken, answered = 0, []
    for seed in range(200):
        margins = drawn(400, 2.5, seed).numpy()
        found = abstention(np.abs(margins), (margins > 0).astype(float), np.arange(400), seed=seed)
        if found.threshold is not None:
            fresh = np.abs(np.random.default_rng(10**6 + seed).normal(size=20000))
            kept = fresh[fresh >= found.threshold]
            broken += float((1 - special.expit(2.5 * kept)).mean()) > 0.1
            answered.append(found.answered.value)
    assert broken <= 200 * 0.1 + 2 * math.sqrt(200 * 0.1 * 0.9)
    assert len(answered) > 100
    noise = drawn(300, 0.0, 0).numpy()
    nothing = abstention(np.abs(noise), (noise > 0).astype(float), np.arange(300))
    assert nothing.threshold is None
    assert nothing.answered.value == 0.0


def test_a_judge_that_is_no_better_than_length_is_told():
    margins = drawn(2000, 2.0, 1)
    lengths = torch.tensor([[20.0, 10.0]]).repeat(2000, 1)
    lengths[margins < 0] = lengths[margins < 0].flip(1)
    found = calibrate(margins, pairs_of(2000, margins), margins, pairs_of(2000, margins))
    assert found.gain["a constant"].low > 0.0
    assert not found.warnings
    same = pairs_of(2000, margins, lengths=lengths)
    other = calibrate(margins, same, margins.sign() * 0.01, same)
    assert any("length alone" in told for told in other.warnings)
    assert found.to_config()["slope"] == pytest.approx(2.0, abs=0.4)


def test_r2_stands_beside_the_ceiling_of_repeated_ratings():
    """Half of the labels' variance is noise between raters, so the best prediction explains half."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randn(1000, 8, generator=generator).repeat_interleave(2, 0)
    truth = responses @ torch.randn(8, generator=generator).div(8**0.5)
    truth = truth / truth.std()
    labels = (truth + torch.randn(2000, generator=generator))[:, None].double()
    groups = torch.arange(2000) // 4
    held_out = groups % 3 == 0
    found = objective_quality(
        ["a"], truth[:, None], labels, groups, held_out, keys=response_keys(responses * (1 + 1e-7))
    )["a"]
    assert found.repeats == 1000
    assert found.ceiling == pytest.approx(0.5, abs=0.05)
    assert found.r2.value == pytest.approx(0.5, abs=0.06)
    assert found.r2.low < 0.5 < found.r2.high
    worse = objective_quality(["a"], -truth[:, None], labels, groups, held_out)["a"]
    assert worse.ceiling is None
    assert "worse than by its mean" in worse.warnings("a")[0]


def test_responses_away_from_the_fit_are_told():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    inside, held_out, fresh = (torch.randn(n, 64, generator=generator) @ mixing for n in (3000, 1000, 3000))
    found = FeatureRange.fitted(inside, held_out)
    assert float(found.outside(fresh).double().mean()) == pytest.approx(0.01, abs=0.01)
    assert float(found.distance(fresh).mean()) == pytest.approx(1.0, abs=0.1)
    assert bool(found.outside(fresh[:5] * 6).all())
    other = torch.randn(50, 64, generator=generator) * fresh.std()  # as large, in other directions
    assert bool(found.outside(other).all())
    with pytest.raises(DataError, match="expected three and one at least"):
        FeatureRange.fitted(inside[:2], held_out)


def test_prompts_are_divided_once_and_both_kinds_have_their_share():
    preferred, rated = torch.arange(0, 1000), torch.arange(500, 2000)
    split = split_prompts(preferred, [rated], 0.2, seed=3)
    for groups in (preferred, rated, torch.arange(500, 1000)):
        part = split.part_of(groups)
        assert float((part == COMPARE).double().mean()) == pytest.approx(0.2, abs=0.01)
        assert float((part == STOP).double().mean()) == pytest.approx(0.16, abs=0.01)
        assert bool((part == TRAIN).any())
    again = split_prompts(preferred.flip(0), [rated], 0.2, seed=3)
    assert torch.equal(split.compare, again.compare)
    with pytest.raises(DataError, match="expected at least three"):
        split_prompts(torch.tensor([1, 1, 2]), [], 0.2, seed=0)


def test_intervals_count_clusters():
    """Copies of a row in its cluster are no new evidence; a mean over one-row clusters is Student's."""
    rng = np.random.default_rng(0)
    values, names = rng.random(60), np.arange(60)
    plain, copied = (clustered_mean(np.repeat(values, n), np.repeat(names, n)) for n in (1, 7))
    assert (plain.low, plain.high) == pytest.approx((copied.low, copied.high))
    assert plain.count == copied.count == 60
    right = (values > 0.4).astype(float)
    narrow, wide = clustered_proportion(right, names), clustered_proportion(np.repeat(right, 7), np.repeat(names, 7))
    assert wide.high - wide.low == pytest.approx(narrow.high - narrow.low, rel=0.03)
    assert clustered_proportion(np.ones(20), np.arange(20)).low == pytest.approx(0.025 ** (1 / 20))
    assert math.isnan(clustered_mean([0.5, 0.7], [1, 1]).low)


def test_a_few_pairs_that_are_all_right_give_no_certainty():
    for count in (1, 3, 10):
        margins = np.linspace(0.5, 1.5, count)
        slope = fitted_slope(margins, np.tile([1.0, 0.0], (count, 1)))
        assert 0.5 < special.expit(slope * margins.mean()) < 1 - 0.3 / count
    assert fitted_slope(np.zeros(5), np.tile([1.0, 0.0], (5, 1))) == 0.0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_prompts_that_agree_are_no_proof(count):
    """Equal differences have no variance, so that Student's interval is a point: two prompts once shipped a gate."""
    found = paired_difference(np.ones(count), np.arange(count))
    assert found.low < 0.0 < found.value <= found.high
    none = paired_difference(np.zeros(count), np.arange(count))
    assert none.low < -0.5
    assert none.high > 0.5


def test_many_prompts_keep_students_interval():
    values = np.repeat([1.0, 0.0, -1.0], [30, 60, 5])
    assert paired_difference(values, np.arange(95)) == clustered_mean(values, np.arange(95))
