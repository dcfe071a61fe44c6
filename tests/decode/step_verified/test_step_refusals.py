"""What a user can get wrong that would otherwise end in a trace, or in steps accepted for no reason."""

from __future__ import annotations

import math

import pytest
import torch

from decode.step_verified import pairs
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.step_verified import Normaliser, Scale
from telltale.errors import ConfigError, DataError, NumericalError


@pytest.fixture(scope="module")
def models():
    return pairs.target(), pairs.draft()


def generated(models, *, verifier=None, new=12, stop=None, temperature=0.0, **config):
    guard = StepVerified(*models, pairs.tokenizer(), StepVerifiedConfig(**config), verifier=verifier)
    arguments = {"max_new_tokens": new, "eos_token_id": [], "generator": pairs.seeded(1), "stop_strings": stop}
    return guard.generate(pairs.prompts(3), temperature=temperature, **arguments)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"normaliser": "ecdf"}, "normaliser='ecdf'"),
        ({"renormalise": "maybe"}, "renormalise='maybe'"),
        ({"record_signals": 1}, "record_signals=1"),
        ({"encoder": ["hashed"]}, "encoder="),
        ({"debias": "position-ecdf", "position_quantiles": 3}, "position_quantiles"),
        ({"debias": "position-ecdf", "position_quantiles": ((0.1,), ())}, "position_quantiles"),
        ({"score": "agreement", "candidates": 1}, "score='agreement' compares candidates"),
        ({"normaliser": Normaliser("group"), "policy": "verifier"}, "policy='verifier'"),
    ],
)
def test_fields_of_another_kind_are_refused_by_name(fields, named):
    with pytest.raises(ConfigError, match=named):
        StepVerifiedConfig(**fields)


def test_scales_of_words_are_refused():
    with pytest.raises(ConfigError, match="low='a'"):
        Scale("a", 1.0)


def test_what_is_no_config_tokenizer_or_verifier_is_refused(models):
    class Mute:
        def decode(self, tokens, **_):
            return ""

    with pytest.raises(ConfigError, match="config is a dict"):
        StepVerified(*models, pairs.tokenizer(), {})
    with pytest.raises(DataError, match="tokenizer is a Mute"):
        StepVerified(*models, Mute())
    with pytest.raises(ConfigError, match="verifier is a int"):
        generated(models, policy="verifier", verifier=5)
    with pytest.raises(DataError, match="the verifier gave NoneType"):
        generated(models, policy="verifier", verifier=lambda steps: None, max_step_tokens=2)
    with pytest.raises(ConfigError, match="stop_strings=5"):
        generated(models, stop=5)


@pytest.mark.parametrize("config", [{"score": "agreement"}, {"normaliser": Normaliser("group")}])
def test_comparing_candidates_where_there_is_one_is_refused_not_passed(models, config):
    """One candidate agrees with itself, and its extremes are itself: every step would pass, or none."""
    with pytest.raises(ConfigError, match="temperature=0 leaves one"):
        generated(models, **config)
    generated(models, temperature=1.0, candidates=2, **config)
    guard = StepVerified(*models, pairs.tokenizer(), StepVerifiedConfig(**config))
    [row] = guard.rows(guard.request([[1, 2]], max_new_tokens=4, temperature=1.0))
    row.greedy = True
    with pytest.raises(ConfigError, match="temperature=0 leaves one"):
        guard.engine().admit(row)


def test_nothing_reaches_a_threshold_of_infinity(models):
    def certain(steps):
        return [math.inf] * len(steps)

    settings = {"verifier": certain, "policy": "verifier", "threshold": math.inf, "temperature": 1.0, "candidates": 1}
    result = generated(models, **settings)
    assert result.stats.accepted_steps == result.stats.rejected_steps == result.stats.draft_passes == 0
    assert result.stats.target_steps > 0
    recorded = generated(models, **settings, record_signals=True)
    assert recorded.stats.accepted_steps == 0
    assert recorded.stats.rejected_steps > 0
    hopeless = generated(
        models, verifier=lambda steps: [-math.inf] * len(steps), policy="verifier", threshold=-math.inf
    )
    assert hopeless.stats.accepted_steps > 0


@pytest.mark.parametrize("broken", ["target", "draft"])
@pytest.mark.parametrize("policy", ["specguard", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_overflow_are_refused_with_the_place(broken, policy, temperature):
    """A logit of +inf would be everybody's first choice."""
    pair = [pairs.target(tie_word_embeddings=False), pairs.draft(tie_word_embeddings=False)]
    with torch.no_grad():
        head = pair[broken == "draft"].lm_head.weight
        head[:3] = 3e38 * torch.tensor([1.0, -1.0, 1.0])[:, None] * torch.eye(1, head.shape[1])
    threshold = -math.inf if broken == "draft" else math.inf
    with pytest.raises(NumericalError, match=f"the {broken}'s logits are (NaN or )?infinite in step . of prompt ."):
        generated(pair, policy=policy, threshold=threshold, beta=1.0, temperature=temperature, new=30)
