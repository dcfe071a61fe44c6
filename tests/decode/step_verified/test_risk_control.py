"""The promises of the thresholds, on made-up scores and labels whose law is known: they hold on average, and are not empty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from telltale.decode.calibration.risk import (
    Descent,
    Judged,
    _tails,
    clopper_pearson,
    conformal_threshold,
    drop_p_value,
    fixed_sequence,
    mean_p_value,
    realised_risk,
)
from telltale.errors import ConfigError, DataError

ALPHA = 0.1


def problem(rng, steps=5):
    """Steps of one problem share its difficulty; wrong ones score lower, with overlap. One in ten is never accepted."""
    difficulty = rng.normal()
    wrong = rng.random(steps) < 1 / (1 + np.exp(1.0 - difficulty))
    scores = rng.normal(size=steps) - 1.2 * wrong + 0.4 * rng.normal()
    scores[rng.random(steps) < 0.1] = np.nan
    return Judged(tuple(map(float, scores)), tuple(map(bool, wrong)))


def brute(problems, alpha, loss):
    seen = sorted({s for p in problems for s in p.scores if not math.isnan(s)})
    for tau in seen:
        risk = sum(p.loss(tau, loss) for p in problems) / len(problems)
        if (len(problems) * risk + 1) / (len(problems) + 1) <= alpha + 1e-12:
            return tau
    return math.inf


@pytest.mark.parametrize("loss", ["mean", "any"])
def test_the_threshold_is_the_smallest_score_whose_bound_is_at_most_alpha(loss):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        problems = [problem(rng, steps=int(rng.integers(0, 7))) for _ in range(30)]
        found = conformal_threshold(problems, alpha=ALPHA, loss=loss)
        assert found.threshold == brute(problems, ALPHA, loss)
        if found.threshold < math.inf:
            assert found.risk == pytest.approx(np.mean([p.loss(found.threshold, loss) for p in problems]))


def test_an_alpha_below_one_in_n_plus_one_accepts_nothing():
    right = [Judged((0.9,), (False,)) for _ in range(19)]
    assert conformal_threshold(right, alpha=0.05).threshold == 0.9
    assert conformal_threshold(right[1:], alpha=0.05).threshold == math.inf
    descent = Descent(alpha=0.05)
    assert descent.feasible(19)
    assert not descent.feasible(18)
    assert not descent.try_at(0.5, [0.0] * 18, acceptance=1.0)
    assert descent.threshold == math.inf


@pytest.mark.long
@pytest.mark.parametrize("loss", ["mean", "any", "one"])
def test_over_many_draws_the_loss_of_a_new_problem_is_at_most_alpha_on_average(loss):
    losses, thresholds = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = conformal_threshold([problem(rng) for _ in range(60)], alpha=ALPHA, loss=loss, rng=rng)
        thresholds.append(found.threshold)
        kind = "mean" if loss == "one" else loss
        losses.append(np.mean([problem(rng).loss(found.threshold, kind) for _ in range(40)]))
    error = np.std(losses) / len(losses) ** 0.5
    assert np.mean(losses) <= ALPHA + 3 * error
    # Not by accepting nothing: theorem 2 of the paper puts the mean above alpha - 2/(n + 1), up to the jump of one score.
    assert np.mean(losses) > ALPHA - 2 / 61 - 0.02
    assert np.isfinite(thresholds).all()


class Misled:
    """A problem whose drafts go wrong more often, and look no worse, once a wrong step has been accepted."""

    def __init__(self, rng):
        self.uniforms = rng.random((6, 2))

    def run(self, threshold):
        """What a policy at ``threshold`` drafts."""
        misled, scores, wrong = False, [], []
        for bad, noise in self.uniforms:
            is_wrong = bad < (0.7 if misled else 0.15)
            score = noise if misled or not is_wrong else noise - 0.45
            scores.append(float(score))
            wrong.append(bool(is_wrong))
            misled |= is_wrong and score >= threshold
        return Judged(tuple(scores), tuple(wrong))

    def on_true_prefixes(self):
        """What the draft writes behind steps that are all right: the usual way to record."""
        return self.run(math.inf)


@pytest.mark.long
def test_descending_on_the_policys_own_prefixes_keeps_the_promise_that_true_prefixes_break():
    grid = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    ours, theirs, acceptances = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        problems = [Misled(rng) for _ in range(60)]
        descent = Descent(alpha=ALPHA)
        for tau in grid:
            if not descent.try_at(tau, [one.run(tau).loss(tau) for one in problems], acceptance=0.0):
                break
        offline = conformal_threshold([one.on_true_prefixes() for one in problems], alpha=ALPHA).threshold
        fresh = [Misled(rng) for _ in range(40)]
        ours.append(np.mean([one.run(descent.threshold).loss(descent.threshold) for one in fresh]))
        theirs.append(np.mean([one.run(offline).loss(offline) for one in fresh]))
        acceptances.append(
            np.mean([s >= descent.threshold for one in fresh for s in one.run(descent.threshold).scores])
        )
    assert np.mean(ours) <= ALPHA + 3 * np.std(ours) / len(ours) ** 0.5
    assert np.mean(acceptances) > 0.3
    assert np.mean(theirs) > ALPHA + 0.02


def test_a_descent_ends_at_the_first_threshold_that_fails_and_counts_the_worst_so_far():
    descent = Descent(alpha=0.2)
    assert descent.try_at(0.9, [0.0] * 8 + [1.0, 0.0], acceptance=0.2)
    assert descent.tried[0].bound == pytest.approx(2 / 11)
    assert not descent.try_at(0.8, [1.0] + [0.0] * 9, acceptance=0.4)
    assert descent.tried[1].risk == pytest.approx(0.1)
    assert descent.tried[1].bound == pytest.approx(3 / 11)
    assert not descent.try_at(0.7, [0.0] * 10, acceptance=0.5)
    assert descent.threshold == 0.9
    with pytest.raises(DataError, match="descent"):
        descent.try_at(0.75, [0.0] * 10, acceptance=0.5)


@pytest.mark.long
def test_the_drop_p_value_is_valid_at_the_edge_and_gets_small_away_from_it():
    rng = np.random.default_rng(0)
    tolerance = 0.08
    for better in (0.0, 0.05, 0.2):
        law = [better, 1 - 2 * better - tolerance, better + tolerance]
        draws = rng.choice([-1, 0, 1], p=law, size=(1500, 120))
        found = np.array([drop_p_value(draw, tolerance) for draw in draws])
        for level in (0.05, 0.1):
            hits = (found <= level).mean()
            assert hits <= level + 3 * (level * (1 - level) / len(found)) ** 0.5
    same = rng.choice([-1, 0, 1], p=[0.05, 0.9, 0.05], size=(200, 250))
    assert np.mean([drop_p_value(draw, tolerance) <= 0.1 for draw in same]) > 0.8
    assert drop_p_value([0] * 200, 0.08) < 0.01
    assert drop_p_value([1] * 20, 0.08) == 1.0


def test_tails_are_those_of_the_sum():
    for up, down in ((0.3, 0.1), (0.0, 0.2), (0.5, 0.5)):
        law = np.array([down, 1 - up - down, up])
        whole = np.array([1.0])
        for _ in range(7):
            whole = np.convolve(whole, law)
        for net in range(-7, 8):
            found = _tails(7, net, np.array([up]), np.array([down]))[0]
            assert found == pytest.approx(whole[: net + 8].sum(), abs=1e-12)


def test_without_wins_the_drop_p_value_is_a_binomial_tail():
    # With one-sided disagreement the largest tail has no wins of the policy: 3 losses in 100 against 10%.
    differences = [1] * 3 + [0] * 97
    assert drop_p_value(differences, 0.1) >= binom.cdf(3, 100, 0.1)
    assert drop_p_value(differences, 0.1) < 3 * binom.cdf(3, 100, 0.1) + 0.02


@pytest.mark.parametrize("binary", [True, False])
def test_the_mean_p_value_is_valid(binary):
    rng = np.random.default_rng(1)
    draws = rng.random((2000, 80)) < ALPHA if binary else rng.beta(0.2, 1.8, size=(2000, 80))
    found = np.array([mean_p_value(draw.astype(float), ALPHA) for draw in draws])
    assert (found <= 0.1).mean() <= 0.1 + 3 * 0.007
    assert mean_p_value([0.0] * 80, ALPHA) < 0.01


def test_fixed_sequence_testing_stops_at_the_first_that_is_not_shown():
    assert fixed_sequence([0.01, 0.05, 0.2, 0.001], level=0.1) == [0, 1]
    assert fixed_sequence([0.5, 0.0], level=0.1) == []


def test_clopper_pearson_is_the_textbooks_and_covers():
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.30850), abs=1e-5)
    assert clopper_pearson(10, 10) == pytest.approx((0.69150, 1.0), abs=1e-5)
    assert clopper_pearson(3, 10) == pytest.approx((0.06674, 0.65245), abs=1e-5)
    for p in (0.03, 0.4):
        covered = sum(
            binom.pmf(k, 40, p) for k in range(41) if clopper_pearson(k, 40)[0] <= p <= clopper_pearson(k, 40)[1]
        )
        assert covered >= 0.95


def test_realised_risk_counts_accepted_and_wrong_per_problem():
    problems = [
        Judged((0.9, 0.8, 0.1, math.nan), (False, True, True, True)),
        Judged((0.9, 0.9), (False, False)),
        Judged((), ()),
        Judged((0.7,), (True,)),
    ]
    found = realised_risk(problems, 0.7)
    assert found.rate == pytest.approx((1 / 4 + 0 + 0 + 1) / 4)
    assert (found.steps, found.accepted, found.problems) == (7, 5, 4)
    assert found.pooled == pytest.approx(2 / 7)
    assert found.wrong_among_accepted == pytest.approx(2 / 5)
    assert found.low <= found.rate <= found.high
    assert realised_risk(problems, 0.7, loss="any").rate == 0.5
    assert realised_risk(problems, math.inf).wrong_among_accepted is None


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="no problems"):
        conformal_threshold([], alpha=0.1)
    with pytest.raises(ConfigError, match="alpha"):
        conformal_threshold([Judged((), ())], alpha=1.5)
    with pytest.raises(ConfigError, match="loss"):
        conformal_threshold([Judged((), ())], alpha=0.5, loss="worst")
    with pytest.raises(DataError, match="rng"):
        conformal_threshold([Judged((), ())], alpha=0.5, loss="one")
    with pytest.raises(DataError, match="labels"):
        Judged((0.1,), ())
    with pytest.raises(DataError, match="expected for at least one problem"):
        drop_p_value([2], 0.1)
    with pytest.raises(DataError, match="successes"):
        clopper_pearson(3, 2)
