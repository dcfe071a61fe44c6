"""Exact mode: a token's state and logits are the same bits whatever shares its pass. And the greedy loops agree."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.models import open_decoder

CASES = [
    ("module", "llama"),
    ("module", "gpt2"),
    ("module", "gpt_neox"),
    ("fused", "mistral"),
    ("fused", "qwen3"),
    ("fused", "phi3-partial"),
    ("native", "mistral"),
    ("native", "gemma"),
]
DTYPES = [torch.float32, torch.bfloat16]
LENGTH = 26


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_by_one(decoder, ids):
    cache = decoder.new_cache(1, LENGTH)
    return torch.cat([decoder.forward(ids[:, i : i + 1], cache, [i]) for i in range(ids.shape[1])], 1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_split_passes_of_any_width_give_the_bits_of_single_tokens(backend, name, dtype):
    decoder = open_decoder(tiny_model(name, dtype=dtype), backend=backend, exact=True)
    assert decoder.exact
    ids = token_ids(1, LENGTH)
    wanted = one_by_one(decoder, ids)
    wanted_logits = torch.cat([decoder.head(wanted[:, i : i + 1]) for i in range(LENGTH)], 1)
    for width in range(2, 14):
        cache, pieces = decoder.new_cache(1, 3), []
        for start in range(0, LENGTH, width):
            part = ids[:, start : start + width]
            exit_states = [
                decoder.run(decoder.embed(part[:, i : i + 1]), 0, 2, cache, [start + i]) for i in range(part.shape[1])
            ]
            pieces.append(decoder.run(torch.cat(exit_states, 1), 2, decoder.layers, cache, [start]))
        given = torch.cat(pieces, 1)
        assert torch.equal(given, wanted), width
        assert torch.equal(decoder.head(given[:, :width]), wanted_logits[:, :width]), width


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_the_other_rows_of_a_batch_do_not_matter(backend, name, dtype):
    decoder = open_decoder(tiny_model(name, dtype=dtype), backend=backend, exact=True)
    ids, places = token_ids(3, 12), [2, 9, 5]
    cache = decoder.new_cache(3, 16)
    decoder.forward(ids, cache, [0, 0, 0])
    more = token_ids(3, 3, seed=3)
    together = decoder.forward(more, cache, places)
    for row, place in enumerate(places):
        alone = one_by_one(decoder, torch.cat([ids[row : row + 1, :place], more[row : row + 1]], 1))
        assert torch.equal(together[row : row + 1], alone[:, place:])
        assert torch.equal(decoder.head(together)[row], decoder.head(alone[:, place:])[0])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_the_greedy_loops_are_what_their_single_steps_make(backend, name, exact):
    decoder = open_decoder(tiny_model(name), backend=backend, exact=exact)
    prompt = token_ids(1, 6)
    cache = decoder.new_cache(1, 8)
    state = decoder.forward(prompt, cache, [0], prefill=True)[:, -1:]
    first = int(decoder.greedy(state))
    given = decoder.decode_greedy(first, 6, count=9, cache=cache)
    with torch.inference_mode():
        wanted = [first]
        for _ in range(9):
            ids = torch.cat([prompt, torch.tensor([wanted])], 1)
            wanted.append(int(decoder.model(input_ids=ids).logits[0, -1].argmax()))
    assert given == wanted[1:]
    stop = given[4]
    assert decoder.decode_greedy(first, 6, count=9, cache=cache, stop_tokens=[stop]) == given[: given.index(stop) + 1]
    assert decoder.score_greedy([first, *given[:3]], 6, cache=cache) == given[:4]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_drafting_is_greedy_decoding_of_the_early_layers(backend, name):
    decoder = open_decoder(tiny_model(name), backend=backend, exact=True)
    prompt, exit_layer = token_ids(1, 6), 2
    cache = decoder.new_cache(1, 8)
    decoder.forward(prompt, cache, [0])
    counted = cache.layer_executions()
    (drafts,), states = decoder.draft_greedy([7], [6], exit_layer=exit_layer, length=5, cache=cache)
    assert states.shape == (1, 6, 32)
    assert [after - before for after, before in zip(cache.layer_executions(), counted, strict=True)] == [6, 6, 0, 0]
    wanted = []
    other = decoder.new_cache(1, 8)
    decoder.forward(prompt, other, [0])
    for index, token in enumerate([7, *drafts]):
        state = decoder.run(decoder.embed(torch.tensor([[token]])), 0, exit_layer, other, [6 + index])
        wanted.append(state)
        if index < 5:
            assert int(decoder.greedy(state)) == drafts[index]
    assert torch.equal(states, torch.cat(wanted, 1))
    (stopped,), states = decoder.draft_greedy(
        [7], [6], exit_layer=exit_layer, length=5, cache=cache, stop_tokens=[drafts[1]]
    )
    assert stopped == drafts[: drafts.index(drafts[1]) + 1]
    assert states.shape[1] == len(stopped) + 1
    (nothing,), states = decoder.draft_greedy([7], [6], exit_layer=exit_layer, length=0, cache=cache)
    assert nothing == []
    assert states.shape[1] == 1


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_ragged_rows_draft_and_verify_as_they_would_alone(backend, name):
    decoder = open_decoder(tiny_model(name), backend=backend, exact=True)
    prompts, places, tokens = token_ids(3, 9), [4, 9, 6], [3, 50, 96]
    cache = decoder.new_cache(3, 16)
    decoder.forward(prompts, cache, [0, 0, 0])
    drafts, states = decoder.draft_greedy(tokens, places, exit_layer=1, length=4, cache=cache)
    verified = decoder.verify_greedy(states, places, exit_layer=1, cache=cache)
    for row, place in enumerate(places):
        alone = decoder.new_cache(1, 16)
        decoder.forward(prompts[row : row + 1, :place], alone, [0])
        (own_drafts,), own_states = decoder.draft_greedy([tokens[row]], [place], exit_layer=1, length=4, cache=alone)
        assert drafts[row] == own_drafts
        assert torch.equal(states[row : row + 1], own_states)
        assert verified[row] == decoder.verify_greedy(own_states, [place], exit_layer=1, cache=alone)[0]
        assert verified[row] == decoder.score_greedy([tokens[row], *own_drafts], place, cache=alone)
