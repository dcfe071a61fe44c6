"""Which backend serves which model, what is refused and why, and that the live model is left as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from models.tiny_models import LLAMA_SHAPE, tiny_model
from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.backends.fused import FusedDecoder
from telltale.models.open import disagreement
from telltale.train import layerskip

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 20,
}


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_rope(kind: str, **fields) -> nn.Module:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **fields}
    return tiny_model("llama", rope_parameters=rope)


def test_auto_takes_the_fastest_that_can_be_had():
    decoder = open_decoder(tiny_model("llama"))
    assert decoder.backend == "native"
    decoder = open_decoder(tiny_model("llama", dtype=torch.float16))
    assert decoder.backend == "fused"
    assert "native: the weights are torch.float16" in decoder.backend_reason
    decoder = open_decoder(tiny_model("gpt2"))
    assert decoder.backend == "module"
    assert "fused: family 'gpt2': a GPT2Block has no self_attn and mlp" in decoder.backend_reason


def test_without_a_compiler_auto_steps_down_and_says_so(monkeypatch):
    monkeypatch.setattr("telltale.models.open.native_unavailable_reason", lambda model: "no C++ compiler was found")
    decoder = open_decoder(tiny_model("llama"))
    assert decoder.backend == "fused"
    assert decoder.backend_reason == "native: no C++ compiler was found"
    with pytest.raises(UnsupportedModelError, match="no C\\+\\+ compiler"):
        open_decoder(tiny_model("llama"), backend="native")


@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_a_backend_asked_for_by_name_is_the_one_used(backend):
    decoder = open_decoder(tiny_model("llama"), backend=backend)
    assert (decoder.backend, decoder.backend_reason) == (backend, "chosen by name")


@pytest.mark.parametrize("backend", ["native", "fused"])
def test_a_backend_asked_for_by_name_is_never_replaced(backend):
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        open_decoder(tiny_model("gpt_neox"), backend=backend)


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(ConfigError, match="auto, native, fused, module"):
        open_decoder(tiny_model("llama"), backend="cuda")


def test_a_family_whose_layers_cannot_be_run_one_by_one_is_refused_by_name():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=97)
    )
    with pytest.raises(UnsupportedModelError, match="this bloom model cannot be decoded layer by layer"):
        open_decoder(model.eval())


def test_an_encoder_decoder_is_refused_as_such():
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=97)
    with pytest.raises(NotImplementedError, match="'t5' is an encoder-decoder"):
        open_decoder(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), transformers.LlamaModel(transformers.LlamaConfig(**LLAMA_SHAPE))])
def test_what_is_no_causal_lm_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="causal LM"):
        open_decoder(model)


def test_a_layer_that_computes_something_else_is_found_out():
    model = tiny_model("llama")
    own = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda x: 1.5 * own(x)
    for backend in ("native", "fused"):
        with pytest.raises(UnsupportedModelError, match="differ from the family's own forward"):
            open_decoder(model, backend=backend)
    decoder = open_decoder(model)
    assert decoder.backend == "module"
    assert "native: its logits differ" in decoder.backend_reason
    assert disagreement(decoder) is None


def test_an_adapted_layer_is_left_to_the_module_backend():
    class Adapted(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[3].self_attn.v_proj = Adapted(32, 16, bias=False)
    assert open_decoder(model).backend == "module"
    with pytest.raises(UnsupportedModelError, match=r"3\.self_attn\.v_proj is a Adapted"):
        open_decoder(model, backend="fused")


def test_attention_that_takes_no_mask_is_refused():
    model = tiny_model("gpt2")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        open_decoder(model, backend="module")


@pytest.mark.parametrize("name", ["llama-biased", "phi3"])
def test_weights_are_read_where_the_model_has_them(name):
    decoder = FusedDecoder(tiny_model(name))
    owned = {parameter.untyped_storage().data_ptr() for parameter in decoder.model.parameters()}
    for weights in decoder.weights:
        for role in ("query", "key", "value", "output", "gate", "up", "down", "query_key_value", "gate_up"):
            projection = getattr(weights, role)
            if projection is not None:
                tensors = [projection.weight, *([] if projection.bias is None else [projection.bias])]
                assert {tensor.untyped_storage().data_ptr() for tensor in tensors} <= owned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_weights_changed_in_place_are_noticed(backend, dtype):
    model, ids = tiny_model("qwen2", dtype=dtype), token_ids(1, 6)
    decoder = open_decoder(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    given = decoder.forward(ids, decoder.new_cache(1, 6), [0])
    fresh = open_decoder(model, backend=backend)
    assert torch.equal(given, fresh.forward(ids, fresh.new_cache(1, 6), [0]))


@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_a_model_that_was_converted_needs_a_new_decoder(backend):
    model = tiny_model("llama")
    decoder = open_decoder(model, backend=backend)
    model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="open a new decoder"):
        decoder.new_cache(1, 4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", ["auto", "module"])
def test_train_mode_warns_computes_without_dropout_and_stays(name, backend):
    dropout = {"attention_dropout": 0.5} if name == "llama" else {"resid_pdrop": 0.5, "attn_pdrop": 0.5}
    model, ids = tiny_model(name, **dropout), token_ids(2, 7)
    quiet = open_decoder(model, backend=backend)
    wanted = quiet.forward(ids, quiet.new_cache(2, 7), [0, 0])
    model.train()
    frozen = quiet.parts.layers[1]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    with pytest.warns(UserWarning, match="train mode"):
        decoder = open_decoder(model, backend=backend)
    assert torch.equal(decoder.forward(ids, decoder.new_cache(2, 7), [0, 0]), wanted)
    assert [module.training for module in model.modules()] == modes


def test_eval_mode_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_decoder(tiny_model("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_model_and_configuration_stay_as_they_were_even_after_an_error(name):
    model = tiny_model(name)
    config, state = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = open_decoder(model, backend="module")
    cache = decoder.new_cache(1, 8)
    with pytest.raises(RuntimeError):
        decoder.run(torch.zeros(1, 2, 31), 0, 2, cache, [0])
    decoder.forward(token_ids(1, 4), cache, [0])
    assert all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(input_ids=token_ids(1, 4), labels=token_ids(1, 4)).loss.backward()


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_static_rotary_scaling_works_everywhere(kind, backend):
    fields = {"factor": 4.0, "original_max_position_embeddings": 32}
    fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model, ids = with_rope(kind, **fields), token_ids(1, 70)
    decoder = open_decoder(model, backend=backend)
    hidden = decoder.forward(ids, decoder.new_cache(1, 70), [0])
    with torch.inference_mode():
        torch.testing.assert_close(decoder.head(hidden), model(input_ids=ids).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_by_length_is_a_function_of_the_position_alone(kind):
    if kind == "dynamic":
        model = with_rope(kind, factor=4.0)
        model.model.rotary_emb.max_seq_len_cached = model.model.rotary_emb.original_max_seq_len = 20
        model.config.max_position_embeddings = 20
    else:
        model = tiny_model("llama", rope_parameters=LONGROPE)
    ids = token_ids(1, 30)
    with torch.no_grad():
        cache = transformers.DynamicCache()
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(30)]
    wanted = torch.cat(steps, 1)
    with pytest.raises(UnsupportedModelError, match=kind):
        open_decoder(model, backend="fused")
    before = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    decoder = open_decoder(model)
    assert decoder.backend == "module"
    if kind == "dynamic":
        assert decoder.max_positions == 80
    for width in (1, 4, 13):
        cache = decoder.new_cache(1, 30)
        pieces = [decoder.forward(ids[:, i : i + width], cache, [i]) for i in range(0, 30, width)]
        torch.testing.assert_close(decoder.head(torch.cat(pieces, 1)), wanted, atol=2e-5, rtol=2e-5)
        again = decoder.forward(ids[:, 18:], cache, [18])
        torch.testing.assert_close(decoder.head(again), wanted[:, 18:], atol=2e-5, rtol=2e-5)
    ragged = decoder.new_cache(2, 30)
    decoder.forward(ids.expand(2, -1), ragged, [0, 0])
    hidden = decoder.forward(torch.stack([ids[0, 3:8], ids[0, 18:23]]), ragged, [3, 18])
    torch.testing.assert_close(decoder.head(hidden[1:]), wanted[:, 18:23], atol=2e-5, rtol=2e-5)
    after = dict(model.model.rotary_emb.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    assert not any(buffer.is_inference() for buffer in after.values())


@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_too_many_positions_are_refused(backend):
    decoder = open_decoder(tiny_model("llama"), backend=backend)
    decoder.check_capacity(128)
    with pytest.raises(ConfigError, match=r"129 positions.*128"):
        decoder.check_capacity(129)


@pytest.mark.parametrize(("backend", "name"), [("fused", "llama"), ("module", "gpt2")])
def test_a_pass_beyond_the_models_positions_is_refused_before_any_compute(backend, name):
    decoder = open_decoder(tiny_model(name), backend=backend)
    cache = decoder.new_cache(1, 4)
    with pytest.raises(ConfigError, match="128"):
        decoder.forward(token_ids(1, 2), cache, [127])
    assert cache.capacity == 4
    assert cache.layer_executions() == [0, 0, 0, 0]


def test_layers_under_the_training_recipe_are_run_whole():
    model, ids = tiny_model("gpt2"), token_ids(2, 7)
    decoder = open_decoder(model)
    wanted = decoder.forward(ids, decoder.new_cache(2, 7), [0, 0])
    recipe = layerskip.apply(model, layerskip.LayerSkipConfig(p_max=0.9, total_steps=2))
    recipe.set_step(1)
    model.train()
    assert torch.equal(decoder.forward(ids, decoder.new_cache(2, 7), [0, 0]), wanted)
    assert model.training


@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_nan_logits_are_an_error(backend):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3] = float("nan")
    decoder = open_decoder(model, backend=backend)
    cache = decoder.new_cache(1, 8)
    with pytest.raises(NumericalError, match="NaN"):
        decoder.greedy(decoder.forward(token_ids(1, 3), cache, [0]))
    with pytest.raises(NumericalError, match="NaN"):
        decoder.decode_greedy(5, 3, count=2, cache=cache)


def test_the_lowest_id_wins_a_tie():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[[5, 40, 96], 0] = 1.0
        model.lm_head.weight[[6, 41], 0] = -1.0
    state = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    for backend in ("native", "fused", "module"):
        decoder = open_decoder(model, backend=backend)
        assert sorted(decoder.greedy(torch.cat([state, -state], 1)).view(-1).tolist()) == [5, 6]
