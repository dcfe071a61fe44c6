"""Products by vectors: right to rounding at every width, shape and number of threads. Where the processor has AVX2 and no AVX-512
prompts have the bits of their tokens one by one."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.models import open_decoder
from telltale.models.backends.native import build
from telltale.models.backends.native.step import VECTOR_TOKENS, NativeDecoder
from telltale.models.int8_weights import quantize

if build.unavailable_reason() is not None:
    pytest.skip("no native step", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 40)
only_avx2 = pytest.mark.skipif(
    not build.library().telltale_has_wide_products(), reason="prompts are read by PyTorch or by tiles on this processor"
)


def opened(dtype: torch.dtype, threads: int = 1, *, int8: bool = False, **shape: int) -> NativeDecoder:
    model = tiny_model("llama-biased", num_hidden_layers=2, head_dim=16, **shape)
    if int8:
        quantize(model, dtype)
    decoder = open_decoder(model.to(dtype), backend="native", threads=threads)
    assert isinstance(decoder, NativeDecoder)
    return decoder


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(96, (1, length), generator=torch.Generator().manual_seed(1))


# Depths: whole chunks; a rest of 8, which is no whole chunk; two parts, the second with a rest; three parts.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [48, 72, 1000, 1600])
def test_a_product_is_right_to_rounding_at_every_width(hidden, dtype):
    decoder = opened(dtype, hidden_size=hidden, intermediate_size=32, vocab_size=101)
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(2, (1, max(WIDTHS), hidden), generator=generator).to(dtype) * 2 - 1
    decoder.parts.norm.weight.data.fill_(1.0)
    weight = decoder.parts.head.weight
    weight.data.copy_(torch.randn(weight.shape, generator=generator))
    # The norm of signs is the signs times 1 / sqrt(1 + epsilon), which bfloat16 rounds to 1.
    scale = (1.0 + decoder.parts.norm.variance_epsilon) ** -0.5 if dtype is torch.float32 else 1.0
    wanted = signs.double() * scale @ weight.double().T
    # float32: at least eight sums, of at most hidden / 8 terms each, which are rounded twice where multiplying and adding are two
    # instructions; eight more for the norm and the sum of the sums. bfloat16: half a unit in the last of eight places.
    error = 2**-24 * (hidden / 4 + 8) * weight.double().abs().sum(1).max() / hidden**0.5
    if dtype is torch.bfloat16:
        error = error + wanted.abs() * 2**-8
    alone = torch.cat([decoder.logits(state) for state in signs.split(1, 1)], 1)
    assert bool(((alone.double() - wanted).abs() <= error).all())
    two = opened(dtype, 2, hidden_size=hidden, intermediate_size=32, vocab_size=101)
    two.parts.norm.weight.data.fill_(1.0)
    two.parts.head.weight.data.copy_(weight)
    for width in WIDTHS:
        assert torch.equal(decoder.logits(signs[:, :width]), alone[:, :width]), width
        assert torch.equal(two.logits(signs[:, :width]), alone[:, :width]), width


@only_avx2
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(72, 808), (64, 1600)])
def test_prompts_have_the_bits_of_their_tokens_one_by_one(shape, dtype, int8):
    sizes = {"hidden_size": shape[0], "intermediate_size": shape[1], "vocab_size": 101}
    length = VECTOR_TOKENS + 7
    ids = token_ids(length)
    decoder = opened(dtype, int8=int8, **sizes)
    assert decoder.reads_exactly
    cache = decoder.new_cache(1, length)
    wanted = torch.cat([decoder.forward(ids[:, i : i + 1], cache, [i]) for i in range(length)], 1)
    for threads in (1, 2):
        other = opened(dtype, threads, int8=int8, **sizes)
        for width in (17, 50, length):
            cache = other.new_cache(1, length)
            given = [
                other.forward(ids[:, at : at + width], cache, [at], prefill=True) for at in range(0, length, width)
            ]
            assert torch.equal(torch.cat(given, 1), wanted), f"{threads} threads, width {width}"


@only_avx2
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 128])
def test_long_contexts_agree_with_the_family(head_dim, dtype):
    model = tiny_model("qwen3", dtype=dtype, head_dim=head_dim, num_hidden_layers=2, max_position_embeddings=512)
    decoder = open_decoder(model, backend="native", threads=1)
    ids = token_ids(300)
    cache = decoder.new_cache(1, 300)
    found = [
        decoder.forward(ids[:, :299], cache, [0], prefill=True)[:, -1:],
        decoder.forward(ids[:, 299:], cache, [299]),
    ]
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits.float()[:, -2:]
    error = (decoder.head(torch.cat(found, 1)).float() - own).abs().max() / own.abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 4e-2)
