"""The latency model's arithmetic, and that measuring costs is repeatable and leaves the models as they were."""

from __future__ import annotations

import math

import pytest

from decode.step_verified import pairs
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.costs_report import StepCosts, measure_costs
from telltale.errors import ConfigError


def test_the_model_is_the_formula():
    costs = StepCosts(draft=0.2, draft_inflation=1.3, verify=0.12, fallback_inflation=1.0)
    assert costs.speedup(0.8) == pytest.approx(1 / (0.2 * 1.3 + 0.12 + 0.2))
    assert costs.speedup(costs.break_even) == pytest.approx(1.0)
    assert costs.break_even == pytest.approx(0.38)
    assert StepCosts(0.9, 1.5, 0.2, 1.0).break_even > 1
    with pytest.raises(ConfigError, match="acceptance_rate"):
        costs.speedup(1.5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "config", [{"candidates": 3}, {"signal_model": "target", "candidates": 1, "fallback": "plain"}]
)
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_costs_of_two_models_and_of_one_in_both_roles(own, config):
    draft = None if own else pairs.draft()
    extra = {"exit_layer": 2} if own else {}
    guard = StepVerified(pairs.target(), draft, pairs.tokenizer(), StepVerifiedConfig(**config, **extra))
    costs = measure_costs(guard, prompt_tokens=40, step_tokens=6)
    assert 0 < costs.draft < 5
    assert (costs.draft_inflation == 1.0) == (config["candidates"] == 1)
    assert (costs.verify > 0) == ("signal_model" in config)
    assert (costs.fallback_inflation == 1.0) == (config.get("fallback") == "plain")
    assert math.isfinite(costs.speedup(0.5))
    assert costs.target_seconds > 0


def test_sizes_beyond_the_models_positions_are_refused():
    guard = StepVerified(pairs.target(), pairs.draft(), pairs.tokenizer())
    with pytest.raises(ConfigError, match="positions"):
        measure_costs(guard, prompt_tokens=120, step_tokens=30)
    with pytest.raises(ConfigError, match="step_tokens"):
        measure_costs(guard, prompt_tokens=4, step_tokens=0)
