"""``telltale sharpness``: measure, report and compare, and one sentence for everything they cannot do."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from telltale.cli import run
from telltale.models.presets import build
from telltale.tasks.code import CodeCorpus
from telltale.train.loop import train
from telltale.train.run_config import TrainConfig
from telltale.train.sharpness.compare import POINT_FILE, Point

QUICK = ["--minibatches", 2, "--batch-size", 2, "--length", 16, "--runs", 2, "--steps", 4, "--threads", 1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"f{index}.py").write_text(f"def function_{index}(x):\n    return x * {index} + 1\n" * 30)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """Two short runs of telltale's loop with different rates, each with a training checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = CodeCorpus.from_path(text, vocabulary_size=300)
    for name, rate in (("slow", 1e-3), ("fast", 3e-3)):
        model = build("nano", vocabulary_size=len(corpus.tokenizer), max_positions=128)
        config = TrainConfig(
            steps=4, batch_size=2, sequence_length=16, learning_rate=rate, checkpoint_every=2, precision="float32"
        )
        train(model, corpus, config, run_dir=folder / name, tokenizer=corpus.tokenizer)
    return folder


def document(arguments, capsys):
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.lower().startswith("error:")
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


@pytest.mark.long
def test_measure_a_run_and_compare_two(trained, text, capsys):
    for name, rate in (("slow", 1e-3), ("fast", 3e-3)):
        base = ["sharpness", "measure", trained / name / "model", text, "--held-out", text / "f0.py", *QUICK, "--json"]
        found = document(base, capsys)
        assert found["interval"] is None
        assert 0 < found["minibatches"] < 4
        assert 0.0 <= found["sd"] <= found["parameters"]
        assert len(found["receipts"]) == found["minibatches"]
        assert max(receipt["difference"] for receipt in found["receipts"]) < 1e-3
        assert found["sd"] + found["codimension"] == pytest.approx(found["parameters"])
        assert found["controls"]["learning_rate"] == pytest.approx(
            TrainConfig(steps=4, learning_rate=rate).learning_rate_at(3)
        )
        assert set(found["gaps"]) == {"loss", "accuracy"}
        assert (trained / name / "sharpness_dimension.html").read_text().startswith("<!doctype html>")
        assert Point.load(trained / name).settings["learning_rate"] == rate
    result = document(["sharpness", "compare", trained / "slow", trained / "fast", "--json"], capsys)
    assert result["runs"] == 2
    assert {"sd", "trace", "lambda_max", "null_space", "weight_norm"} <= {row["measure"] for row in result["rows"]}


@pytest.mark.long
def test_measure_is_seeded_and_prints_a_table(trained, text, capsys, tmp_path):
    base = ["sharpness", "measure", trained / "slow" / "model", text, *QUICK, "--out", tmp_path]
    first, again = document([*base, "--json"], capsys), document([*base, "--json"], capsys)
    assert first == again
    assert document([*base, "--seed", 1, "--json"], capsys)["sd"] != first["sd"]
    assert not (tmp_path / POINT_FILE).exists(), "there is no gap without held-out text"
    assert run([str(argument) for argument in base]) == 0
    printed = capsys.readouterr().out
    assert "control: trace" in printed
    assert "does not predict" in printed


@pytest.mark.long
def test_the_optimizers_jacobian_comes_from_a_training_checkpoint(trained, text, capsys, tmp_path):
    [checkpoint] = (trained / "slow" / "checkpoints").iterdir()
    base = ["sharpness", "measure", checkpoint, text, *QUICK, "--out", tmp_path, "--json"]
    by_optimizer = document([*base, "--jacobian", "optimizer"], capsys)
    assert by_optimizer["sd"] != document(base, capsys)["sd"]
    model = trained / "slow" / "model"
    refused(
        ["sharpness", "measure", model, text, "--jacobian", "optimizer"], capsys, "training_state.pt", "checkpoints"
    )


