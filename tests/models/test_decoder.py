"""The layerwise view equals the family's own forward, whatever the split, the batch and the history."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import CONFIGS, LLAMA_LIKE, counted, tiny_model
from telltale.models import open_decoder

BACKENDS = [("module", name) for name in CONFIGS] + [
    (backend, name) for backend in ("fused", "native") for name in LLAMA_LIKE
]


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def own_logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def whole_forward_equals_the_family(model, decoder):
    ids = token_ids(2, 14)
    hidden = decoder.forward(ids, decoder.new_cache(2, 14), [0, 0], prefill=True)
    torch.testing.assert_close(decoder.head(hidden), own_logits(model, ids), atol=2e-5, rtol=2e-5)


def early_then_late_layers_is_bit_equal_to_all_layers(model, decoder):
    ids = token_ids(1, 9)
    whole = decoder.forward(ids, decoder.new_cache(1, 9), [0])
    for exit_layer in range(1, decoder.layers):
        cache = decoder.new_cache(1, 9)
        early = decoder.run(decoder.embed(ids), 0, exit_layer, cache, [0])
        assert torch.equal(decoder.run(early, exit_layer, decoder.layers, cache, [0]), whole)


def decoding_with_the_cache_equals_decoding_without(model, decoder):
    ids = token_ids(1, 16)
    cache = decoder.new_cache(1, 2)
    pieces, place = [], 0
    for width in (5, 1, 3, 1, 4, 2):
        hidden = decoder.forward(ids[:, place : place + width], cache, [place])
        pieces.append(decoder.head(hidden))
        place += width
    torch.testing.assert_close(torch.cat(pieces, 1), own_logits(model, ids), atol=2e-5, rtol=2e-5)
    assert cache.capacity == 16


def ragged_rows_equal_single_rows_after_a_rollback(model, decoder):
    ids = token_ids(3, 12)
    lengths = [4, 9, 7]
    cache = decoder.new_cache(3, 16)
    decoder.forward(ids, cache, [0, 0, 0], prefill=True)
    counted(cache, lengths)
    continuation = token_ids(3, 3, seed=5)
    hidden = decoder.forward(continuation, cache, lengths)
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row : row + 1, :length], continuation[row : row + 1]], 1)
        wanted = own_logits(model, alone)[:, length:]
        torch.testing.assert_close(decoder.head(hidden[row : row + 1]), wanted, atol=2e-5, rtol=2e-5)


def a_fork_equals_independent_copies_and_keeps_the_prefix_once(model, decoder):
    prompt, tails = token_ids(1, 8), token_ids(3, 4, seed=7)
    cache = decoder.new_cache(1, 8)
    decoder.forward(prompt, cache, [0], prefill=True)
    counted(cache, 8)
    fork = cache.fork(3)
    hidden = decoder.forward(tails, fork, [8, 8, 8])
    for row in range(3):
        wanted = own_logits(model, torch.cat([prompt, tails[row : row + 1]], 1))[:, 8:]
        torch.testing.assert_close(decoder.head(hidden[row : row + 1]), wanted, atol=2e-5, rtol=2e-5)
    assert all(shared.data_ptr() == own.data_ptr() for shared, own in zip(fork.prefix.keys, cache.keys, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_the_layerwise_view_is_the_family(backend, name, subtests):
    model = tiny_model(name)
    decoder = open_decoder(model, backend=backend)
    for check in (
        whole_forward_equals_the_family,
        early_then_late_layers_is_bit_equal_to_all_layers,
        decoding_with_the_cache_equals_decoding_without,
        ragged_rows_equal_single_rows_after_a_rollback,
        a_fork_equals_independent_copies_and_keeps_the_prefix_once,
    ):
        with subtests.test(check.__name__):
            check(model, decoder)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("module", "llama"),
        ("module", "gpt2"),
        ("fused", "llama"),
        ("fused", "phi3"),
        ("native", "mistral"),
        ("native", "qwen3"),
    ],
)
def test_exact_results_do_not_depend_on_the_width_of_the_pass(backend, name, dtype):
    decoder = open_decoder(tiny_model(name, dtype=dtype), backend=backend, exact=True)
    ids = token_ids(1, 20)
    single = decoder.new_cache(1, 20)
    one_by_one = torch.cat([decoder.forward(ids[:, i : i + 1], single, [i]) for i in range(20)], 1)
    for width in (2, 3, 5, 13):
        cache = decoder.new_cache(1, 20)
        pieces = [decoder.forward(ids[:, i : i + width], cache, [i]) for i in range(0, 20, width)]
        assert torch.equal(torch.cat(pieces, 1), one_by_one)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_attention_rows_equal_the_familys_attention(name):
    model = tiny_model(name, attention="eager")
    decoder = open_decoder(model, backend="module")
    ids = token_ids(2, 11)
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    cache = decoder.new_cache(2, 11)
    decoder.forward(ids[:, :7], cache, [0, 0])
    _, rows = decoder.run_with_rows(decoder.embed(ids[:, 7:]), 0, decoder.layers, cache, [7, 7], rows={0, 3})
    assert set(rows) == {0, 3}
    for layer, given in rows.items():
        torch.testing.assert_close(given, wanted[layer][:, :, 7:].float(), atol=1e-5, rtol=1e-4)


def test_work_is_counted_per_layer():
    decoder = open_decoder(tiny_model("llama"), backend="module")
    cache = decoder.new_cache(1, 16)
    decoder.forward(token_ids(1, 6), cache, [0])
    decoder.run(decoder.embed(token_ids(1, 2)), 0, 1, cache, [6])
    assert cache.layer_executions() == [8, 6, 6, 6]


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(
    ("backend", "name"), [("module", "qwen3"), ("fused", "phi3"), ("fused", "gemma"), ("native", "qwen2")]
)
def test_one_key_head_for_all_queries_or_for_each(backend, name, kv_heads):
    model = tiny_model(name, num_key_value_heads=kv_heads)
    decoder, ids = open_decoder(model, backend=backend), token_ids(2, 10)
    cache = decoder.new_cache(2, 10)
    pieces = [decoder.forward(ids[:, i : i + 5], cache, [i, i]) for i in (0, 5)]
    assert cache.keys[0].shape[1] == kv_heads
    torch.testing.assert_close(decoder.head(torch.cat(pieces, 1)), own_logits(model, ids), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_eager_attention_takes_the_same_masks(name):
    model = tiny_model(name, attention="eager")
    decoder, ids = open_decoder(model, backend="module"), token_ids(2, 12)
    cache = decoder.new_cache(2, 12)
    decoder.forward(ids, cache, [0, 0], prefill=True)
    places, more = [3, 8], token_ids(2, 4, seed=9)
    hidden = decoder.forward(more, cache, places)
    for row, place in enumerate(places):
        alone = torch.cat([ids[row : row + 1, :place], more[row : row + 1]], 1)
        wanted = own_logits(model, alone)[:, place:]
        torch.testing.assert_close(decoder.head(hidden[row : row + 1]), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.long
def test_wrappers_are_looked_through():
    model = tiny_model("llama")
    decoder, ids = open_decoder(torch.compile(model)), token_ids(1, 5)
    assert decoder.model is model
    hidden = decoder.forward(ids, decoder.new_cache(1, 5), [0])
    torch.testing.assert_close(decoder.head(hidden), own_logits(model, ids), atol=2e-5, rtol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_half_precision_stays_near_the_familys_own(backend, name):
    model = tiny_model(name, dtype=torch.bfloat16)
    decoder, ids = open_decoder(model, backend=backend), token_ids(1, 12)
    cache = decoder.new_cache(1, 12)
    pieces = [decoder.forward(ids[:, i : i + 4], cache, [i]) for i in (0, 4, 8)]
    given, wanted = decoder.head(torch.cat(pieces, 1)), own_logits(model, ids)
    assert given.dtype == torch.bfloat16
    reference = own_logits(tiny_model(name, dtype=torch.bfloat16).float(), ids)
    # Rounding in bfloat16 moves the family's own logits by this much; ours may not move further than twice that.
    noise = (wanted.float() - reference).abs().max()
    assert (given.float() - reference).abs().max() <= 2 * noise
