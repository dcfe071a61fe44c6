"""Families are read by structure, and decoded on every backend as their own ``generate`` does, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.utils import logging

from families import FAMILIES, LENGTHS, checked, made
from telltale.errors import UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.arithmetic import turns_neighbours, unknown_reason
from telltale.models.backends.native.pointers import norm_kind
from telltale.models.families import parts_of

LISTED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "GPT2", "GPTNeoX")
"""Tested in test_backends.py."""
OWN_LAYERS = {"Qwen3Moe", "Mixtral", "GptOss", "OPT", "Falcon"}
"""Families that only the module backend serves."""


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LISTED])
def test_rows_of_a_batch_are_what_the_family_gives(name):
    model = made(name, FAMILIES[name][0], seed=11)
    backend = "module" if name in OWN_LAYERS else "native"
    assert open_decoder(model).backend == backend
    bounded = "sliding_window" in FAMILIES[name][0]
    found = checked(model, backend, seed=5, bounded=bounded)
    assert set(found.values()) == {True}, found


@pytest.mark.long
@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Olmo2", "Granite", "Cohere2", "Glm4", "Starcoder2"])
def test_the_fused_backend_knows_the_same_arithmetic(name):
    assert set(checked(made(name, FAMILIES[name][0], seed=12), "fused", seed=6, bounded=True).values()) == {True}


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "StableLm", "Olmo3"])
def test_bfloat16_rounds_as_the_family_does(name):
    model = made(name, FAMILIES[name][0], seed=13).to(torch.bfloat16)
    assert open_decoder(model).backend == "native"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Gemma2", "Olmo2", "Cohere2", "Starcoder2"])
def test_a_token_has_the_same_bits_at_every_width(name, dtype):
    decoder = open_decoder(made(name, FAMILIES[name][0], seed=14).to(dtype), backend="native", threads=2)
    ids = torch.randint(97, (1, 15), generator=torch.Generator().manual_seed(1))

    def states(width):
        cache = decoder.new_cache(1, 15)
        return torch.cat([decoder.forward(ids[:, at : at + width], cache, [at]) for at in range(0, 15, width)], 1)

    wanted = states(1)
    assert all(torch.equal(states(width), wanted) for width in (2, 4, 15))
    assert torch.equal(decoder.logits(wanted)[:, 3], decoder.logits(wanted[:, 3]))


def test_what_has_no_role_is_named():
    layer = made("Llama", {}, seed=0).model.layers[0]
    assert unknown_reason(layer) is None
    layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert unknown_reason(layer) == "sinks of a LlamaAttention has no known role"
    layer = made("Llama", {}, seed=0).model.layers[0]
    layer.pre_norm = torch.nn.LayerNorm(32)
    assert "order of its norms (input_layernorm, post_attention_layernorm, pre_norm)" in str(unknown_reason(layer))
    experts = made("Mixtral", FAMILIES["Mixtral"][0], seed=0).model.layers[0]
    assert "MixtralSparseMoeBlock" in str(unknown_reason(experts))


def test_norms_of_heads_by_modules_are_left_to_the_family():
    decoder = open_decoder(made("StableLm", {"qk_layernorm": True}, seed=0))
    assert decoder.backend == "module"
    assert "StableLmAttention" in decoder.backend_reason


def test_what_a_short_prompt_cannot_show_is_refused_by_name():
    layer = made("Olmo", {"clip_qkv": 8.0}, seed=0).model.layers[0]
    assert "clips queries, keys and values" in str(unknown_reason(layer))
    assert unknown_reason(made("Olmo", {}, seed=0).model.layers[0]) is None
    rope = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    scaled = made("Ministral3", {"head_dim": 8, "rope_parameters": rope | {"llama_4_scaling_beta": 0.1}}, seed=0)
    assert "looks at positions beside its rotary embeddings" in open_decoder(scaled).backend_reason


def test_a_norm_that_does_not_use_its_epsilon_is_found_out():
    module = transformers.models.llama.modeling_llama.LlamaRMSNorm(24, eps=1e-5)
    assert norm_kind(module) is not None
    module.forward = lambda x: module.weight * x / x.square().mean(-1, keepdim=True).sqrt()
    assert norm_kind(module) is None


def test_a_family_that_departs_from_its_modules_is_found_out():
    model = made("Olmo2", {}, seed=0)
    own = type(model.model.layers[2]).forward

    def steered(hidden_states, *arguments, **options):
        return own(model.model.layers[2], hidden_states * 1.01, *arguments, **options)

    model.model.layers[2].forward = steered
    for backend in ("native", "fused"):
        with pytest.raises(UnsupportedModelError, match="its logits differ"):
            open_decoder(model, backend=backend)
    assert open_decoder(model).backend == "module"


def test_which_lanes_turn_is_asked_of_the_family():
    assert not turns_neighbours(made("Llama", {}, seed=0).model.layers[0])
    assert turns_neighbours(made("Cohere", {}, seed=0).model.layers[0])


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (transformers.models.llama.modeling_llama.LlamaRMSNorm, (False, False)),
        (transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm, (False, True)),
        (torch.nn.LayerNorm, (True, False)),
        (transformers.models.nemotron.modeling_nemotron.NemotronLayerNorm1P, (True, True)),
    ],
)
def test_the_formula_of_a_norm_is_found_by_what_it_gives(norm, kind):
    module = norm(24, eps=1e-3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = norm_kind(module)
    assert (found.centres, found.adds_one, found.epsilon) == (*kind, 1e-3)
    module.forward = lambda x: x.tanh()
    assert norm_kind(module) is None


def test_prompts_lie_on_both_sides_of_every_window():
    windows = {
        option["sliding_window"] for options in FAMILIES.values() for option in options if option.get("sliding_window")
    }
    assert all(min(LENGTHS) < window < max(LENGTHS) for window in windows)


def test_a_recurrent_family_is_refused_with_the_reason():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_decoder(transformers.MambaForCausalLM(config).eval())


def test_a_bias_by_distance_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match=r"bias by distance \(alibi\)"):
        open_decoder(made("Falcon", {"alibi": True}, seed=0))


def test_rotary_embeddings_by_length_are_refused_by_name():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match=r"'olmo2' depend on the length of the text \(dynamic\)"):
        open_decoder(made("Olmo2", {"rope_parameters": rope}, seed=0))


def test_training_takes_the_families_of_the_table_only():
    with pytest.raises(UnsupportedModelError, match="'mixtral' is not supported"):
        parts_of(made("Mixtral", FAMILIES["Mixtral"][0], seed=0))
