"""A retrofit trains what leads from an exit to a draft and nothing else, goes on where it was stopped, and is found beside its
checkpoint by what drafts."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.models import load, open_decoder
from telltale.models.draft_exits import DraftExits, checkpoint_fingerprint, draft_exits_of, draft_exits_path
from telltale.models.loading import model_fingerprint
from telltale.models.presets import build
from telltale.tasks.code import train_tokenizer
from telltale.train.own_text import Prompts
from telltale.train.retrofit import RetrofitConfig, _Job, _zeros, late_layers_of, retrofit

WORDS = ["red", "green", "blue", "stone", "river", "house", "of", "the", "a", "in"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG = RetrofitConfig(
    exits=(1, 2), shortlist=200, texts=24, new_tokens=24, steps=24, batch_size=128, learning_rate=3e-3, seed=1
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[one] for one in torch.randint(len(WORDS), (3000,), generator=generator).tolist()]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[start : start + 8]) for start in range(0, len(words), 8)))
    return path


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    """A random model whose exits say nothing of its last layer as they are, with a tokenizer of 270 tokens."""
    tokenizer = train_tokenizer([text.read_text()], vocabulary_size=270)
    model = build("nano", seed=0, vocabulary_size=270, max_positions=128, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(checkpoint, text, run_dir, config=CONFIG, **options):
    model, tokenizer = load(checkpoint)
    decoder = open_decoder(model, backend="fused")
    before = model_fingerprint(model)
    prompts = Prompts([text], tokenizer, longest=config.new_tokens, seed=config.seed)
    result = retrofit(decoder, tokenizer, prompts, config, checkpoint=checkpoint, run_dir=run_dir, **options)
    assert model_fingerprint(model) == before
    return result


@pytest.fixture(scope="module")
def done(checkpoint, text, tmp_path_factory):
    return run(checkpoint, text, tmp_path_factory.mktemp("run") / "run")


def test_exits_learn_to_draft(done):
    assert done.finished
    assert done.step == 24
    assert done.exits.late_layers == late_layers_of(4) == (0, 2, 3)
    for report in done.reports:
        assert report.acceptance[0] > report.before + 0.3
    assert 0.5 < done.covered <= 1.0


def test_least_squares_alone_beat_the_exit_as_it_was(checkpoint, text, tmp_path):
    solved = run(checkpoint, text, tmp_path / "run", dataclasses.replace(CONFIG, steps=0))
    assert all(one.acceptance[0] > one.before for one in solved.reports)


def test_least_squares_stay_on_the_models_device():
    """On tensors without numbers, which refuse to mix with others as an accelerator's do."""
    device = torch.device("meta")
    decoder = SimpleNamespace(
        hidden_size=16, kv_heads=2, head_dim=4, layers=4, device=device, parts=SimpleNamespace(norm=nn.Identity())
    )
    job = _Job.__new__(_Job)
    job.decoder, job.config, job.weights = decoder, CONFIG, {2: _zeros(decoder)}
    late = job.weights[2]["read_0"].shape[1]
    job.states = SimpleNamespace(
        tokens=50,
        exit=lambda layer, rows: torch.zeros(len(rows), 16, device=device),
        last=lambda rows: torch.zeros(len(rows), 16, device=device),
        values=lambda rows, step: torch.zeros(len(rows), late, device=device),
    )
    job._solve(2)
    assert {one.device.type for one in job.weights[2].values()} == {"meta"}


