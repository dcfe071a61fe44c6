"""The check at opening finds what a short prompt on the model as it is would not show."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.errors import UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.agreement import disagreement
from telltale.models.attention import PositionEmbeddings
from telltale.models.twin import twin_of

ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
    },
}


def with_rope(kind: str, name: str = "llama"):
    return tiny_model(name, rope_parameters=dict(ROPES[kind]))


@pytest.mark.parametrize("backend", ["native", "fused", "module"])
def test_a_window_longer_than_the_prompt_is_checked(backend, monkeypatch):
    model = tiny_model("mistral", sliding_window=100)
    assert open_decoder(model, backend=backend).windows == [100] * 4
    monkeypatch.setattr("telltale.models.decoder._window", lambda config, layer: config.sliding_window + 1)
    with pytest.raises(UnsupportedModelError, match="beyond its sliding window its logits differ"):
        open_decoder(model, backend=backend)


@pytest.mark.parametrize("kind", list(ROPES))
def test_frequencies_behind_the_boundary_are_checked(kind, monkeypatch):
    model = with_rope(kind)
    before = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    assert open_decoder(model).rereads_at is None
    own = PositionEmbeddings._of_sequence
    monkeypatch.setattr(PositionEmbeddings, "_of_sequence", lambda self, h, place, length: own(self, h, place, 9))
    with pytest.raises(UnsupportedModelError, match=rf"\({kind}\) change its logits differ"):
        open_decoder(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.model.rotary_emb.named_buffers())


def test_a_family_that_drops_its_cache_is_found_out_by_what_it_does():
    rope = {"rope_parameters": dict(ROPES["longrope"]), "original_max_position_embeddings": 64}
    assert open_decoder(tiny_model("phi3", **rope)).rereads_at == 64
    assert open_decoder(tiny_model("phi3", **rope | {"sliding_window": 100})).rereads_at == 64


def test_the_module_backend_is_checked_as_well():
    model = tiny_model("gpt2")
    own = model.forward

    def steered(*arguments, **options):
        found = own(*arguments, **options)
        found.logits = found.logits + torch.arange(97.0)
        return found

    model.forward = steered
    with pytest.raises(UnsupportedModelError, match="layer by layer: its logits differ"):
        open_decoder(model)


def test_a_twin_shares_every_tensor_and_leaves_the_model_alone():
    model = with_rope("longrope", "qwen2")
    config = type(model.config)(**model.config.to_dict() | {"sliding_window": 3})
    modules, hooks = list(model.modules()), model.model.register_forward_hook(lambda *given: None)
    twin = twin_of(model, config)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert (twin.config, twin.model.layers[1].self_attn.config) == (config, config)
    assert twin.model.layers[1].mlp.act_fn is model.model.layers[1].mlp.act_fn
    assert [a is b for a, b in zip(model.modules(), modules, strict=True)].count(False) == 0
    assert model.model.layers[1].self_attn.config is model.config
    assert (len(model.model._forward_hooks), len(twin.model._forward_hooks)) == (1, 0)
    hooks.remove()


def test_logits_that_are_not_finite_are_left_to_decoding():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert disagreement(open_decoder(model)) is None