def test_checkpoints_of_others_are_measured_in_folders_of_their_own_and_compared(
    trained, text, capsys, tmp_path, monkeypatch
):
    """A family that telltale's decoders do not know, and no telltale run around it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(trained / "slow" / "model")
    folders = []
    for index, rate in enumerate(("0.1", "0.2")):
        torch.manual_seed(index)
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=64,
        )  # fmt: skip
        folder = tmp_path / f"experiment-{index}" / "model"
        OPTForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base = ["sharpness", "measure", folder, text, "--held-out", text, *QUICK, "--rate", rate, "--json"]
        folders.append(document(base, capsys)["written"])
    assert folders == ["runs/sharpness/experiment-0-model", "runs/sharpness/experiment-1-model"]
    assert Point.load(folders[1]).settings == {"learning_rate": 0.2, "batch_size": 2}
    [row] = [
        row
        for row in document(["sharpness", "compare", *folders, "--json"], capsys)["rows"]
        if (row["measure"], row["gap"]) == ("sd", "loss")
    ]
    assert "learning_rate" in row["psi"]


def test_compare_prints_controls_and_partial_taus(tmp_path, capsys):
    for index in range(4):
        measures = {"sd": float(index), "minus_batch_size": [0.0, 2.0, 1.0, 3.0][index]}
        Point(str(index), measures, {"loss": float(index)}, {"learning_rate": index}, 0).save(tmp_path / str(index))
    folders = [tmp_path / str(index) for index in range(4)]
    assert run(["sharpness", "compare", *map(str, folders), "--given", "minus_batch_size"]) == 0
    printed = capsys.readouterr().out
    assert "+1.00" in printed
    assert "controls" in printed


@pytest.mark.long
def test_what_cannot_be_measured_is_said_in_a_sentence(trained, text, capsys, tmp_path):
    model = trained / "slow" / "model"
    stray = tmp_path / "stray"
    stray.mkdir()
    for file in model.iterdir():
        (stray / file.name).write_bytes(file.read_bytes())
    refused(["sharpness", "measure", stray, text, *QUICK], capsys, "--rate")
    for rate in ("-0.1", "0", "nan"):
        refused(["sharpness", "measure", stray, text, *QUICK, "--rate", rate], capsys, "rate=")
    refused(["sharpness", "measure", tmp_path / "none", text], capsys, "not a folder")
    refused(["sharpness", "measure", model, tmp_path / "none.txt"], capsys, "does not exist")
    refused(["sharpness", "measure", model, text, "--jacobian", "adam"], capsys, "jacobian='adam'")
    refused(["sharpness", "measure", model, text, "--aggregate", "sum"], capsys, "aggregate='sum'")
    refused(["sharpness", "measure", model, text, "--minibatches", 0], capsys, "minibatches=0")
    refused(["sharpness", "measure", model, text, "--runs", 0], capsys, "runs=0")
    refused(["sharpness", "measure", model, text, "--batch-size", 0], capsys, "batch_size=0")
    refused(["sharpness", "measure", model, text, "--length", 1], capsys, "length=1")
    refused(["sharpness", "measure", model, text, "--length", 129], capsys, "length=129", "128 positions")
    refused(["sharpness", "measure", model, text, "--jacobian", "optimizer", "--rate", 0.1], capsys, "--rate")
    (tmp_path / "short.txt").write_text("def")
    refused(["sharpness", "measure", model, tmp_path / "short.txt", *QUICK], capsys, "need more")


def test_what_cannot_be_compared_or_reported_is_said_in_a_sentence(tmp_path, capsys):
    refused(["sharpness", "report", tmp_path / "none"], capsys, "none")
    refused(["sharpness", "compare", tmp_path, tmp_path], capsys, POINT_FILE)
    Point("a", {"sd": 1.0}, {"loss": 1.0}).save(tmp_path)
    refused(["sharpness", "compare", tmp_path], capsys, "at least two")
    refused(["sharpness", "compare", tmp_path, tmp_path, "--given", "trace"], capsys, "trace")
    for damage in ('{"measures": 5}', '{"name": "a", "measures": 5, "gaps": {}}', '{"name": "a", "measures": {"sd": "x"}, '
                   '"gaps": {}}', "[]", "{"):  # fmt: skip
        (tmp_path / POINT_FILE).write_text(damage)
        refused(["sharpness", "compare", tmp_path, tmp_path], capsys, "not a measured point")
