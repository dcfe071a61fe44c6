"""Matrix tiles: in bfloat16 a prompt in one pass has the bits of its tokens one by one, and PyTorch's own use of tiles goes on."""

from __future__ import annotations

import copy

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.models import open_decoder
from telltale.models.backends.native import build
from telltale.models.backends.native.step import TILE_TOKENS, NativeDecoder
from telltale.models.int8_weights import quantize

if build.unavailable_reason() is not None or not build.library().telltale_has_tiles():
    pytest.skip("no native step, or a processor without matrix tiles", allow_module_level=True)

SHAPES = [
    {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 101},  # two chains; outputs at the end that fill no tile
    {"hidden_size": 64, "intermediate_size": 544, "vocab_size": 96},  # a depth of one chain
    {"hidden_size": 80, "intermediate_size": 96, "vocab_size": 97},  # a depth that tiles do not take
]


def opened(threads: int = 1, *, int8: bool = False, **shape: int) -> NativeDecoder:
    model = tiny_model("llama-biased", **shape)
    if int8:
        quantize(model, torch.bfloat16)
    decoder = open_decoder(model.to(torch.bfloat16), backend="native", threads=threads)
    assert isinstance(decoder, NativeDecoder)
    return decoder


def token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1))


def one_by_one(decoder: NativeDecoder, ids: torch.Tensor) -> torch.Tensor:
    cache = decoder.new_cache(len(ids), ids.shape[1])
    steps = [decoder.forward(ids[:, i : i + 1], cache, [i] * len(ids)) for i in range(ids.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_have_the_bits_of_their_tokens_one_by_one(shape, int8):
    ids = token_ids(1, 70)
    decoder = opened(int8=int8, **shape)
    wanted = one_by_one(decoder, ids)
    logits = torch.cat([decoder.logits(state) for state in wanted.split(1, 1)], 1)
    for threads in (1, 2):
        other = opened(threads, int8=int8, **shape)
        assert torch.equal(other.logits(wanted), logits)
        for width in (2, 3, 15, 16, 17, 33, 70):
            cache = other.new_cache(1, 70)
            given = [other.forward(ids[:, at : at + width], cache, [at], prefill=True) for at in range(0, 70, width)]
            assert torch.equal(torch.cat(given, 1), wanted), f"{threads} threads, width {width}"


def test_a_long_prompt_goes_through_in_pieces():
    decoder = opened(**SHAPES[0], max_position_embeddings=1024)
    ids = token_ids(2, TILE_TOKENS // 2 + 9)
    whole = decoder.forward(ids, decoder.new_cache(2, ids.shape[1]), [0, 0], prefill=True)
    for row in range(2):
        own = ids[row : row + 1]
        assert torch.equal(whole[row : row + 1], decoder.forward(own, decoder.new_cache(1, own.shape[1]), [0]))


def test_a_long_prompt_makes_its_storage_grow_once():
    decoder = opened(**SHAPES[0], max_position_embeddings=1024)
    cache = decoder.new_cache(1, 8)
    decoder.forward(token_ids(1, 3 * TILE_TOKENS), cache, [0], prefill=True)
    assert cache.generation == 1


def test_sums_are_those_of_float32_up_to_rounding():
    decoder = opened(**SHAPES[1])
    ids = token_ids(1, 40)
    with torch.inference_mode():
        wanted = decoder.model.float()(input_ids=ids, use_cache=False).logits
    decoder.model.to(torch.bfloat16)
    found = decoder.logits(decoder.forward(ids, decoder.new_cache(1, 40), [0], prefill=True))
    # bfloat16 keeps 8 bits: each of some ten roundings of a state may be off by 1/512 of it.
    assert (found - wanted).abs().max() < 4e-2 * wanted.abs().max()


def test_tiles_and_pytorch_do_not_disturb_each_other():
    decoder = opened(**SHAPES[0])
    ids, given = token_ids(1, 40), torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    states, product = [], []
    for width in (40, 1, 40):
        product.append(torch.nn.functional.linear(given, weight))
        states.append(decoder.forward(ids[:, :width], decoder.new_cache(1, 40), [0]))
        product.append(torch.nn.functional.linear(given, weight))
    assert all(torch.equal(one, product[0]) for one in product)
    assert torch.equal(states[0], states[2])
    assert torch.equal(states[0][:, :1], states[1])


def test_prompts_are_read_as_decoding_reads():
    assert opened(**SHAPES[0]).reads_exactly


def test_a_part_of_a_matrix_that_ends_inside_a_tile_is_read_in_its_long_form():
    model = tiny_model("phi3", hidden_size=32, intermediate_size=56)
    quantize(model, torch.bfloat16)
    ours, plain = open_decoder(model, backend="native"), open_decoder(copy.deepcopy(model), backend="native")
    assert (ours.weight_format, plain.weight_format) == ("int8 and bfloat16", "bfloat16")
    ids = token_ids(1, 20)
    wanted = plain.forward(ids, plain.new_cache(1, 20), [0])
    assert torch.equal(one_by_one(ours, ids), wanted)
