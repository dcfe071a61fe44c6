"""Weights in 8 bits: the model holds the dequantised numbers, and the native step reads the short form with the same bits."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

import telltale
from cli.commands import called, refused
from decode.step_verified.tiny_guards import model as guard_model
from models.tiny_gguf import write_gguf
from models.tiny_models import LLAMA_LIKE, tiny_model
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.backends.native import build
from telltale.models.backends.native.step import NativeDecoder
from telltale.models.int8_weights import gathered, int8_of, packed, quantize
from telltale.models.weights import contents_of
from telltale.serve.open_model import open_served
from telltale.tasks import chains

needs_native = pytest.mark.skipif(build.unavailable_reason() is not None, reason="no native step on this machine")
DTYPES = [torch.float32, torch.bfloat16]
WRITTEN = "matrices were written to after they had been put in 8 bits"


def quantized(name: str = "llama", dtype: torch.dtype = torch.float32, **shape):
    model = tiny_model(name, **shape)
    quantize(model, dtype)
    return model


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    for name, seed in (("target", 0), ("draft", 1)):
        guard_model(seed).save_pretrained(root / name)
        chains.tokenizer().save_pretrained(root / name)
    return root


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "shape"),
    # Phi-3's rows of gate and up are one matrix, cut where tiles of 16 rows end.
    [(name, {"intermediate_size": 64} if name.startswith("phi3") else {}) for name in LLAMA_LIKE]
    + [("llama", {"hidden_size": 80, "intermediate_size": 100, "vocab_size": 101}), ("qwen2", {"hidden_size": 128})],
)
def test_a_pass_of_any_width_has_the_bits_of_the_dequantised_matrices(name, shape, dtype):
    model = quantized(name, dtype, **shape)
    ours, plain = open_decoder(model, backend="native"), open_decoder(copy.deepcopy(model), backend="native")
    assert (ours.weight_format, plain.weight_format) == ("int8", str(dtype).removeprefix("torch."))
    ids = token_ids(15)
    wanted = plain.forward(ids, plain.new_cache(1, 15), [0])
    logits = plain.logits(wanted)
    for width in (1, 2, 3, 4, 5, 6, 7, 13, 15):
        cache = ours.new_cache(1, 15)
        pieces = [ours.forward(ids[:, i : i + width], cache, [i]) for i in range(0, 15, width)]
        assert torch.equal(torch.cat(pieces, 1), wanted), width
        assert torch.equal(ours.logits(wanted[:, :width]), logits[:, :width]), width


@needs_native
def test_drafts_and_threads_change_nothing():
    model = quantized("qwen3", vocab_size=101)
    ids = token_ids(9)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 9:]
    decoder = open_decoder(model, backend="native", threads=1)
    assert torch.equal(Autoregressive(decoder).generate(ids, max_new_tokens=12).tokens, wanted)
    drafted = SelfSpeculative(decoder, exit_layer=2, draft_length=3).generate(ids, max_new_tokens=12)
    assert torch.equal(drafted.tokens, wanted)
    both = open_decoder(model, backend="native", threads=2)
    states = [one.forward(ids[:, :3], one.new_cache(1, 3), [0]) for one in (decoder, both)]
    assert torch.equal(*states)
    assert torch.equal(decoder.logits(states[0]), both.logits(states[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_holds_the_dequantised_numbers(dtype):
    before, model = tiny_model("llama"), quantized("llama", dtype)
    weight, own = model.model.layers[1].mlp.down_proj.weight, before.model.layers[1].mlp.down_proj.weight.detach()
    short = int8_of(weight)
    assert torch.equal(weight.detach(), short.dequantized().to(dtype))
    assert short.nbytes / own.nbytes < 0.27 * 64 / 56 + 0.01  # 56 columns take two groups
    step = torch.nn.functional.pad(own, (0, 8)).unflatten(-1, (-1, 32)).abs().amax(-1) / 127
    error = torch.nn.functional.pad((short.dequantized() - own).abs(), (0, 8)).unflatten(-1, (-1, 32)).amax(-1)
    assert bool((error <= 0.51 * step).all())
    assert int8_of(model.model.embed_tokens.weight) is int8_of(model.lm_head.weight)  # they are tied
    assert int8_of(model.model.norm.weight) is None


@pytest.mark.parametrize("largest", [127, 100, -128])
def test_numbers_on_a_grid_come_out_as_they_were(largest):
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(6, 3, 1, generator=generator) * 0.01 * 2.0 ** torch.randint(-9, 1, (6, 3, 1))).half().float()
    values = torch.randint(-60, 61, (6, 3, 32), generator=generator)
    values[..., 5] = 127
    values[2:4, 1, 5] = largest
    values[4, 2] = 0
    given = (scales * values).flatten(1)
    short = packed("given", given)
    assert torch.equal(short.dequantized(), given)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_at_every_scale_has_the_bits_of_pytorchs_rounding(dtype):
    # Row s of the head has the s-th finite half-precision number as scale of its eight groups, and all 256 values.
    scales = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    values = torch.arange(-128, 128, dtype=torch.int8).expand(len(scales), -1).clone()
    values[0] = 0
    model = quantized("llama", dtype, hidden_size=256, vocab_size=len(scales), tie_word_embeddings=False)
    short, by_block = int8_of(model.lm_head.weight), (-1, 4, 8)
    short.values.copy_(values.view(*by_block, 32).transpose(1, 2))
    short.scales[: 8 * len(scales)] = scales.unsqueeze(1).expand(-1, 8).reshape(by_block).transpose(1, 2).flatten()
    with torch.no_grad():
        model.lm_head.weight.copy_(values.float() * scales.float().unsqueeze(1))
    ours, plain = open_decoder(model, backend="native"), open_decoder(copy.deepcopy(model), backend="native")
    assert (ours.weight_format, plain.weight_format) == ("int8", str(dtype).removeprefix("torch."))
    states = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for width in (1, 2):
        assert torch.equal(ours.logits(states[:, :width]), plain.logits(states[:, :width]))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_and_threads_change_no_bit(dtype):
    model = quantized("llama", dtype, hidden_size=80, intermediate_size=100, vocab_size=101)
    plain = open_decoder(copy.deepcopy(model), backend="native", threads=1)
    ids = torch.randint(97, (3, 6), generator=torch.Generator().manual_seed(2))
    wanted = torch.cat([plain.forward(row[None], plain.new_cache(1, 6), [0]) for row in ids])
    for threads in (1, 2):
        ours = open_decoder(model, backend="native", threads=threads)
        assert ours.weight_format == "int8"
        for rows in (1, 2, 3):
            for width in (1, 2, 3):
                cache = ours.new_cache(rows, 6)
                steps = [ours.forward(ids[:rows, i : i + width], cache, [i] * rows) for i in range(0, 6, width)]
                assert torch.equal(torch.cat(steps, 1), wanted[:rows]), (threads, rows, width)


@pytest.mark.parametrize("order", ["pairs", "eights"])
def test_the_orders_of_vectors_hold_the_same_numbers(order):
    short = packed("given", torch.randn(7, 80, generator=torch.Generator().manual_seed(0)))
    wanted, natural = short.dequantized(), short.values.clone()
    short.arrange(order)
    place = torch.arange(32)
    lane, step = place // 4, place % 4
    column = step // 2 * 16 + lane * 2 + step % 2 if order == "pairs" else step * 8 + lane
    assert torch.equal(short.values, natural[..., column])
    assert torch.equal(short.dequantized(), wanted)
    assert torch.equal(gathered(short, torch.tensor([6, 0, 3])).dequantized(), wanted[[6, 0, 3]])
    assert short.addresses(0, 7, "rows") is None
    assert short.addresses(4, 3, order) == (short.values[1].data_ptr(), short.scales.data_ptr() + 4 * 3 * 2)
    short.arrange("tiles")  # another order is not put in its place
    assert short.order == order


@pytest.mark.parametrize(("rows", "columns"), [(35, 96), (64, 32), (7, 64)])
def test_the_order_of_tiles_holds_the_same_numbers(rows, columns):
    short = packed("given", torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    wanted, values = short.dequantized(), short.values.clone()
    assert short.addresses(0, rows, "tiles") is None
    for _ in range(2):  # the second time nothing is left to do
        short.arrange("tiles")
        assert torch.equal(short.dequantized(), wanted)
    assert bool((short.values != values).any()) == (rows >= 16)
    assert short.addresses(0, rows, "rows") is None
    assert short.addresses(0, rows, "tiles") == (short.values.data_ptr(), short.scales.data_ptr())
    assert short.addresses(8, 16, "tiles") is None
    assert rows <= 24 or short.addresses(0, 24, "tiles") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_in_q8_0_is_taken_as_it_is(tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(file, in_8_bits=True)
    model, _ = telltale.load(file, dtype=dtype, weights="int8")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for ours, theirs in (
        (model.model.layers[0].self_attn.q_proj.weight, "blk.0.attn_q.weight"),
        (model.model.layers[3].mlp.down_proj.weight, "blk.3.ffn_down.weight"),
        (model.lm_head.weight, "output.weight"),
    ):
        held = torch.from_numpy(gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(int8_of(ours).dequantized(), held)
        assert torch.equal(ours.detach(), held.to(ours.dtype))
    if build.unavailable_reason() is None:
        found = [
            Autoregressive(open_decoder(one, backend=backend)).generate(
                token_ids(5), max_new_tokens=12, eos_token_id=[]
            )
            for one, backend in ((model, "native"), (copy.deepcopy(model), "native"), (model, "module"))
        ]
        assert torch.equal(found[0].tokens, found[1].tokens)
        assert dtype == "bfloat16" or torch.equal(found[0].tokens, found[2].tokens)


@needs_native
def test_what_is_written_into_a_matrix_counts_from_the_next_request_on(folders):
    target, tokenizer = telltale.load(folders / "target", weights="int8")
    draft, _ = telltale.load(folders / "draft", weights="int8")
    config = StepVerifiedConfig(delimiter="a", max_step_tokens=8, candidates=2, fallback="plain", policy="speculative")
    guard = StepVerified(target, draft, tokenizer, config)
    assert (guard.target.weight_format, guard.draft.weight_format) == ("int8", "int8")
    ids = [tokenizer("Fay has 0 .")["input_ids"]]

    def check():
        wanted = Autoregressive(copy.deepcopy(target)).generate(torch.tensor(ids), max_new_tokens=12, eos_token_id=[])
        assert guard.generate(ids, max_new_tokens=12, eos_token_id=[]).tokens.tolist() == wanted.tokens.tolist()

    check()
    kept = target.lm_head.weight.data.clone()
    target.lm_head.weight.data.copy_(kept.flip(0))
    with pytest.warns(UserWarning, match=WRITTEN):
        check()
    assert guard.target.weight_format == "int8 and float32"
    target.lm_head.weight.data.copy_(kept)
    check()
    assert guard.target.weight_format == "int8"


@needs_native
def test_the_command_and_the_server_take_the_option(folders, capsys):
    options = ["generate", folders / "target", "--prompt", "Fay has 0 .", "--max-new-tokens", "8", "--threads", "1"]
    found = json.loads(called([*options, "--weights", "int8", "--json"], capsys).out)
    served = open_served(folders / "target", weights="int8")
    assert served.entry()["telltale"]["weights"] == "int8"
    ids = served.decoder.tokenizer("Fay has 0 .")["input_ids"]
    assert (
        served.decoder.generate([ids], max_new_tokens=8).tokens[0].tolist()[: len(found["tokens"])] == found["tokens"]
    )
    refused([*options, "--weights", "int4"], capsys, "weights='int4'", "'int8'")
    refused([*options, "--weights", "int8", "--dtype", "float16"], capsys, "float16", "bfloat16")


def test_what_cannot_be_put_in_8_bits_is_refused_by_name(folders):
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight .* part of a Conv1D"):
        quantize(tiny_model("gpt2"), torch.float32)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        quantize(model, torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e9
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight has numbers up to 1e\+09"):
        quantize(model, torch.float32)
    for device in ("cuda", 0):  # 0 is PyTorch's short name of the first accelerator
        with pytest.raises(ConfigError, match=f"on the CPU; device='{device}'"):
            telltale.load(folders / "target", weights="int8", device=device)
    assert int8_of(model.lm_head.weight) is None


@needs_native
def test_scales_below_the_normal_range_are_read_where_denormals_are_taken_for_zero():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    quantize(model, torch.float32)
    ids = token_ids(3)
    plain = open_decoder(copy.deepcopy(model), backend="native")
    wanted = plain.forward(ids, plain.new_cache(1, 3), [0])
    ours = open_decoder(model, backend="native", threads=1)
    cache = ours.new_cache(1, 3)
    flushed = torch.set_flush_denormal(True)
    try:
        found = ours.forward(ids, cache, [0])
        ours.look_at_weights()
    finally:
        torch.set_flush_denormal(False)
    if not flushed:
        pytest.skip("this processor has no such mode")
    assert ours.weight_format == "int8"
    assert torch.equal(found, wanted)


@needs_native
def test_the_format_says_so_where_some_matrices_are_read_in_their_long_form():
    # Queries, keys and values lie in one matrix, and keys begin at row 30: inside of four rows.
    shape = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 50}
    model = quantized("phi3", **shape)
    ours, plain = open_decoder(model, backend="native"), open_decoder(copy.deepcopy(model), backend="native")
    assert (ours.weight_format, plain.weight_format) == ("int8 and float32", "float32")
    ids = token_ids(3)
    states = [one.forward(ids, one.new_cache(1, 3), [0]) for one in (ours, plain)]
    assert torch.equal(*states)
    replaced = quantized("llama")
    decoder = open_decoder(replaced, backend="native")
    layer = replaced.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight.detach().flip(0))
    decoder.new_cache(1, 1)
    assert decoder.weight_format == "int8 and float32"


@needs_native
def test_a_request_has_both_forms_compared_once_for_each_decoder(monkeypatch):
    asked: list[object] = []
    own = NativeDecoder.look_at_weights
    monkeypatch.setattr(NativeDecoder, "look_at_weights", lambda self: (asked.append(self), own(self))[1])
    model, ids = guard_model(0), [[5, 6, 7]]
    quantize(model, torch.float32)
    for config in (StepVerifiedConfig(policy="target"), StepVerifiedConfig(policy="speculative", exit_layer=1)):
        guard = StepVerified(model, None, chains.tokenizer(), config, backend="native")
        asked.clear()
        guard.generate(ids, max_new_tokens=3)
        assert asked == [guard.target]
        engine = guard.engine(prefix_cache=1 << 20)
        for write in (False, True):
            if write:
                model.lm_head.weight.data.neg_()
            asked.clear()
            [row] = guard.rows(guard.request(ids, max_new_tokens=3, eos_token_id=[]))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                engine.admit(row)
            assert [WRITTEN in str(one.message) for one in told] == [True] * write
            while engine.rows:
                engine.advance()
            assert asked == [guard.target]
            wanted = Autoregressive(copy.deepcopy(model)).generate(torch.tensor(ids), max_new_tokens=3, eos_token_id=[])
            assert row.tokens[-3:] == wanted.tokens[0].tolist()
        model.lm_head.weight.data.neg_()
    asked.clear()
    drafted = SelfSpeculative(model, exit_layer=1, draft_length=2, backend="native")
    asked.clear()
    drafted.generate(torch.tensor(ids), max_new_tokens=3)
    assert asked == [drafted.decoder]


@needs_native
def test_one_who_is_alone_with_the_weights_compares_them_when_pytorch_has_counted_a_write(monkeypatch):
    model = guard_model(0)
    quantize(model, torch.float32)
    guard = StepVerified(model, None, chains.tokenizer(), StepVerifiedConfig(policy="target"), backend="native")
    engine, asked = guard.engine(shared=False), []
    monkeypatch.setattr(guard.target, "look_at_weights", lambda: asked.append(1))
    for expected in (1, 1, 2):
        [row] = guard.rows(guard.request([[5, 6, 7]], max_new_tokens=2))
        engine.admit(row)
        while engine.rows:
            engine.advance()
        assert len(asked) == expected
        if row.number == 1:
            with torch.no_grad():
                model.lm_head.weight.neg_()


def test_matrices_that_were_compared_are_not_summed_as_well():
    model = guard_model(0)
    quantize(model, torch.float32)
    whole, compared = contents_of(model), contents_of(model, compared=True)
    short = [int8_of(parameter) is not None for parameter in model.parameters()]
    assert [one != other for one, other in zip(whole, compared, strict=True)] == short
    model.model.norm.weight.data[0] += 1
    assert contents_of(model, compared=True) != compared