def test_an_interrupted_run_goes_on_to_the_same_exits(checkpoint, text, tmp_path, done):
    stops = iter(["writing texts", "training"])
    wanted = [next(stops)]

    def interrupt(stage, at, total, note):
        if wanted and stage == wanted[0] and (stage != "training" or at == 20):
            wanted.clear()
            os.kill(os.getpid(), signal.SIGINT)

    first = run(checkpoint, text, tmp_path / "run", progress=interrupt)
    assert not first.finished
    assert first.exits is None
    wanted.append(next(stops))
    second = run(checkpoint, text, tmp_path / "run", progress=interrupt, resume=True)
    assert not second.finished
    assert 0 < second.step < 24
    third = run(checkpoint, text, tmp_path / "run", resume=True)
    assert third.finished
    for layer, one in done.exits.exits.items():
        for name, weight in one.weights.items():
            assert torch.equal(third.exits.exits[layer].weights[name], weight)
    assert not list((tmp_path / "run").glob("*.bin"))


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(checkpoint, text, tmp_path):
    config = dataclasses.replace(CONFIG, steps=0, texts=2)
    run(checkpoint, text, tmp_path / "run", config)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(checkpoint, text, tmp_path / "run", config)
    with pytest.raises(ConfigError, match="shortlist"):
        run(checkpoint, text, tmp_path / "run", dataclasses.replace(config, shortlist=100), resume=True)


def test_the_file_is_found_and_used_by_its_own_checkpoint_alone(checkpoint, text, tmp_path, done):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    done.exits.save(draft_exits_path(folder))
    model, tokenizer = load(folder)
    found = draft_exits_of(model)
    assert found.exits.keys() == {1, 2}
    assert torch.equal(found.shortlist, done.exits.shortlist)
    method = SelfSpeculative(model, 2, 3, backend="fused")
    prompt = tokenizer("red green blue stone river")["input_ids"]
    wanted = Autoregressive(model, backend="fused").generate(prompt, max_new_tokens=60, eos_token_id=[])
    given = method.generate(prompt, max_new_tokens=60, eos_token_id=[])
    assert given.tokens.tolist() == wanted.tokens.tolist()
    assert given.stats.accepted_by_source["exit"] > 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    other, _ = load(folder)
    Autoregressive(other, backend="fused")
    SelfSpeculative(other, drafter="ngram", backend="fused")
    with pytest.raises(CheckpointError, match="made for other weights"):
        SelfSpeculative(other, 2, 3, backend="fused")


def test_a_damaged_file_is_refused(tmp_path, done):
    path = tmp_path / "draft_exits.safetensors"
    done.exits.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        DraftExits.load(path)


def test_a_fingerprint_follows_the_weights_and_not_their_dtype_in_memory(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "same")
    (tmp_path / "same" / "README.md").write_text("more")
    assert checkpoint_fingerprint(tmp_path / "same") == checkpoint_fingerprint(checkpoint)
    file = tmp_path / "same" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoint_fingerprint(tmp_path / "same") != checkpoint_fingerprint(checkpoint)


def test_a_gguf_file_has_its_exits_beside_it_under_its_name(tmp_path):
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    assert draft_exits_path(tmp_path / "one.gguf").name == "one.draft_exits.safetensors"


def test_chats_go_through_the_template_up_to_the_last_question(checkpoint, tmp_path):
    _, tokenizer = load(checkpoint)
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": turns}, {"prompt": "red"})))
    with pytest.raises(DataError, match="no chat template"):
        Prompts([file], tokenizer, longest=64, seed=0)
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts([file], tokenizer, longest=64, seed=0)
    assert {tokenizer.decode(one.tokens) for one in prompts.draw(4)} == {"<user>red\n<assistant>"}
    with pytest.raises(DataError, match="raise new_tokens"):
        Prompts([file], tokenizer, longest=3, seed=0).draw(1)
    file.write_text('{"text": "red"}\n')
    with pytest.raises(DataError, match=r"line 1: expected an object"):
        Prompts([file], tokenizer, longest=64, seed=0)


