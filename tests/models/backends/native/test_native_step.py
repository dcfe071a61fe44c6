"""The native step: the same bits whatever shares the pass, one-call loops equal to composed ones, agreement in bfloat16."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import LLAMA_LIKE, counted, tiny_model
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.models import open_decoder
from telltale.models.backends.native import build
from telltale.models.backends.native.step import NativeDecoder
from telltale.models.decoder import Decoder

without_compiler = pytest.mark.skipif(
    "no C++ compiler" in (build.unavailable_reason() or ""), reason="no C++ compiler on this machine: nothing to test"
)
pytestmark = without_compiler
DTYPES = [torch.float32, torch.bfloat16]
LONGEST = 20


def native(name: str = "llama", *, threads: int = 1, **options) -> NativeDecoder:
    decoder = open_decoder(tiny_model(name, **options), backend="native", threads=threads)
    assert isinstance(decoder, NativeDecoder)
    return decoder


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_by_one(decoder: NativeDecoder, ids: torch.Tensor, *, steps: int) -> torch.Tensor:
    """States of a single row after all layers, each token in a pass of its own."""
    cache = decoder.new_cache(1, steps)
    return torch.cat([decoder.forward(ids[:, i : i + 1], cache, [i]) for i in range(steps)], 1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "phi3-partial", "llama-biased"])
def test_a_token_has_the_same_bits_at_every_width(name, dtype):
    decoder = native(name, dtype=dtype)
    ids = token_ids(1, LONGEST)
    wanted = one_by_one(decoder, ids, steps=LONGEST)
    wanted_logits = torch.cat([decoder.head(state) for state in wanted.split(1, 1)], 1)
    assert torch.equal(decoder.head(wanted), wanted_logits)
    for width in range(2, LONGEST + 1):
        cache = decoder.new_cache(1, LONGEST)
        given = [decoder.forward(ids[:, i : i + width], cache, [i]) for i in range(0, LONGEST, width)]
        assert torch.equal(torch.cat(given, 1), wanted), f"width {width}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "feed_forward"), [(48, 100), (80, 56), (128, 352)])
def test_shapes_that_no_vector_divides_have_the_same_bits_at_every_width(hidden, feed_forward, dtype):
    decoder = native(dtype=dtype, hidden_size=hidden, intermediate_size=feed_forward, vocab_size=101)
    ids = token_ids(1, 13)
    wanted = one_by_one(decoder, ids, steps=13)
    for width in range(2, 14):
        assert torch.equal(decoder.forward(ids[:, :width], decoder.new_cache(1, 13), [0]), wanted[:, :width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 80, 128, 256])
def test_every_head_size_agrees_with_the_family_and_across_widths(head_dim, dtype):
    model = tiny_model("qwen3", dtype=dtype, head_dim=head_dim, num_hidden_layers=2)
    decoder = open_decoder(model, backend="native", threads=1)
    ids = token_ids(1, 11)
    wanted = one_by_one(decoder, ids, steps=11)
    assert torch.equal(decoder.forward(ids, decoder.new_cache(1, 11), [0]), wanted)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits.float()
    error = (decoder.head(wanted).float() - own).abs().max() / own.abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 4e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_ragged_batch_have_the_bits_of_single_rows(dtype):
    decoder = native("mistral", dtype=dtype)
    lengths = [9, 2, 14, 5]
    ids = token_ids(4, LONGEST)
    cache = decoder.new_cache(4, LONGEST)
    decoder.forward(ids[:, :14], cache, [0] * 4)
    tails = token_ids(4, 3, seed=3)
    given = decoder.forward(tails, cache, lengths)
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row : row + 1, :length], tails[row : row + 1]], 1)
        wanted = one_by_one(decoder, alone, steps=length + 3)[:, length:]
        assert torch.equal(given[row : row + 1], wanted)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_a_second_thread_changes_no_bit(name, dtype):
    one, two = native(name, dtype=dtype), native(name, dtype=dtype, threads=2)
    ids = token_ids(2, 7)
    states = [d.forward(ids, d.new_cache(2, 7), [0, 0]) for d in (one, two)]
    assert torch.equal(*states)
    assert torch.equal(one.head(states[0]), two.head(states[0]))
    runs = [d.decode_greedy(5, 0, count=12, cache=d.new_cache(1, 1)) for d in (one, two)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [1, 2, 3, 6, 8])
def test_a_fork_has_the_bits_of_independent_rows(shared, dtype):
    decoder = native("mistral", dtype=dtype, sliding_window=9)
    prompt, tails = token_ids(1, shared), token_ids(3, 7, seed=7)
    cache = decoder.new_cache(1, shared)
    decoder.forward(prompt, cache, [0])
    counted(cache, shared)
    fork = cache.fork(3, capacity=2)
    given = torch.cat([decoder.forward(tails[:, i : i + 1], fork, [shared + i] * 3) for i in range(7)], 1)
    for row in range(3):
        alone = torch.cat([prompt, tails[row : row + 1]], 1)
        assert torch.equal(given[row : row + 1], one_by_one(decoder, alone, steps=shared + 7)[:, shared:])


def test_a_fork_outlives_the_growth_of_its_prefix():
    decoder = native()
    cache = decoder.new_cache(1, 4)
    decoder.forward(token_ids(1, 4), cache, [0])
    counted(cache, 4)
    fork = cache.fork(2)
    before = decoder.forward(token_ids(2, 1), fork, [4, 4])
    cache.reserve(4096)
    for keys in cache.keys:
        keys.fill_(7.0)
    assert torch.equal(decoder.forward(token_ids(2, 1), fork, [4, 4]), before)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_one_call_loops_equal_the_composed_ones(name, dtype):
    decoder = native(name, dtype=dtype)
    composed, called = decoder.new_cache(1, 4), decoder.new_cache(1, 4)
    wanted = Decoder.decode_greedy(decoder, 5, 0, count=9, cache=composed)
    assert decoder.decode_greedy(5, 0, count=9, cache=called) == wanted
    assert called.layer_executions() == composed.layer_executions() == [9] * decoder.layers
    for exit_layer in (1, 3):
        options = {"exit_layer": exit_layer, "length": 4}
        drafts, states = decoder.draft_greedy([wanted[-1]], [9], cache=called, **options)
        wanted_drafts, wanted_states = Decoder.draft_greedy(decoder, [wanted[-1]], [9], cache=composed, **options)
        assert drafts == wanted_drafts
        assert torch.equal(states, wanted_states)
        verify = {"exit_layer": exit_layer}
        verified = decoder.verify_greedy(states, [9], cache=called, **verify)
        assert verified == Decoder.verify_greedy(decoder, wanted_states, [9], cache=composed, **verify)
    for one, other in zip(called.keys + called.values, composed.keys + composed.values, strict=True):
        assert torch.equal(one[:, :, :14], other[:, :, :14])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batched_draft_equals_the_composed_one(dtype):
    decoder = native("gemma", dtype=dtype)
    ids, lengths = token_ids(3, 8), [8, 3, 5]
    results = []
    for draft in (decoder.draft_greedy, lambda *a, **k: Decoder.draft_greedy(decoder, *a, **k)):
        cache = decoder.new_cache(3, 8)
        decoder.forward(ids, cache, [0, 0, 0])
        results.append((draft([1, 2, 3], lengths, exit_layer=2, length=4, cache=cache), cache.layer_executions()))
    (drafts, states), counted = results[0]
    (wanted, wanted_states), wanted_counted = results[1]
    assert drafts == wanted
    assert torch.equal(states, wanted_states)
    assert counted == wanted_counted


def test_the_loops_end_at_a_stop_token():
    decoder = native("qwen3")
    free = decoder.decode_greedy(5, 0, count=12, cache=decoder.new_cache(1, 16))
    stop = free[5]
    first = free.index(stop)
    assert (
        decoder.decode_greedy(5, 0, count=12, cache=decoder.new_cache(1, 16), stop_tokens=[96, stop])
        == free[: first + 1]
    )
    options = {"exit_layer": 3, "length": 8}
    [draft], _ = decoder.draft_greedy([5], [0], cache=decoder.new_cache(1, 16), **options)
    at = draft.index(draft[4])
    cache = decoder.new_cache(1, 16)
    [ended], states = decoder.draft_greedy([5], [0], cache=cache, stop_tokens=[draft[4]], **options)
    assert ended == draft[: at + 1]
    assert states.shape[1] == at + 2
    assert cache.layer_executions() == [at + 2] * 3 + [0]


def test_a_draft_of_no_tokens_is_the_catch_up_alone():
    decoder = native()
    cache = decoder.new_cache(1, 4)
    drafts, states = decoder.draft_greedy([5], [0], exit_layer=2, length=0, cache=cache)
    assert drafts == [[]]
    assert torch.equal(states, decoder.run(decoder.embed(torch.tensor([[5]])), 0, 2, decoder.new_cache(1, 4), [0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_goes_on_over_cache_growth_like_the_family(dtype):
    model = tiny_model("qwen2-window", dtype=dtype)
    decoder = open_decoder(model, backend="native", threads=1)
    cache = decoder.new_cache(1, 1)
    tokens = [5, *decoder.decode_greedy(5, 0, count=100, cache=cache)]
    assert cache.capacity == 128
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    top = logits.topk(2).values
    chosen = logits[:-1].gather(1, torch.tensor(tokens[1:]).view(-1, 1)).view(-1)
    tolerance = 1e-3 if dtype is torch.float32 else 0.06
    assert ((top[:-1, 0] - chosen) <= tolerance * top[:-1, 0].abs()).all()


def test_equal_logits_give_the_lowest_token():
    model = tiny_model("llama-biased")
    with torch.no_grad():
        model.lm_head.weight[1:] = model.lm_head.weight[0]
    decoder = open_decoder(model, backend="native", threads=1)
    assert set(decoder.decode_greedy(5, 0, count=4, cache=decoder.new_cache(1, 4))) == {0}
    assert decoder.greedy(decoder.embed(token_ids(2, 3))).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_are_an_error_in_every_greedy_call(dtype):
    model = tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    decoder = NativeDecoder(model, threads=1)
    cache = decoder.new_cache(1, 8)
    state = decoder.forward(token_ids(1, 2), cache, [0])
    for call in (
        lambda: decoder.greedy(state),
        lambda: decoder.decode_greedy(5, 0, count=3, cache=cache),
        lambda: decoder.draft_greedy([5], [0], exit_layer=2, length=3, cache=cache),
        lambda: decoder.verify_greedy(state, [0], exit_layer=1, cache=cache),
        lambda: decoder.score_greedy([5, 6], 0, cache=cache),
    ):
        with pytest.raises(NumericalError, match="NaN"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_trained_in_place_or_moved_count_from_the_next_cache_on(dtype):
    model = tiny_model("qwen3", dtype=dtype)
    decoder = open_decoder(model, backend="native", threads=1)
    for change in (lambda p: p.mul_(1.25), lambda p: setattr(p, "data", p.data.clone() * 0.5)):
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter)
        fresh = open_decoder(model, backend="native", threads=1)
        logits = [d.head(d.forward(token_ids(1, 4), d.new_cache(1, 4), [0])) for d in (decoder, fresh)]
        assert torch.equal(*logits)


def test_foreign_states_and_tokens_are_refused():
    decoder = native()
    cache = decoder.new_cache(1, 8)
    with pytest.raises(ConfigError, match="bfloat16"):
        decoder.run(torch.zeros(1, 1, 32, dtype=torch.bfloat16), 0, 1, cache, [0])
    for token in (97, -1):
        with pytest.raises(DataError, match=r"0\.\.96"):
            decoder.decode_greedy(token, 0, count=1, cache=cache)
        with pytest.raises(DataError, match=r"0\.\.96"):
            decoder.score_greedy([3, token], 0, cache=cache)


def test_bfloat16_is_as_close_to_float64_as_the_familys_own_bfloat16():
    """Both round at the same places: their errors against the unrounded model are of one size."""
    exact = tiny_model("llama", dtype=torch.float32)
    rounded = tiny_model("llama", dtype=torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    ids = token_ids(4, 24)
    decoder = open_decoder(rounded, backend="native", threads=1)
    with torch.inference_mode():
        wanted = exact.double()(input_ids=ids, use_cache=False).logits
        own = rounded(input_ids=ids, use_cache=False).logits.double()
    given = decoder.head(decoder.forward(ids, decoder.new_cache(4, 24), [0] * 4)).double()
    assert (given - wanted).std() < 1.2 * (own - wanted).std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 40, 300])
def test_passes_beyond_the_positions_of_a_model_are_refused(width, dtype):
    decoder = native(dtype=dtype)
    given = torch.zeros(2, width, decoder.hidden_size, dtype=dtype)
    first = decoder.max_positions - width + 1
    cache = decoder.new_cache(2, 8)
    for prefill in (True, False):
        with pytest.raises(ConfigError, match="the model has 128"):
            decoder.run(given, 0, 1, cache, [0, max(0, first)], prefill=prefill)
    with pytest.raises(ConfigError, match="the model has 128"):
        decoder.run_with_blocks(given, 0, 1, cache, [0, max(0, first)], since=[0, 0], first_layer=0)
    assert cache.layer_executions() == [0] * decoder.layers
