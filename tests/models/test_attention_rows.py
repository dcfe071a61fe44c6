"""Rows of the attention matrix against what the family's eager attention returns."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import CONFIGS, LLAMA_LIKE, counted, tiny_model
from telltale.models import open_decoder

CASES = [("module", name) for name in CONFIGS] + [
    (backend, name) for backend in ("fused", "native") for name in LLAMA_LIKE
]


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def own_attention(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, output_attentions=True).attentions


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_rows_of_the_newest_tokens_equal_the_familys(backend, name):
    model = tiny_model(name, attention="eager")
    decoder, ids = open_decoder(model, backend=backend), token_ids(2, 13)
    wanted = own_attention(model, ids)
    cache = decoder.new_cache(2, 13)
    decoder.forward(ids[:, :9], cache, [0, 0], prefill=True)
    embedded = decoder.embed(ids[:, 9:])
    hidden, rows = decoder.run_with_rows(embedded, 0, decoder.layers, cache, [9, 9], rows={1, 3})
    assert set(rows) == {1, 3}
    assert torch.equal(hidden, decoder.run(embedded, 0, decoder.layers, cache, [9, 9]))
    for layer, given in rows.items():
        assert given.dtype == torch.float32
        assert given.shape == (2, 4, 4, 13)
        torch.testing.assert_close(given, wanted[layer][:, :, 9:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gpt_neox"])
def test_ragged_rows_and_a_whole_prompt(name):
    model = tiny_model(name, attention="eager")
    decoder, ids, places = open_decoder(model, backend="module"), token_ids(2, 12), [4, 9]
    cache = decoder.new_cache(2, 12)
    _, rows = decoder.run_with_rows(decoder.embed(ids), 0, 4, cache, [0, 0], rows=[0], prefill=True)
    torch.testing.assert_close(rows[0], own_attention(model, ids)[0], atol=1e-5, rtol=1e-4)
    more = token_ids(2, 2, seed=4)
    _, rows = decoder.run_with_rows(decoder.embed(more), 0, 4, cache, places, rows=[0, 2])
    for row, place in enumerate(places):
        alone = own_attention(model, torch.cat([ids[row : row + 1, :place], more[row : row + 1]], 1))
        for layer in (0, 2):
            given = rows[layer][row : row + 1]
            torch.testing.assert_close(given[..., : place + 2], alone[layer][:, :, place:], atol=1e-5, rtol=1e-4)
            assert not given[..., place + 2 :].any()


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2s_own_scales(options):
    model = tiny_model("gpt2", attention="eager", **options)
    decoder, ids = open_decoder(model), token_ids(1, 8)
    _, rows = decoder.run_with_rows(decoder.embed(ids), 0, 4, decoder.new_cache(1, 8), [0], rows=range(4))
    for layer, wanted in enumerate(own_attention(model, ids)):
        torch.testing.assert_close(rows[layer], wanted, atol=1e-5, rtol=1e-4)


def test_a_fork_sees_the_shared_prefix():
    model = tiny_model("llama", attention="eager")
    decoder, prompt, tails = open_decoder(model, backend="fused"), token_ids(1, 6), token_ids(2, 3, seed=2)
    cache = decoder.new_cache(1, 8)
    decoder.forward(prompt, cache, [0])
    counted(cache, 6)
    _, rows = decoder.run_with_rows(decoder.embed(tails), 0, 4, cache.fork(2), [6, 6], rows=[3])
    wanted = own_attention(model, torch.cat([prompt.expand(2, -1), tails], 1))[3]
    torch.testing.assert_close(rows[3], wanted[:, :, 6:], atol=1e-5, rtol=1e-4)


def test_bfloat16_rows_sum_to_one_within_float32():
    decoder = open_decoder(tiny_model("llama", dtype=torch.bfloat16))
    _, rows = decoder.run_with_rows(
        decoder.embed(token_ids(1, 9)), 0, 4, decoder.new_cache(1, 9), [0], rows=[2], prefill=True
    )
    torch.testing.assert_close(rows[2].sum(-1), torch.ones(1, 4, 9), atol=1e-5, rtol=0)
