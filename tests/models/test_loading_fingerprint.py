"""Fingerprints: the same for a model wherever it lies, another for another model; tokenizers likewise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.tiny_models import tiny_model
from telltale.errors import DataError
from telltale.models import load
from telltale.models.loading import model_fingerprint, tokenizer_fingerprint
from telltale.tasks import chains


def test_a_saved_model_has_the_fingerprint_of_the_one_in_memory(tmp_path):
    tokenizer = chains.tokenizer()
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, read = load(tmp_path)
    assert model_fingerprint(again) == model_fingerprint(model) == model_fingerprint(model)
    assert tokenizer_fingerprint(read) == tokenizer_fingerprint(tokenizer)
    assert model_fingerprint(load(tmp_path, dtype="bfloat16")[0]) != model_fingerprint(model)


def test_how_attention_is_computed_does_not_count_but_weights_sizes_and_families_do():
    model = tiny_model("llama")
    assert model_fingerprint(tiny_model("llama", attention="eager")) == model_fingerprint(model)
    others = [
        tiny_model("llama", seed=1),
        tiny_model("llama", num_hidden_layers=3),
        tiny_model("qwen2"),
        tiny_model("llama", rms_norm_eps=1e-3),
        tiny_model("llama", dtype=torch.bfloat16),
    ]
    found = {model_fingerprint(other) for other in others} | {model_fingerprint(model)}
    assert len(found) == len(others) + 1


@pytest.mark.long
def test_a_training_step_changes_the_fingerprint_and_a_wrapper_does_not():
    model = tiny_model("llama")
    before = model_fingerprint(model)
    assert model_fingerprint(torch.compile(model)) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("place", [(0, 1), (17, 40), (-1, -1)])
def test_any_one_number_counts(place):
    layer = nn.Linear(300, 200, bias=False)
    before = model_fingerprint(layer)
    with torch.no_grad():
        layer.weight[place] += 1e-3
    assert model_fingerprint(layer) != before


def test_tensors_that_are_not_contiguous_have_the_fingerprint_of_their_copies():
    layer, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    values = torch.randn(8, 8)
    layer.weight = nn.Parameter(values.t())
    other.weight = nn.Parameter(values.t().contiguous())
    assert not layer.weight.is_contiguous()
    assert model_fingerprint(layer) == model_fingerprint(other)


def test_tokenizers_differ_by_words_and_by_special_tokens():
    plain, longer, other = chains.tokenizer(), chains.tokenizer(["Zoe"]), chains.tokenizer()
    other.bos_token = "<eos>"
    assert len({tokenizer_fingerprint(one) for one in (plain, longer, other)}) == 3
    assert tokenizer_fingerprint(chains.tokenizer()) == tokenizer_fingerprint(plain)
    with pytest.raises(DataError, match="expected one with a vocabulary"):
        tokenizer_fingerprint(object())
