"""In-step attention blocks of every backend against the family's eager attention, and grounding against its dense rollout."""

from __future__ import annotations

import pytest
import torch

from models.test_attention_rows import CASES, own_attention, token_ids
from models.tiny_models import counted, tiny_model
from telltale.errors import ConfigError
from telltale.models import open_decoder
from telltale.signals.grounding import grounding_from_blocks

PREFIX, STEP = 9, 7


def dense_grounding(attentions, start, layers=3):
    """The paper's definition: the product of the last layers' whole matrices, and the mass before ``start``."""
    product = torch.eye(attentions[0].shape[-1]).expand(attentions[0].shape[0], -1, -1)
    for attention in attentions[-layers:]:
        product = attention.float().mean(1) @ product
    return product[:, start:, :start].sum(-1)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_blocks_and_grounding_equal_the_familys(backend, name):
    model = tiny_model(name, attention="eager")
    decoder, ids = open_decoder(model, backend=backend), token_ids(2, PREFIX + STEP)
    wanted = own_attention(model, ids)
    cache = decoder.new_cache(2, PREFIX + STEP)
    decoder.forward(ids[:, :PREFIX], cache, [0, 0], prefill=True)
    embedded, places = decoder.embed(ids[:, PREFIX:]), [PREFIX, PREFIX]
    hidden, blocks = decoder.run_with_blocks(embedded, 0, 4, cache, places, since=places, first_layer=1)
    assert torch.equal(hidden, decoder.run(embedded, 0, 4, cache, places))
    assert blocks.shape == (3, 2, STEP, STEP)
    assert blocks.dtype == torch.float32
    for block, attention in zip(blocks, wanted[1:], strict=True):
        torch.testing.assert_close(block, attention.mean(1)[:, PREFIX:, PREFIX:], atol=1e-6, rtol=1e-5)
    found = grounding_from_blocks(list(blocks))
    torch.testing.assert_close(found, dense_grounding(wanted, PREFIX), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("backend", ["module", "fused", "native"])
def test_token_by_token_in_a_fork_gives_the_same_grounding(backend, heads):
    """While candidates are drafted each tick adds a row to each block; the rows together are the whole block."""
    model = tiny_model("llama", attention="eager", num_key_value_heads=heads)
    decoder = open_decoder(model, backend=backend)
    prompt, tails = token_ids(1, PREFIX), token_ids(3, STEP, seed=2)
    cache = decoder.new_cache(1, PREFIX)
    decoder.forward(prompt, cache, [0], prefill=True)
    counted(cache, PREFIX)
    fork = cache.fork(3)
    block = torch.zeros(3, 3, STEP, STEP)
    for index in range(STEP):
        _, rows = decoder.run_with_blocks(
            decoder.embed(tails[:, index : index + 1]),
            0,
            4,
            fork,
            [PREFIX + index] * 3,
            since=[PREFIX] * 3,
            first_layer=1,
        )
        assert rows.shape == (3, 3, 1, index + 1)
        block[:, :, index, : index + 1] = rows[:, :, 0]
    wanted = dense_grounding(own_attention(model, torch.cat([prompt.expand(3, -1), tails], 1)), PREFIX)
    torch.testing.assert_close(grounding_from_blocks(list(block)), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["module", "fused", "native"])
def test_ragged_rows_stand_at_their_own_places(backend):
    """Rows of different lengths in one pass, as left-padded prompts become them: each is what it is alone."""
    model = tiny_model("llama", attention="eager")
    decoder, ids = open_decoder(model, backend=backend), token_ids(2, 12)
    places, since, more = [4, 9], [3, 9], token_ids(2, 3, seed=4)
    cache = decoder.new_cache(2, 16)
    decoder.forward(ids, cache, [0, 0], prefill=True)
    _, blocks = decoder.run_with_blocks(decoder.embed(more), 0, 4, cache, places, since=since, first_layer=2)
    assert blocks.shape == (2, 2, 3, 4)
    for row, (place, first) in enumerate(zip(places, since, strict=True)):
        alone = own_attention(model, torch.cat([ids[row : row + 1, :place], more[row : row + 1]], 1))
        width = place + 3 - first
        for index, layer in enumerate((2, 3)):
            wanted = alone[layer].mean(1)[0, place:, first:]
            torch.testing.assert_close(blocks[index, row, :, :width], wanted, atol=1e-6, rtol=1e-5)
            assert not blocks[index, row, :, width:].any()


def test_a_wide_step_goes_through_the_native_pass_whole():
    """Steps longer than a prompt's threshold keep their blocks too, on two threads as on one."""
    model = tiny_model("llama", attention="eager")
    ids = token_ids(1, 60)
    wanted = dense_grounding(own_attention(model, ids), 20)
    for threads in (1, 2):
        decoder = open_decoder(model, backend="native", threads=threads)
        cache = decoder.new_cache(1, 60)
        decoder.forward(ids[:, :20], cache, [0], prefill=True)
        _, blocks = decoder.run_with_blocks(decoder.embed(ids[:, 20:]), 0, 4, cache, [20], since=[20], first_layer=1)
        torch.testing.assert_close(grounding_from_blocks(list(blocks)), wanted, atol=1e-6, rtol=0)


def test_no_layer_asked_for_gives_no_block():
    for backend in ("module", "native"):
        decoder = open_decoder(tiny_model("llama"), backend=backend)
        states = decoder.embed(token_ids(1, 3))
        _, blocks = decoder.run_with_blocks(states, 0, 2, decoder.new_cache(1, 8), [0], since=[0], first_layer=2)
        assert blocks.shape == (0, 1, 3, 3)


@pytest.mark.parametrize("since", [[3], [0, 0], [-1]])
def test_a_step_cannot_begin_behind_its_tokens(since):
    for backend in ("module", "native"):
        decoder = open_decoder(tiny_model("llama"), backend=backend)
        with pytest.raises(ConfigError, match="expected one position"):
            decoder.run_with_blocks(
                decoder.embed(token_ids(1, 3)), 0, 4, decoder.new_cache(1, 8), [2], since=since, first_layer=1
            )
