"""Candidates of several prompts in one pass: forks of ragged rows against each sequence run alone, for every backend."""

from __future__ import annotations

import pytest
import torch

from models.test_attention_rows import CASES, token_ids
from models.tiny_models import counted, tiny_model
from telltale.models import open_decoder

LENGTHS, CANDIDATES, STEP = [11, 4, 7], 3, 5


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_candidates_of_ragged_prompts_equal_whole_sequences(backend, name):
    decoder = open_decoder(tiny_model(name), backend=backend)
    prompts, tails = token_ids(3, max(LENGTHS)), token_ids(3 * CANDIDATES, STEP, seed=2)
    cache = decoder.new_cache(3, 16)
    decoder.forward(prompts, cache, [0, 0, 0], prefill=True)
    counted(cache, LENGTHS)
    fork = cache.fork(CANDIDATES, capacity=2)
    places = [length for length in LENGTHS for _ in range(CANDIDATES)]
    states = []
    for index in range(STEP):
        ids = tails[:, index : index + 1]
        states.append(decoder.forward(ids, fork, [place + index for place in places]))
    found = torch.cat(states, 1)
    for row, place in enumerate(places):
        alone = torch.cat([prompts[row // CANDIDATES : row // CANDIDATES + 1, :place], tails[row : row + 1]], 1)
        own = decoder.new_cache(1, 16)
        decoder.forward(alone[:, :place], own, [0], prefill=True)
        wanted = torch.cat([decoder.forward(alone[:, p : p + 1], own, [p]) for p in range(place, place + STEP)], 1)
        torch.testing.assert_close(found[row : row + 1], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["module", "fused", "native"])
def test_an_absorbed_candidate_goes_on_as_if_it_had_never_been_one(backend):
    """After accepting and rejecting, the cache gives the logits of the committed tokens run without a cache."""
    decoder = open_decoder(tiny_model("llama"), backend=backend)
    generator = torch.Generator().manual_seed(5)
    prompts = token_ids(2, 9)
    cache = decoder.new_cache(2, 9)
    decoder.forward(prompts, cache, [0, 0], prefill=True)
    lengths = [6, 9]
    counted(cache, lengths)
    committed = [prompts[row, :length].tolist() for row, length in enumerate(lengths)]
    for _ in range(12):
        fork = cache.fork(2, capacity=1)
        places = [length for length in cache.lengths for _ in range(2)]
        width = int(torch.randint(1, 5, (1,), generator=generator))
        tails = torch.randint(97, (4, width), generator=generator)
        decoder.forward(tails, fork, places)
        counted(fork, [place + width for place in places])
        winners = [row * 2 + int(torch.randint(2, (1,), generator=generator)) for row in range(2)]
        accepted = [row for row in range(2) if torch.rand(1, generator=generator) < 0.7]
        cache.absorb(fork, [winners[row] for row in accepted])
        for row in accepted:
            committed[row] += tails[winners[row]].tolist()
        assert cache.lengths == [len(tokens) for tokens in committed]
    ids = torch.tensor([[1], [2]])
    found = decoder.head(decoder.forward(ids, cache, cache.lengths))
    for row, tokens in enumerate(committed):
        whole = torch.tensor([[*tokens, row + 1]])
        wanted = decoder.head(decoder.forward(whole, decoder.new_cache(1, 4), [0], prefill=True))[:, -1]
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)
