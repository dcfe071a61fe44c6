"""The command line: what it does, and one clear sentence with exit code 2 for everything it cannot do."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from telltale.cli import run
from telltale.models.presets import build
from telltale.tasks.code import CodeCorpus


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"f{index}.py").write_text(f"def function_{index}(x):\n    return x * {index} + 1\n" * 30)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    corpus = CodeCorpus.from_path(text, vocabulary_size=300)
    build("nano", vocabulary_size=len(corpus.tokenizer), max_positions=128).save_pretrained(path)
    corpus.tokenizer.save_pretrained(path)
    return path


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.lower().startswith("error:")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err, captured.err
    return message


def document(arguments, capsys):
    assert run([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.long
def test_train_then_generate_then_resume(tmp_path, text, capsys):
    common = ["train", "--text", text, "--preset", "nano", "--run-dir", tmp_path / "run", "--set", "steps=6"]
    common += ["--set", "batch_size=4", "--set", "sequence_length=32", "--set", "layerskip.p_max=0.2", "--json"]
    result = document(common, capsys)
    assert result["finished"]
    assert result["step"] == 6
    assert len(result["held_out_losses"]) == 4
    refused(common, capsys, "already holds a run")
    assert document([*common, "--resume"], capsys)["finished"]
    refused([*common, "--resume", "--set", "steps=7"], capsys, "steps", "differs")
    again = ["train", "--text", text, "--model", result["model"], "--run-dir", tmp_path / "tuned", "--set", "steps=2"]
    assert document([*again, "--set", "batch_size=2", "--recipe", "none", "--json"], capsys)["finished"]
    made = document(["generate", result["model"], "--prompt", "def f", "--max-new-tokens", 5, "--json"], capsys)
    assert len(made["tokens"]) == 5


def test_generate_streams_the_same_text_for_every_method(checkpoint, capsys):
    outputs = []
    for method in ("autoregressive", "self-speculative", "auto"):
        base = ["generate", str(checkpoint), "--prompt", "def function", "--max-new-tokens", "20", "--method", method]
        assert run(base) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert "tokens/s" in captured.err
        assert document([*base, "--json"], capsys)["text"] + "\n" == captured.out
    assert outputs[0] == outputs[1] == outputs[2]


def test_sampling_is_seeded(checkpoint, capsys):
    base = ["generate", checkpoint, "--prompt", "def", "--temperature", "1.0", "--method", "autoregressive", "--json"]
    first, second = document([*base, "--seed", "1"], capsys), document([*base, "--seed", "1"], capsys)
    assert first["tokens"] == second["tokens"]
    assert document([*base, "--seed", "2"], capsys)["tokens"] != first["tokens"]


def test_prompt_from_a_file_and_from_standard_input(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("def function")
    base = ["generate", checkpoint, "--max-new-tokens", "4", "--json"]
    from_file = document([*base, "--prompt-file", tmp_path / "p.txt"], capsys)
    assert from_file["tokens"] == document([*base, "--prompt", "def function"], capsys)["tokens"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def function")))
    assert document(base, capsys)["tokens"] == from_file["tokens"]


def test_diagnose_and_sweep(checkpoint, text, tmp_path, capsys):
    result = document(
        ["layerskip", "diagnose", checkpoint, text, "--tokens", "2000", "--length", "64", "--json"], capsys
    )
    assert [row["exit_layer"] for row in result["exits"]] == [1, 2, 3]
    assert isinstance(result["pays"], bool)
    assert result["verdict"].startswith(("Yes", "No"))
    assert run(["layerskip", "diagnose", str(checkpoint), str(text), "--tokens", "2000", "--length", "64"]) == 0
    assert "agreement" in capsys.readouterr().out
    out = tmp_path / "sweep"
    arguments = ["layerskip", "sweep", checkpoint, text, "--out", out, "--exit-layers", "1,2", "--draft-lengths", "1,3"]
    swept = document([*arguments, "--prompts", 2, "--new-tokens", 8, "--rounds", 1, "--json"], capsys)
    assert [(p["exit_layer"], p["draft_length"]) for p in swept["points"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert len((out / "sweep.csv").read_text().splitlines()) == 5
    assert "Plotly.newPlot" in (out / "sweep.html").read_text()


def test_list_and_help(capsys):
    assert "llama" in document(["list", "--json"], capsys)["families"]
    for command in ([], ["train"], ["generate"], ["tour"], ["layerskip", "sweep"], ["list"], ["bench"]):
        assert run([*command, "--help"]) == 0
        assert "Example" in capsys.readouterr().out or not command


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], ["empty"]),
        (["--prompt", "x", "--exit-layer", "9"], ["exit_layer", "9"]),
        (["--prompt", "x", "--exit-layer", "two"], ["exit_layer", "two"]),
        (["--prompt", "x", "--draft-length", "-1"], ["draft_length", "-1"]),
        (["--prompt", "x", "--method", "magic"], ["method", "magic"]),
        (["--prompt", "x", "--backend", "gpu"], ["backend", "gpu"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--prompt", "x", "--max-new-tokens", "500"], ["128"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature"]),
        (["--prompt", "x", "--top-p", "1.5"], ["top_p"]),
        (["--prompt", "x", "--dtype", "int4"], ["dtype"]),
        (["--prompt", "x", "--prompt-file", "/nowhere"], ["expected one"]),
        (["--prompt-file", "/nowhere"], ["/nowhere"]),
        (["--prompt", "x", "--threads", "0"], ["threads"]),
        (["--prompt", "x", "--method", "autoregressive", "--exit-layer", "2"], ["--exit-layer", "autoregressive"]),
    ],
)
def test_bad_options_of_generate(checkpoint, capsys, options, words):
    refused(["generate", checkpoint, *options], capsys, *words)


def test_bad_checkpoints(checkpoint, tmp_path, capsys):
    refused(["generate", tmp_path / "absent", "--prompt", "x"], capsys, "absent")
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((checkpoint / name).read_bytes())
    refused(["generate", half, "--prompt", "x"], capsys, "model.safetensors")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(["generate", half, "--prompt", "x"], capsys, "truncated")
    (half / "model.safetensors").write_bytes(weights)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))
    refused(["generate", half, "--prompt", "x"], capsys, "weights that its config.json calls for")
    (half / "config.json").write_text(json.dumps(config)[:40])
    refused(["generate", half, "--prompt", "x"], capsys, "config.json")
    (half / "config.json").write_text(json.dumps(config))
    (half / "tokenizer.json").unlink()
    refused(["generate", half, "--prompt", "x"], capsys, "tokenizer")


def test_a_tokenizer_that_does_not_fit(checkpoint, text, tmp_path, capsys):
    path = tmp_path / "model"
    build("nano", vocabulary_size=270).save_pretrained(path)
    CodeCorpus.from_path(text, vocabulary_size=300).tokenizer.save_pretrained(path)
    refused(["generate", path, "--prompt", "x"], capsys, "270", "tokenizer")


@pytest.mark.long
def test_bad_training_arguments(tmp_path, text, checkpoint, capsys):
    base = ["train", "--text", text, "--run-dir", tmp_path / "run"]
    refused([*base, "--set", "stepz=3"], capsys, "stepz", "steps")
    refused([*base, "--set", "steps"], capsys, "key=value")
    refused([*base, "--set", "steps=0"], capsys, "steps")
    refused([*base, "--set", "p_max=1.5"], capsys, "p_max")
    refused([*base, "--recipe", "magic"], capsys, "recipe")
    refused([*base, "--preset", "huge"], capsys, "preset", "tiny")
    refused([*base, "--config", tmp_path / "absent.yaml"], capsys, "absent.yaml")
    (tmp_path / "bad.yaml").write_text("trane:\n  steps: 3\n")
    refused([*base, "--config", tmp_path / "bad.yaml"], capsys, "trane")
    (tmp_path / "empty").mkdir()
    refused(["train", "--text", tmp_path / "empty", "--run-dir", tmp_path / "run"], capsys, "empty")
    refused(["train", "--text", tmp_path / "absent", "--run-dir", tmp_path / "run"], capsys, "absent")
    assert not (tmp_path / "run").exists()
    refused(["layerskip", "sweep", checkpoint, text, "--draft-lengths", "a"], capsys, "draft_lengths")
    refused(
        ["layerskip", "sweep", checkpoint, text, "--exit-layers", "7", "--out", tmp_path / "s"], capsys, "exit_layer"
    )
    refused(["layerskip", "diagnose", checkpoint, tmp_path / "absent"], capsys, "absent")
    refused(["bench", "magic"], capsys, "magic")


def test_unknown_commands_are_exit_code_2(capsys):
    assert run(["fly"]) == 2
    assert run(["train"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexpected_error_is_one_sentence(checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("TELLTALE_DEBUG", raising=False)

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("telltale.models.loading.load", fail)
    assert run(["generate", str(checkpoint), "--prompt", "x"]) == 1
    assert "unexpected RuntimeError: boom" in capsys.readouterr().err


def test_threads_option(checkpoint, capsys):
    before = torch.get_num_threads()
    try:
        document(["generate", checkpoint, "--prompt", "x", "--max-new-tokens", "2", "--threads", "1", "--json"], capsys)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(checkpoint, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("telltale.models.loading.load", interrupt)
    assert run(["generate", str(checkpoint), "--prompt", "x"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_resume_with_other_text_or_another_model_is_refused(tmp_path, text, capsys):
    common = ["train", "--text", text, "--run-dir", tmp_path / "run", "--set", "steps=2", "--set", "batch_size=2"]
    common += ["--set", "sequence_length=16", "--set", "learning_rate=1e-3"]
    assert run([str(a) for a in [*common, "--preset", "nano"]]) == 0
    refused([*common, "--preset", "tiny", "--resume"], capsys, "model_and_text")
    (tmp_path / "other").mkdir()
    for index in range(9):
        (tmp_path / "other" / f"{index}.py").write_text(f"x_{index} = {index}\n" * 200)
    refused([*common, "--preset", "nano", "--resume", "--text", tmp_path / "other"], capsys, "differs")


def test_an_empty_sweep_is_refused(checkpoint, text, tmp_path, capsys):
    refused(
        ["layerskip", "sweep", checkpoint, text, "--draft-lengths", ",", "--out", tmp_path], capsys, "nothing to sweep"
    )
