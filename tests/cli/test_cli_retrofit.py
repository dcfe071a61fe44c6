"""``telltale layerskip retrofit``: the bound comes first, the file lies beside the checkpoint, and ``generate`` drafts with it."""

from __future__ import annotations

import json

from telltale.cli import run
from telltale.models.presets import build
from telltale.tasks.code import train_tokenizer

SETTINGS = ("texts=4", "new_tokens=12", "steps=4", "batch_size=16", "shortlist=64", "exits=[1]")


def test_a_checkpoint_is_retrofitted_and_drafts(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    tokenizer = train_tokenizer([text.read_text()], vocabulary_size=260)
    folder = tmp_path / "model"
    build("nano", seed=0, vocabulary_size=260, max_positions=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = [part for value in SETTINGS for part in ("--set", value)]
    command = ["layerskip", "retrofit", str(folder), str(text), "--run-dir", str(tmp_path / "run"), *options]
    capsys.readouterr()
    assert run(command) == 0
    told = capsys.readouterr()
    assert told.err.index("bound: exit layer 1 with a draft exit") < told.err.index("training")
    assert "accepted, by draft" in told.out
    assert (folder / "draft_exits.safetensors").is_file()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [one["exit_layer"] for one in report["exits"]] == [1]
    assert len(report["exits"][0]["acceptance"]) == 4
    assert run(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    prompt = ["--prompt", "the quick", "--max-new-tokens", "12", "--json"]
    assert run(["generate", str(folder), *prompt, "--method", "autoregressive"]) == 0
    plain = json.loads(capsys.readouterr().out)
    drafting = ["--method", "self-speculative", "--exit-layer", "1", "--draft-length", "2"]
    assert run(["generate", str(folder), *prompt, *drafting]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["stats"]["drafted_by_source"]["exit"] > 0


def test_unknown_settings_and_texts_that_are_not_there_are_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    build("nano", seed=0, vocabulary_size=260, max_positions=128).save_pretrained(folder)
    train_tokenizer(["a b c"], vocabulary_size=260).save_pretrained(folder)
    command = ["layerskip", "retrofit", str(folder), str(tmp_path / "nothing"), "--run-dir", str(tmp_path / "run")]
    assert run([*command, "--set", "step=3"]) == 2
    assert "Did you mean 'steps'" in capsys.readouterr().err
    assert run(command) == 2
    assert "does not exist" in capsys.readouterr().err
