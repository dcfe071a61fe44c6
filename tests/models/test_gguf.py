"""A checkpoint in llama.cpp's format is opened like a folder, or refused with a reason."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import telltale
from models.tiny_gguf import TOKENS, write_gguf
from telltale.align.judge.features import open_backbone
from telltale.cli import run
from telltale.decode import Autoregressive
from telltale.errors import CheckpointError, DataError, MissingExtraError, UnsupportedModelError
from telltale.models.gguf import is_gguf
from telltale.serve.open_model import open_served

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "tiny.gguf"


@pytest.fixture(scope="module")
def written(file):
    return write_gguf(file)


def test_the_model_is_the_one_that_was_written(file, written):
    model, tokenizer = telltale.load(file)
    assert is_gguf(file)
    assert model.dtype == torch.float32
    ids = torch.tensor([[5, 60, 7, 200, 9]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, written(ids).logits)
    decoded = Autoregressive(model).generate(ids, max_new_tokens=12, eos_token_id=[])
    assert torch.equal(decoded.tokens, written.generate(ids, max_new_tokens=12, do_sample=False)[:, 5:])
    assert model.generation_config.eos_token_id == [len(TOKENS) - 1]
    assert telltale.load(file, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert len(tokenizer) == len(TOKENS)


def test_what_was_opened_can_be_saved_as_a_folder(file, written, tmp_path):
    model, tokenizer = telltale.load(file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same = telltale.load(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert same("then 12").input_ids == tokenizer("then 12").input_ids


def test_tokenizer_and_chat_template_come_along(file, written):
    tokenizer = telltale.load(file)[1]
    ids = tokenizer(" the 12<|im_end|>").input_ids
    assert [TOKENS[token] for token in ids] == ["Ġthe", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == " the 12<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False)
    assert text == "<|im_start|>12<|im_end|>"


@pytest.mark.parametrize(("split", "pieces"), [("gpt-2", ["12"]), ("smollm", ["1", "2"]), ("llama-bpe", ["12"])])
def test_text_is_split_the_way_the_file_says(split, pieces, tmp_path):
    write_gguf(tmp_path / "own.gguf", split=split)
    tokenizer = telltale.load(tmp_path / "own.gguf")[1]
    assert [TOKENS[token] for token in tokenizer("12").input_ids] == pieces


def test_an_unknown_way_of_splitting_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "own.gguf", split="who-knows")
    with pytest.raises(DataError, match=r"'who-knows' \(tokenizer\.ggml\.pre\)"):
        telltale.load(tmp_path / "own.gguf")
    write_gguf(tmp_path / "other.gguf", kind="llama", add_space_prefix=False)
    with pytest.raises(DataError, match="puts no space before the text"):
        telltale.load(tmp_path / "other.gguf")


@pytest.mark.long
@pytest.mark.parametrize(
    "asked",
    [
        ["generate", "FILE", "--prompt", "the", "--max-new-tokens", "3"],
        ["layerskip", "diagnose", "FILE", "DATA", "--tokens", "120", "--length", "20"],
        ["plan", "FILE", "--workers", "2", "--bandwidth", "1GB/s", "--sequence-length", "16"],
    ],
    ids=lambda asked: asked[0],
)
def test_commands_take_the_file(asked, file, written, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the 12 the 34 " * 40)
    names = {"FILE": str(file), "DATA": str(tmp_path / "text.txt")}
    assert run([names.get(word, word) for word in asked] + ["--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_judge_and_a_server_take_the_file(file, written):
    backbone = open_backbone(file, context_length=64)
    ids = torch.tensor([[5, 60, 7]])
    with torch.inference_mode():
        assert torch.equal(backbone.model(ids).last_hidden_state, written.model(ids).last_hidden_state)
    served = open_served(file)
    assert served.decoder.target.model.config.model_type == "qwen2"


def test_a_header_is_parsed_once(file, written, monkeypatch):
    gguf = importlib.import_module("gguf")
    parsed, own = [], gguf.GGUFReader.__init__

    def counted(self, path, mode="r"):
        parsed.append(path)
        own(self, path, mode)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    telltale.load(file)
    assert parsed == [str(file)]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: raw[:10], "does not begin as a GGUF file does"),
        (lambda raw: raw[:4] + b"\x09" + raw[5:], "version 9"),
        (lambda raw: raw.replace(b"qwen2.block_count", b"qwen2.block_coynt"), "lacks weights"),
        (lambda raw: raw[:300] + b"\xff" * 300 + raw[600:], "truncated or damaged"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(harm, reason, file, written, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(harm(file.read_bytes()))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=reason) as caught:
        telltale.load(bad)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_an_extra_that_is_missing(file, written, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is not there"):
        telltale.load(tmp_path / "none.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'telltale\[gguf\]'"):
        telltale.load(file)
