"""From signals to a score: what may raise it, what it may not look at, and who passes as the threshold rises."""

from __future__ import annotations

import math
import random

import pytest

from telltale.decode.results import StepSignals
from telltale.decode.step_verified import Normaliser, Scale, StepVerifiedConfig
from telltale.decode.verification import score_of

SCALES = {
    "minmax": Normaliser("minmax", Scale(-4.0, -0.2), Scale(0.1, 0.9)),
    "ecdf": Normaliser("ecdf", Scale(-4.0, -0.2, (-3.0, -2.0, -2.0, -0.5)), Scale(0.1, 0.9, (0.2, 0.4, 0.6, 0.8))),
}


def reading(rng: random.Random) -> StepSignals:
    length = rng.randint(1, 12)
    return StepSignals(
        tuple(math.log(rng.random()) for _ in range(length)), (), tuple(rng.random() for _ in range(length))
    )


def score(config: StepVerifiedConfig, one: StepSignals) -> float:
    return score_of(config, one, None, 1.0, history={})


@pytest.mark.parametrize("kind", SCALES)
def test_fewer_steps_pass_as_the_threshold_rises(kind):
    rng = random.Random(0)
    recorded = [reading(rng) for _ in range(200)]
    counts = []
    for threshold in (-math.inf, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, math.inf):
        config = StepVerifiedConfig(threshold=threshold, normaliser=SCALES[kind])
        counts.append(sum(config.accepts(score(config, one)) for one in recorded))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (200, 0)
    assert len(set(counts)) > 4


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("how", ["min", "mean", "sum", "q10", "group"])
def test_a_less_likely_token_never_raises_a_score(kind, how):
    rng = random.Random(1)
    config = StepVerifiedConfig(normaliser=SCALES[kind], beta=0.5, log_probability_reduce=how)
    fell = 0
    for _ in range(300):
        one = reading(rng)
        place = rng.randrange(len(one.log_probabilities))
        lower = list(one.log_probabilities)
        lower[place] -= 3 * rng.random()
        before, after = score(config, one), score(config, StepSignals(tuple(lower), (), one.groundings))
        assert after <= before + 1e-12
        fell += after < before
    assert fell


def test_a_weight_of_nothing_needs_no_signal():
    rng = random.Random(2)
    for _ in range(50):
        one, other = reading(rng), reading(rng)
        only_log = StepVerifiedConfig(beta=1.0)
        only_ground = StepVerifiedConfig(beta=0.0)
        bare_log = StepSignals(one.log_probabilities, (), ())
        bare_ground = StepSignals((), (), one.groundings)
        assert score(only_log, one) == score(only_log, bare_log)
        assert score(only_log, one) == score(only_log, StepSignals(one.log_probabilities, (), other.groundings))
        assert score(only_ground, one) == score(only_ground, bare_ground)
