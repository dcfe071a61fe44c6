"""Exit states are the layers' raw outputs; exit quality is each exit's own cross-entropy and agreement."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import CONFIGS, tiny_model
from telltale.errors import DataError
from telltale.models import open_decoder
from telltale.models.exits import captured_exits, exit_quality
from telltale.models.families import parts_of


def batch(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_captured_states_are_those_of_the_layerwise_view(name):
    model = tiny_model(name)
    parts, decoder, ids = parts_of(model), open_decoder(model, backend="module"), batch(2, 8)
    with torch.inference_mode(), captured_exits(parts) as states:
        model(input_ids=ids, use_cache=False)
    cache, hidden = decoder.new_cache(2, 8), decoder.embed(ids)
    for layer in range(decoder.layers):
        hidden = decoder.run(hidden, layer, layer + 1, cache, [0, 0], prefill=True)
        torch.testing.assert_close(states[layer], hidden, atol=1e-5, rtol=1e-5)


def test_no_hook_stays_behind_even_after_an_error():
    model = tiny_model("llama")
    parts = parts_of(model)
    with pytest.raises(IndexError), captured_exits(parts):
        model(input_ids=torch.tensor([[1000]]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_quality_equals_the_definition():
    model = tiny_model("llama")
    decoder, batches = open_decoder(model, backend="module"), [batch(3, 9), batch(1, 5, seed=1)]
    quality = exit_quality(model, batches)
    assert quality.tokens == 3 * 8 + 4
    losses, agreed = [[] for _ in range(4)], [[] for _ in range(4)]
    for ids in batches:
        hidden, cache = decoder.embed(ids), decoder.new_cache(len(ids), 9)
        logits = []
        for layer in range(4):
            hidden = decoder.run(hidden, layer, layer + 1, cache, [0] * len(ids))
            logits.append(decoder.head(hidden)[:, :-1].reshape(-1, 97))
        for layer in range(4):
            log_probabilities = logits[layer].log_softmax(-1)
            losses[layer] += (-log_probabilities.gather(1, ids[:, 1:].reshape(-1, 1))).flatten().tolist()
            agreed[layer] += (logits[layer].argmax(-1) == logits[-1].argmax(-1)).tolist()
    assert quality.losses == pytest.approx([sum(values) / 28 for values in losses], rel=1e-5)
    assert quality.agreement == pytest.approx([sum(values) / 28 for values in agreed])
    assert quality.agreement[-1] == 1.0


def test_dropout_is_off_meanwhile_and_modes_come_back():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    quiet = exit_quality(model, [batch(2, 8)])
    model.train()
    model.transformer.h[1].eval()
    assert exit_quality(model, [batch(2, 8)]) == quiet
    assert model.training
    assert not model.transformer.h[1].attn.training


def test_nothing_to_predict_is_an_error():
    with pytest.raises(DataError):
        exit_quality(tiny_model("llama"), [])
