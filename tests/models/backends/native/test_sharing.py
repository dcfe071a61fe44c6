"""Queries that read the same slots together have the bits that each has alone: candidates, tokens of a row, query heads."""

from __future__ import annotations

import pytest
import torch

from models.backends.native.test_native_step import DTYPES, native, one_by_one, token_ids, without_compiler
from models.tiny_models import counted

pytestmark = without_compiler
SHAPES = [(4, 24, None), (2, 128, None), (1, 64, None), (1, 256, 37), (2, 8, 19), (4, 80, 5)]
"""Key-value heads of four query heads, head size (a tile holds 4096 / head size slots), sliding window."""
THREADED = [(*shape, 1) for shape in SHAPES] + [(*SHAPES[2], 2)]


def wide_model(kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype, *, threads: int = 1):
    name = "qwen3" if window is None else "mistral"
    return native(
        name,
        threads=threads,
        dtype=dtype,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )


def filled(decoder, prompts: list[torch.Tensor]):
    """A cache with one row for each prompt, all its tokens committed."""
    cache = decoder.new_cache(len(prompts), 4)
    for row, prompt in enumerate(prompts):
        decoder.forward(prompt, cache.select([row]), [0])
    counted(cache, [prompt.shape[1] for prompt in prompts])
    return cache


def alone(decoder, prompt: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """States of the tail's tokens, each in a pass of its own behind its own copy of the prompt."""
    cache, length = filled(decoder, [prompt]), prompt.shape[1]
    return torch.cat([decoder.forward(tail[:, i : i + 1], cache, [length + i]) for i in range(tail.shape[1])], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim", "window"), SHAPES)
def test_tokens_of_a_row_have_their_own_bits_over_many_tiles(kv_heads, head_dim, window, dtype):
    decoder = wide_model(kv_heads, head_dim, window, dtype)
    ids = token_ids(1, 75)
    assert torch.equal(decoder.forward(ids, decoder.new_cache(1, 75), [0]), one_by_one(decoder, ids, steps=75))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim", "window"), SHAPES)
def test_candidates_have_their_own_bits_over_many_tiles(kv_heads, head_dim, window, dtype):
    """Nine candidates of four heads: more readers than are served at once under MQA; their own rows grow on the way."""
    decoder = wide_model(kv_heads, head_dim, window, dtype)
    prompt, tails = token_ids(1, 70), token_ids(9, 5, seed=2)
    fork = filled(decoder, [prompt]).fork(9, capacity=1)
    given = torch.cat([decoder.forward(tails[:, i : i + 1], fork, [70 + i] * 9) for i in range(5)], 1)
    assert fork.capacity == 8
    for row in range(9):
        assert torch.equal(given[row : row + 1], alone(decoder, prompt, tails[row : row + 1]))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim", "window", "threads"), THREADED)
def test_mixed_origins_apart_and_at_different_places(kv_heads, head_dim, window, threads, dtype):
    """Branches of three rows in shuffled order, some tokens ahead of others, several tokens of each in one pass."""
    decoder = wide_model(kv_heads, head_dim, window, dtype, threads=threads)
    prompts = [token_ids(1, length, seed=length) for length in (66, 3, 41)]
    branches = filled(decoder, prompts).branches(7, capacity=2)
    origins = [0, 1, 0, 2, 0, 1, 2]
    branches.point(range(7), origins)
    tails, done = token_ids(7, 8, seed=5), [0] * 7
    found: list[list[torch.Tensor]] = [[] for _ in range(7)]
    for rows, width in (([4, 1, 0, 6], 1), ([0, 3], 2), ([5, 0, 2, 4, 1, 3, 6], 3), ([6, 2, 4], 2)):
        ids = torch.cat([tails[row : row + 1, done[row] : done[row] + width] for row in rows])
        places = [prompts[origins[row]].shape[1] + done[row] for row in rows]
        states = decoder.forward(ids, branches.select(rows), places)
        for place, row in enumerate(rows):
            found[row].append(states[place : place + 1])
            done[row] += width
    for row in range(7):
        wanted = alone(decoder, prompts[origins[row]], tails[row : row + 1, : done[row]])
        assert torch.equal(torch.cat(found[row], 1), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_branches_of_one_row_at_different_lengths_of_it(dtype):
    """A row grows; branches pointed at it earlier and later read it together, each up to where it branched off."""
    decoder = wide_model(2, 128, None, dtype)
    prompt = token_ids(1, 90)
    cache = decoder.new_cache(1, 4)
    branches = cache.branches(4, capacity=2)
    tails, cuts = token_ids(4, 3, seed=6), [0, 34, 35, 80]
    for branch, cut in enumerate(cuts):
        if cut:
            decoder.forward(prompt[:, cache.lengths[0] : cut], cache, cache.lengths)
        counted(cache, cut)
        branches.point([branch], [0])
    states = [decoder.forward(tails[:, i : i + 1], branches, [cut + i for cut in cuts]) for i in range(3)]
    for row, cut in enumerate(cuts):
        wanted = alone(decoder, prompt[:, :cut], tails[row : row + 1])
        assert torch.equal(torch.cat(states, 1)[row : row + 1], wanted)


@pytest.mark.long
@pytest.mark.parametrize(("kv_heads", "head_dim", "window", "threads"), THREADED)
def test_blocks_of_a_pass_are_those_of_single_tokens(kv_heads, head_dim, window, threads):
    decoder = wide_model(kv_heads, head_dim, window, torch.float32, threads=threads)
    prompt, tails = token_ids(1, 45), token_ids(3, 6, seed=3)
    options = {"since": [45] * 3, "first_layer": 1}
    fork = filled(decoder, [prompt]).fork(3)
    states, blocks = decoder.run_with_blocks(decoder.embed(tails), 0, 2, fork, [45] * 3, **options)
    assert blocks.shape == (1, 3, 6, 6)
    assert torch.equal(states, torch.cat([alone(decoder, prompt, tail) for tail in tails.split(1)]))
    for row in range(3):
        cache = filled(decoder, [prompt])
        for index in range(6):
            token = decoder.embed(tails[row : row + 1, index : index + 1])
            _, own = decoder.run_with_blocks(token, 0, 2, cache, [45 + index], since=[45], first_layer=1)
            assert torch.equal(blocks[0, row, index, : index + 1], own[0, 0, 0])
            assert not blocks[0, row, index, index + 1 :].any()


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 16, 19, 25])
def test_any_number_of_rows_has_the_bits_of_one(rows, dtype):
    """Rows go through the products in groups of up to six; a group must not show in the result."""
    decoder = native("llama-biased", dtype=dtype, hidden_size=48, intermediate_size=100)
    ids = token_ids(rows, 1)
    states = decoder.forward(ids, decoder.new_cache(rows, 1), [0] * rows)
    logits = decoder.head(states)
    for row in range(rows):
        own = decoder.forward(ids[row : row + 1], decoder.new_cache(1, 1), [0])
        assert torch.equal(states[row : row + 1], own)
        assert torch.equal(logits[row : row + 1], decoder.head(own))
