"""``telltale generate --method step-verified`` and ``telltale specguard costs``: what they print, and what they refuse."""

from __future__ import annotations

import json

import pytest

from cli.commands import called, refused
from decode.step_verified.tiny_guards import model
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.models import load
from telltale.tasks import chains

PROMPT = "Fay has 0 . Hal has Fay minus 2 . how many has Hal ? \n\n "
SMALL = ["--set", "delimiter=a", "--set", "max_step_tokens=8", "--set", "candidates=2", "--set", "fallback=plain"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    for name, seed in (("target", 0), ("draft", 1)):
        model(seed).save_pretrained(root / name)
        chains.tokenizer().save_pretrained(root / name)
    return root


def generate(folders, *options):
    return ["generate", folders / "target", "--prompt", PROMPT, "--max-new-tokens", "24", "--threads", "1", *options]


def test_generate_prints_the_steps_that_the_library_makes(folders, capsys):
    options = ["--method", "step-verified", "--draft", folders / "draft", *SMALL, "--temperature", "1", "--seed", "5"]
    found = json.loads(called(generate(folders, *options, "--json"), capsys).out)
    target, tokenizer = load(folders / "target")
    config = StepVerifiedConfig(delimiter="a", max_step_tokens=8, candidates=2, fallback="plain")
    guard = StepVerified(target, load(folders / "draft")[0], tokenizer, config)
    import torch

    ids = tokenizer(PROMPT)["input_ids"]
    result = guard.generate([ids], max_new_tokens=24, temperature=1.0, generator=torch.Generator().manual_seed(5))
    assert found["tokens"] == result.tokens[0, : int(result.lengths[0])].tolist()
    assert [step["source"] for step in found["steps"]] == [step.source for step in result.steps[0]]
    assert found["stats"]["target_share"] == result.stats.target_share
    captured = called(generate(folders, *options), capsys)
    assert captured.out == found["text"] + "\n"
    assert "drafted steps accepted, the target wrote" in captured.err
    assert "not calibrated for these models" in captured.err


@pytest.mark.long
def test_generate_follows_a_calibration_and_refuses_another_pair(folders, tmp_path, capsys):
    calibrate = ["specguard", "calibrate", "--target", folders / "target", "--draft", folders / "draft", *SMALL]
    calibrate += [
        "--problems",
        "8",
        "--alpha",
        "0.9",
        "--beta",
        "1",
        "--labeler",
        "agreement",
        "--max-new-tokens",
        "14",
    ]
    called([*calibrate, "-o", tmp_path / "guard.json", "--run-dir", tmp_path], capsys)
    options = ["--method", "step-verified", "--draft", folders / "draft", "--guard", tmp_path / "guard.json"]
    captured = called(generate(folders, *options), capsys)
    assert "not calibrated" not in captured.err
    refused(generate(folders, *options, "--set", "beta=1"), capsys, "--set was given together with --guard")
    swapped = ["--method", "step-verified", "--draft", folders / "target", "--guard", tmp_path / "guard.json"]
    refused(generate(folders, *swapped), capsys, "the draft is not the one")


def test_first_layers_may_draft(folders, capsys):
    options = ["--method", "step-verified", "--exit-layer", "2", "--set", "max_step_tokens=8", "--json"]
    found = json.loads(called(generate(folders, *options), capsys).out)
    assert found["stats"]["drafted_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft", "x"], ["--draft does nothing with self-speculative decoding", "choose step-verified"]),
        (["--guard", "x.json"], ["--guard does nothing with self-speculative decoding", "choose step-verified"]),
        (["--set", "beta=1"], ["--set does nothing with self-speculative decoding", "choose step-verified"]),
        (["--method", "step-verified"], ["needs a draft"]),
        (["--method", "step-verified", "--draft", "x", "--exit-layer", "2"], ["both --draft and --exit-layer"]),
        (["--method", "step-verified", "--exit-layer", "2", "--draft-length", "3"], ["--draft-length"]),
        (["--method", "step-verified", "--exit-layer", "2", "--guard", "none.json"], ["none.json cannot be read"]),
        (["--method", "step-verified", "--exit-layer", "99"], ["exit_layer=99"]),
        (["--method", "step-verified", "--exit-layer", "2", "--set", "beta=3"], ["beta=3"]),
    ],
)
def test_generate_refuses_options_that_do_nothing_together(folders, capsys, options, words):
    refused(generate(folders, *options), capsys, *words)


def test_costs_are_measured_and_turned_into_a_break_even_point(folders, capsys):
    options = ["specguard", "costs", "--target", folders / "target", "--draft", folders / "draft", "--candidates", "3"]
    options += ["--set", "signal_model=target", "--prompt-tokens", "20", "--step-tokens", "6", "--threads", "1"]
    found = json.loads(called([*options, "--json"], capsys).out)
    spent = found["draft"] * found["draft_inflation"] + found["verify"]
    assert found["verify"] > 0
    assert found["fallback_inflation"] > 0  # k-sample: three candidates of the target's own
    assert found["speedups"]["0.8"] == pytest.approx(1 / (spent + 0.2 * found["fallback_inflation"]))
    assert found["break_even"] == pytest.approx(1 - (1 - spent) / found["fallback_inflation"])
    text = called(options, capsys).out
    assert "a step of 6 tokens after 20" in text
    assert text.strip().splitlines()[-1].startswith(("pays from", "it does not pay"))
    refused([*options, "--prompt-tokens", "0"], capsys, "prompt_tokens=0")
    refused([*options, "--prompt-tokens", "5000"], capsys, "positions")
    refused([*options, "--guard", "none.json"], capsys, "none.json")
