"""The presets build what they say, from their seed alone."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError
from telltale.models.presets import PRESETS, build


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_shape_and_ties(name):
    model = build(name)
    preset = PRESETS[name]
    assert len(model.model.layers) == preset.layers
    assert model.config.hidden_size == preset.hidden_size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


def test_the_size_that_the_description_claims():
    count = sum(parameter.numel() for parameter in build("tiny").parameters())
    assert count == pytest.approx(1.7e6, rel=0.05)


def test_the_seed_decides_and_global_randomness_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = build("nano", seed=1), build("nano", seed=1), build("nano", seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_overrides_reach_the_configuration():
    model = build("nano", vocabulary_size=99, max_positions=77, num_key_value_heads=2)
    assert model.config.vocab_size == 99
    assert model.config.max_position_embeddings == 77
    assert model.model.layers[0].self_attn.k_proj.weight.shape[0] == 32


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ConfigError, match="nano, tiny, small"):
        build("huge")
