"""The code corpus: real sources, deterministic, split by file, refusing what holds no text."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import DataError
from telltale.tasks.code import CodeCorpus, parses, read_tokens, train_tokenizer


@pytest.fixture
def folder(tmp_path):
    for index in range(20):
        (tmp_path / f"file_{index:02d}.py").write_text(f"def function_{index}(x):\n    return x + {index}\n" * 20)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00bad")
    (tmp_path / "picture.png").write_bytes(b"png")
    return tmp_path


def test_it_is_split_by_file_and_the_same_every_time(folder):
    first = CodeCorpus.from_path(folder, vocabulary_size=300)
    second = CodeCorpus.from_path(folder, vocabulary_size=300)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train, second.train)
    held_out = first.tokenizer.decode(first.held_out)
    train = first.tokenizer.decode(first.train)
    name = held_out.split("(")[0].removeprefix("def ")
    assert f"{name}(" in held_out
    assert f"{name}(" not in train
    assert CodeCorpus.from_path(folder, vocabulary_size=300, seed=1).fingerprint != first.fingerprint


def test_tokens_round_trip(folder):
    corpus = CodeCorpus.from_path(folder, vocabulary_size=300)
    text = "naïve = '\u00e9\u4e2d'\n\tif x: pass\n"
    assert corpus.tokenizer.decode(corpus.tokenizer(text)["input_ids"]) == text
    assert int(corpus.train.max()) < len(corpus.tokenizer)


def test_saved_and_loaded(folder, tmp_path):
    corpus = CodeCorpus.from_path(folder, vocabulary_size=300)
    corpus.save(tmp_path / "saved")
    loaded = CodeCorpus.load(tmp_path / "saved")
    assert torch.equal(loaded.train, corpus.train)
    assert torch.equal(loaded.held_out, corpus.held_out)
    assert loaded.fingerprint == corpus.fingerprint
    (tmp_path / "saved" / "train.npy").unlink()
    with pytest.raises(DataError, match="not a saved corpus"):
        CodeCorpus.load(tmp_path / "saved")


def test_prompts_are_held_out_and_seeded(folder):
    corpus = CodeCorpus.from_path(folder, vocabulary_size=300)
    prompts = corpus.prompts(5, length=9, seed=4)
    assert [prompt.shape for prompt in prompts] == [(9,)] * 5
    assert all(torch.equal(a, b) for a, b in zip(prompts, corpus.prompts(5, length=9, seed=4), strict=True))
    with pytest.raises(DataError, match="a prompt needs"):
        corpus.prompts(1, length=10**6)


@pytest.mark.slow
def test_the_standard_library_is_there():
    corpus = CodeCorpus.from_standard_library(vocabulary_size=512)
    assert corpus.train.numel() > 1_000_000
    assert corpus.held_out.numel() > 10_000
    assert "site-packages" not in corpus.source


def test_one_file_is_split_by_place(tmp_path):
    (tmp_path / "one.txt").write_text("abc def ghi\n" * 500)
    corpus = CodeCorpus.from_path(tmp_path / "one.txt", vocabulary_size=280)
    assert corpus.train.numel() > corpus.held_out.numel() > 0


def test_what_holds_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    for path in (tmp_path / "empty", tmp_path / "blank.txt", tmp_path / "absent"):
        with pytest.raises(DataError, match=path.name):
            CodeCorpus.from_path(path)
        with pytest.raises(DataError, match=path.name):
            read_tokens(path, None)
    with pytest.raises(DataError, match="257"):
        train_tokenizer(["text"], vocabulary_size=100)


def test_the_verifier():
    assert parses("x = 1\n")
    assert not parses("x = (")
    assert not parses("x = '\0'")


def test_the_verifier_compiles_and_does_not_only_parse():
    assert not parses("return 1\n")
    assert not parses("(" * 5000)