def test_held_out_prompts_are_of_other_sources(checkpoint, tmp_path):
    _, tokenizer = load(checkpoint)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{WORDS[number]} stone\n" * 40)
    prompts = Prompts([tmp_path], tokenizer, longest=16, seed=0)
    trained = {one.source for one in prompts.draw(60)}
    held = {one.source for one in prompts.draw(20, held_out=True)}
    assert held
    assert trained
    assert not held & trained
    assert [one.tokens for one in prompts.draw(5)] == [one.tokens for one in prompts.draw(9)[:5]]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"exits": (4,)}, "exits"),
        ({"exits": 2}, "expected layers in a list"),
        ({"new_tokens": 4}, "new_tokens"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_named(values, named):
    with pytest.raises(ConfigError, match=named):
        RetrofitConfig(**values).exits_of(4)


def test_texts_that_a_kill_cut_short_are_written_again_as_they_were(checkpoint, text, tmp_path):
    config = dataclasses.replace(CONFIG, steps=0, texts=6)
    whole = run(checkpoint, text, tmp_path / "whole", config)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    file = tmp_path / "killed" / "texts.jsonl"
    lines = file.read_bytes()
    file.write_bytes(b"".join(lines.splitlines(keepends=True)[:3]) + b'{"tok')
    resumed = run(checkpoint, text, tmp_path / "killed", config, resume=True)
    assert file.read_bytes() == lines
    assert torch.equal(resumed.exits.exits[1].weights["state"], whole.exits.exits[1].weights["state"])


def test_a_run_goes_on_with_the_same_texts_alone_and_bad_ones_leave_none(checkpoint, text, tmp_path):
    config = dataclasses.replace(CONFIG, steps=0, texts=2)
    other = tmp_path / text.name
    other.write_text("")
    with pytest.raises(DataError, match="no readable text"):
        run(checkpoint, other, tmp_path / "run", config)
    run(checkpoint, text, tmp_path / "run", config)
    other.write_text("red green blue\n" * 100)
    with pytest.raises(ConfigError, match=r"on\.read"):
        run(checkpoint, other, tmp_path / "run", config, resume=True)
    with pytest.raises(ConfigError, match="the model has 128"):
        run(checkpoint, text, tmp_path / "long", dataclasses.replace(config, new_tokens=65))


def test_a_full_disk_is_told_and_not_a_crash(checkpoint, text, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CheckpointError, match=r"states\.bin.*No space left"):
        run(checkpoint, text, tmp_path / "run", dataclasses.replace(CONFIG, steps=0, texts=2))
    assert not (tmp_path / "run" / "states.bin").exists()


def test_a_checkpoint_of_the_run_that_is_damaged_is_named(checkpoint, text, tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, texts=2)
    run(checkpoint, text, tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "step-000001" / "retrofit.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="step-000001 cannot be read"):
        run(checkpoint, text, tmp_path / "run", config, resume=True)


def test_exits_with_numbers_that_are_not_finite_are_refused(tmp_path, done):
    weights = {name: one.clone() for name, one in done.exits.exits[1].weights.items()}
    weights["up"][0, 0] = torch.inf
    path = tmp_path / "draft_exits.safetensors"
    dataclasses.replace(done.exits, exits={1: dataclasses.replace(done.exits.exits[1], weights=weights)}).save(path)
    with pytest.raises(CheckpointError, match="damaged: some of its numbers are not finite"):
        DraftExits.load(path)


def test_a_fingerprint_reads_shards_of_any_name(tmp_path):
    index = {"weight_map": {"one": "part-a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "part-a.safetensors").write_bytes(b"1")
    before = checkpoint_fingerprint(tmp_path)
    (tmp_path / "part-a.safetensors").write_bytes(b"2")
    assert checkpoint_fingerprint(tmp_path) != before


def test_chats_that_the_template_refuses_are_named(checkpoint, tmp_path):
    _, tokenizer = load(checkpoint)
    file = tmp_path / "chats.jsonl"
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    file.write_text('{"prompt": "red\u2028green"}\n{"prompt": "blue"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"chat of chats\.jsonl with the roles user: System role"):
        Prompts([file], tokenizer, longest=64, seed=0).draw(1)
    file.write_text('{"messages": [{"role": "assistant", "content": "red"}]}\n')
    with pytest.raises(DataError, match="no chat with a prompt"):
        Prompts([file], tokenizer, longest=64, seed=0)
