"""Rows chosen for one pass, and branches that are pointed at row after row, against each sequence run alone."""

from __future__ import annotations

import pytest
import torch

from models.test_attention_rows import CASES, token_ids
from models.tiny_models import counted, tiny_model
from telltale.errors import ConfigError
from telltale.models import open_decoder


def alone(decoder, tokens):
    """Final states of the last token of a sequence that has a cache to itself."""
    ids = torch.tensor([tokens])
    return decoder.forward(ids, decoder.new_cache(1, 4), [0], prefill=True)[:, -1]


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_rows_advance_in_any_company_and_order(backend, name):
    decoder = open_decoder(tiny_model(name), backend=backend)
    generator = torch.Generator().manual_seed(3)
    cache = decoder.new_cache(2, 2)
    cache.add_rows(2)
    held: list[list[int]] = [[] for _ in range(4)]
    for _ in range(12):
        count = int(torch.randint(1, 5, (1,), generator=generator))
        rows = torch.randperm(4, generator=generator)[:count].tolist()
        width = int(torch.randint(1, 4, (1,), generator=generator))
        ids = torch.randint(97, (count, width), generator=generator)
        chosen = cache.select(rows)
        assert chosen.lengths == [len(held[row]) for row in rows]
        states = decoder.forward(ids, chosen, chosen.lengths)
        for place, row in enumerate(rows):
            held[row] += ids[place].tolist()
        counted(cache, [len(tokens) for tokens in held])
        wanted = torch.cat([alone(decoder, held[row]) for row in rows])
        torch.testing.assert_close(states[:, -1], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_branches_serve_one_row_after_another(backend, name):
    """Six branches over three rows that grow meanwhile; some advance while others stand still, winners are absorbed."""
    decoder = open_decoder(tiny_model(name), backend=backend)
    generator = torch.Generator().manual_seed(4)
    cache = decoder.new_cache(3, 4)
    held = [token_ids(1, length, seed=length)[0].tolist() for length in (7, 3, 5)]
    for row, tokens in enumerate(held):
        decoder.forward(torch.tensor([tokens]), cache.select([row]), [0])
    counted(cache, [len(tokens) for tokens in held])
    branches = cache.branches(6, capacity=1)
    for round_ in range(4):
        origins = [round_ % 3, (round_ + 2) % 3]
        places = torch.randperm(6, generator=generator)[:4].tolist()
        branches.point(places, [origins[0], origins[0], origins[1], origins[1]])
        tails: list[list[int]] = [[] for _ in places]
        for tick in range(4):
            going = [0, 1, 2, 3] if tick < 2 else [3, 1]
            ids = torch.randint(97, (len(going), 1), generator=generator)
            starts = [len(held[origins[index // 2]]) + len(tails[index]) for index in going]
            states = decoder.forward(ids, branches.select([places[index] for index in going]), starts)
            for place, index in enumerate(going):
                tails[index].append(int(ids[place]))
                wanted = alone(decoder, held[origins[index // 2]] + tails[index])
                torch.testing.assert_close(states[place : place + 1, -1], wanted, atol=1e-4, rtol=1e-3)
        winners = [1, 3]
        for index in winners:
            branches.lengths[places[index]] += len(tails[index])
        cache.absorb(branches, [places[index] for index in winners])
        for index in winners:
            held[origins[index // 2]] += tails[index]
        assert cache.lengths == [len(tokens) for tokens in held]
    states = decoder.forward(torch.tensor([[1], [2], [3]]), cache, cache.lengths)
    for row in range(3):
        torch.testing.assert_close(states[row], alone(decoder, [*held[row], row + 1]), atol=1e-4, rtol=1e-3)


def test_branches_of_the_early_layers_hold_no_others():
    decoder = open_decoder(tiny_model("llama"), backend="module")
    cache = decoder.new_cache(1, 8)
    ids = token_ids(1, 5)
    decoder.forward(ids[:, :3], cache, [0])
    counted(cache, 3)
    branches = cache.branches(2, layers=2)
    assert branches.layers == 2
    branches.point([1], [0])
    decoder.run(decoder.embed(ids[:, 3:]), 0, 2, branches.select([1]), [3])
    branches.lengths[1] = 5
    cache.absorb(branches, [1])
    own = decoder.new_cache(1, 8)
    decoder.forward(ids, own, [0])
    for layer in (0, 1):
        torch.testing.assert_close(cache.read(layer, 5)[0], own.read(layer, 5)[0], atol=1e-5, rtol=1e-5)
    assert not cache.keys[2][0, :, 3:].any()


def test_what_cannot_be_done_with_chosen_rows_is_refused():
    cache = open_decoder(tiny_model("llama"), backend="module").new_cache(3, 4)
    with pytest.raises(ConfigError, match="branches"):
        cache.point([0], [1])
