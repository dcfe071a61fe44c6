"""Candidates packed as one sequence: the mask slot by slot, and every backend against each sequence run alone."""

from __future__ import annotations

import pytest
import torch

from models.test_attention_rows import own_attention, token_ids
from models.tiny_models import counted, tiny_model
from telltale.models import open_decoder
from telltale.models.attention import Packing, packed_slots

CPU = torch.device("cpu")
CASES = [
    (backend, name, heads)
    for backend, name in [
        ("module", "gpt2"),
        ("module", "gpt_neox"),
        ("module", "llama"),
        ("module", "mistral"),
        ("fused", "qwen3"),
        ("fused", "mistral"),
        ("native", "mistral"),
    ]
    for heads in ((2, 1) if name in ("llama", "mistral") else (None,))
]


def options_of(heads: int | None) -> dict[str, int]:
    return {} if heads is None else {"num_key_value_heads": heads}


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize(
    ("positions", "cuts", "group", "width"),
    [([5, 5, 6], [5, 5, 5], 3, 1), ([2, 4, 7, 3], [2, 1, 7, 3], 2, 2), ([3, 0], [0, 0], 2, 3), ([4, 6], [4, 6], 1, 1)],
)
def test_each_token_sees_its_prefix_and_its_own_branch(positions, cuts, group, width, window):
    own = max(place + width - cut for place, cut in zip(positions, cuts, strict=True))
    given = packed_slots(positions, cuts, width, own, group=group, window=window, device=CPU)
    wanted = torch.zeros(len(positions) // group, 1, group * width, max(cuts) + group * own, dtype=torch.bool)
    for row, (first, cut) in enumerate(zip(positions, cuts, strict=True)):
        for column in range(width):
            for other in range(group):
                for slot in range(own):
                    place = cut + slot
                    seen = other == row % group and first + column - (window or 99) < place <= first + column
                    wanted[row // group, 0, row % group * width + column, max(cuts) + other * own + slot] = seen
            for place in range(cut):
                seen = place > first + column - (window or 99)
                wanted[row // group, 0, row % group * width + column, place] = seen
    assert torch.equal(torch.ones_like(wanted) if given is None else given, wanted)


def test_only_a_token_that_sees_every_slot_needs_no_mask():
    options = {"own": 3, "group": 1, "device": CPU}
    assert packed_slots([6, 6], [4, 4], 1, window=None, **options) is None
    assert packed_slots([6], [4], 1, window=7, **options) is None
    assert packed_slots([6], [4], 1, window=6, **options) is not None
    assert packed_slots([6, 5], [4, 4], 1, window=None, **options) is not None
    assert packed_slots([6, 6], [4, 5], 1, window=None, **options) is not None
    assert packed_slots([5], [4], 1, window=None, **options) is not None


@pytest.mark.long
@pytest.mark.parametrize(("backend", "name", "heads"), CASES)
def test_groups_of_unequal_size_in_any_order_equal_whole_sequences(backend, name, heads):
    """Seven branches of three rows; one row grows between two that branch off it; several tokens of each in a pass."""
    decoder = open_decoder(tiny_model(name, **options_of(heads)), backend=backend)
    prompts = [token_ids(1, length, seed=length) for length in (9, 2, 12)]
    cache = decoder.new_cache(3, 4)
    branches = cache.branches(7, capacity=2)
    origins, cuts = [0, 2, 0, 1, 2, 0, 2], [9, 12, 9, 2, 12, 6, 12]
    for row, length in enumerate((6, 2, 12)):
        decoder.forward(prompts[row][:, :length], cache.select([row]), [0])
    counted(cache, [6, 2, 12])
    branches.point([5], [0])
    decoder.forward(prompts[0][:, 6:], cache.select([0]), [6])
    counted(cache, [9, 2, 12])
    branches.point([0, 1, 2, 3, 4, 6], [0, 2, 0, 1, 2, 2])
    tails, done = token_ids(7, 7, seed=5), [0] * 7
    for rows, width in (([4, 1, 0, 6, 5], 1), ([0, 3, 5], 2), ([5, 0, 2, 4, 1, 3, 6], 3), ([2], 1)):
        ids = torch.cat([tails[row : row + 1, done[row] : done[row] + width] for row in rows])
        states = decoder.forward(ids, branches.select(rows), [cuts[row] + done[row] for row in rows])
        for place, row in enumerate(rows):
            done[row] += width
            alone = torch.cat([prompts[origins[row]][:, : cuts[row]], tails[row : row + 1, : done[row]]], 1)
            wanted = decoder.forward(alone, decoder.new_cache(1, 4), [0], prefill=True)[:, -width:]
            torch.testing.assert_close(states[place : place + 1], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("since", [5, 8, 10])
@pytest.mark.parametrize(("backend", "name", "heads"), CASES)
def test_blocks_of_packed_candidates_equal_the_familys(backend, name, heads, since):
    """Steps that begin before, at and after the place where the candidates fork off; the second pass is two tokens wide."""
    model = tiny_model(name, attention="eager", **options_of(heads))
    decoder = open_decoder(model, backend=backend)
    prompts, tails = token_ids(2, 8), token_ids(3, 4, seed=2)
    cache = decoder.new_cache(2, 8)
    decoder.forward(prompts, cache, [0, 0], prefill=True)
    counted(cache, 8)
    branches, origins = cache.branches(3), [1, 0, 1]
    branches.point(range(3), origins)
    decoder.forward(tails[:, :2], branches, [8] * 3)
    embedded = decoder.embed(tails[:, 2:])
    states, blocks = decoder.run_with_blocks(embedded, 0, 4, branches, [10] * 3, since=[since] * 3, first_layer=2)
    torch.testing.assert_close(states, decoder.run(embedded, 0, 4, branches, [10] * 3), atol=1e-5, rtol=1e-5)
    for row, origin in enumerate(origins):
        attentions = own_attention(model, torch.cat([prompts[origin : origin + 1], tails[row : row + 1]], 1))
        for index, layer in enumerate((2, 3)):
            wanted = attentions[layer].mean(1)[0, 10:, since:]
            torch.testing.assert_close(blocks[index, row], wanted, atol=1e-6, rtol=1e-5)


def test_rows_of_different_prefixes_have_their_positions_back():
    decoder = open_decoder(tiny_model("llama"), backend="fused")
    cache = decoder.new_cache(2, 6)
    counted(cache, [5, 3])
    branches = cache.branches(3)
    branches.point(range(3), [0, 1, 0])
    packing = Packing(branches, [6, 3, 5], 1)
    slots = torch.arange(5 + 2 * 2).expand(2, 2, -1)
    given = packing.by_position(slots, 7)
    assert given[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert given[1, 0, :5].tolist() == [0, 1, 2, 5, 6]
    assert given[2, 0].tolist() == [0, 1, 2, 3, 4, 7, 8]


def test_the_prefix_is_read_once_for_all_candidates(monkeypatch):
    """What the kernel gets for 8 candidates of 100 tokens is their own slots more than for one, not eight prefixes."""
    decoder = open_decoder(tiny_model("llama"), backend="fused")
    cache = decoder.new_cache(1, 100)
    decoder.forward(token_ids(1, 100), cache, [0], prefill=True)
    counted(cache, 100)
    kernel, seen = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: (seen.append(k.shape), kernel(q, k, v, **options))[1],
    )
    decoder.forward(token_ids(8, 1), cache.fork(8), [100] * 8)
    assert set(seen) == {(1, 2, 108, 8)}
