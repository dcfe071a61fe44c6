"""Whatever is done to a live model's weights, a decoder that is open sees it, or says that it cannot go on."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.tiny_models import tiny_model
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.decoder import _max_positions
from telltale.models.int8_weights import quantize

BACKENDS = ["native", "fused", "module"]


def token_ids(length: int = 9) -> torch.Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(1))


def is_the_family(decoder) -> None:
    ids = token_ids()
    hidden = decoder.forward(ids, decoder.new_cache(1, 9), [0])
    with torch.inference_mode():
        wanted = decoder.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(decoder.head(hidden), wanted, atol=2e-5, rtol=2e-5)


def through_data(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def other_storage(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data


def other_parameters(model, other):
    for name, module in model.named_modules():
        for key in module._parameters:
            if module._parameters[key] is not None:
                setattr(module, key, nn.Parameter(other.get_submodule(name)._parameters[key].detach().clone()))


def assigned(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def another_layer(model, other):
    model.model.layers[2] = other.model.layers[2]


def another_projection(model, other):
    model.model.layers[1].mlp.up_proj = other.model.layers[1].mlp.up_proj


def transposed(model, other):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.t()


def other_angles(model, other):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def hooked(model, other):
    model.model.layers[1].register_forward_hook(lambda module, given, out: out)


@pytest.mark.filterwarnings("ignore:.*matrices were written to:UserWarning")
@pytest.mark.parametrize("backend", [*BACKENDS, "native in 8 bits"])
@pytest.mark.parametrize(
    "change",
    [through_data, other_storage, other_parameters, assigned, another_layer, another_projection, other_angles, hooked],
)
def test_changes_are_followed(change, backend):
    model, other = tiny_model("qwen2"), tiny_model("qwen2", seed=3)
    if backend == "native in 8 bits":
        quantize(model, torch.float32)
    decoder = open_decoder(model, backend=backend.split()[0])
    is_the_family(decoder)
    change(model, other)
    is_the_family(decoder)


@pytest.mark.parametrize("backend", ["fused", "module"])
def test_a_weight_with_other_strides_is_followed(backend):
    model = tiny_model("llama")
    decoder = open_decoder(model, backend=backend)
    transposed(model, None)
    is_the_family(decoder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_quantised_afterwards_is_right_or_refused(backend):
    model = tiny_model("llama", tie_word_embeddings=False)
    decoder = open_decoder(model, backend=backend)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    if backend == "module":
        is_the_family(decoder)
        return
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"has changed since its decoder was opened.*open a new decoder"):
            decoder.new_cache(1, 4)


def test_a_layer_that_computes_something_else_afterwards_is_refused():
    model = tiny_model("llama")
    decoder = open_decoder(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(ConfigError, match="its logits differ"):
        decoder.new_cache(1, 4)


def test_a_larger_vocabulary_needs_a_new_decoder():
    model = tiny_model("llama")
    decoder = open_decoder(model)
    model.resize_token_embeddings(104, mean_resizing=False)
    with pytest.raises(ConfigError, match=r"104 tokens.*97; open a new decoder"):
        decoder.new_cache(1, 4)
    is_the_family(open_decoder(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_made_in_inference_mode_is_served(backend):
    with torch.inference_mode():
        model = tiny_model("llama")
    is_the_family(open_decoder(model, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share_parameters_are_served(backend):
    model = tiny_model("llama")
    for layer in model.model.layers[1:]:
        layer.mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
        layer.self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    is_the_family(open_decoder(model, backend=backend))


def test_what_cannot_be_read_is_refused_by_name():
    with torch.device("meta"):
        empty = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight is on the meta device, it was never"):
        open_decoder(empty)
    doubled = tiny_model("llama")
    doubled.model.layers[2] = doubled.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="two of its layers are one module"):
        open_decoder(doubled)


def test_offloaded_weights_are_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="accelerate has offloaded it"):
        open_decoder(model)
    dispatched = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    is_the_family(open_decoder(dispatched))


def test_an_adapter_outside_the_layers_is_refused_by_name():
    class Wrapper(nn.Module):
        def __init__(self, model, **config):
            super().__init__()
            self.inner, self.peft_config = model, {"default": SimpleNamespace(**config)}

        def get_base_model(self):
            return self.inner

    model = tiny_model("llama")
    for config in ({"peft_type": "PREFIX_TUNING", "is_prompt_learning": True}, {"peft_type": "XLORA"}):
        with pytest.raises(UnsupportedModelError, match=f"PEFT's {config['peft_type']}"):
            open_decoder(Wrapper(model, **config))
    is_the_family(open_decoder(Wrapper(model, peft_type="LORA", is_prompt_learning=False)))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 64),
        ({"rope_type": "longrope", "factor": None, "original_max_position_embeddings": 16}, 64),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            512,
        ),
    ],
)
def test_the_limit_of_length_is_what_the_rotary_scaling_is_made_for(rope, limit):
    config = copy.copy(tiny_model("llama").config)
    config.max_position_embeddings, config.rope_parameters = 64, rope
    assert _max_positions(config) == limit
