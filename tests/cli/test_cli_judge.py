"""``telltale judge``: scores and explanations that add up, a fit from files that goes on where it was stopped, and refusals."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from functools import partial

import pytest
from transformers import LlamaConfig, LlamaModel

from align.judge.tiny_judges import OBJECTIVES, tiny_tokenizer
from telltale.align.judge import default_judge
from telltale.align.judge.judge import Judge, conversation
from telltale.cli import run

PROMPT = "add two and three"


def document(arguments, capsys):
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def printed(arguments, capsys):
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, "one sentence"
    assert "Traceback" not in message
    for word in ("error:", *words):
        assert word in message, message


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"messages": conversation(PROMPT, "five")},
        {"prompt": PROMPT, "response": "the answer is five ."},
        {"prompt": [{"role": "user", "content": PROMPT}], "response": ""},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def test_scores_of_a_file_are_the_judges_own_and_add_up(judge_folder, chats, capsys):
    found = document(["judge", "score", judge_folder, chats, "--json"], capsys)
    judge = Judge.load(judge_folder)
    assert found["scores"] == judge.score([conversation(PROMPT, text) for text in ("five", "the answer is five .", "")])
    for score, explanation in zip(found["scores"], found["explanations"], strict=True):
        assert score == explanation["score"] == math.fsum(term["contribution"] for term in explanation["terms"])
    lines = printed(["judge", "score", judge_folder, chats], capsys).splitlines()
    assert lines == [f"{score:+.6f}" for score in found["scores"]]


def test_the_best_of_several_responses_is_marked(judge_folder, capsys):
    base = ["judge", "score", judge_folder, "--prompt", PROMPT, "--response", "five", "--response", "no"]
    found = document([*base, "--json"], capsys)
    best = Judge.load(judge_folder).best_of(PROMPT, ["five", "no"])
    assert found["best"] == best.index
    assert found["scores"] == list(best.scores)
    assert [line.endswith("best") for line in printed(base, capsys).splitlines()] == [best.index == 0, best.index == 1]


def test_an_explanation_is_printed_drawn_and_written(judge_folder, chats, capsys, tmp_path):
    base = ["judge", "explain", judge_folder, "--prompt", PROMPT, "--response", "five"]
    found = document([*base, "--json"], capsys)
    assert [term["objective"] for term in found["terms"]] == list(OBJECTIVES)
    assert found["score"] == math.fsum(term["contribution"] for term in found["terms"])
    text = printed([*base, "--html", tmp_path / "why.html"], capsys)
    assert f"{found['score']:+.4f}" in text
    assert "█" in text
    assert f"{found['score']:+.4f}" in (tmp_path / "why.html").read_text()
    assert printed([*base, "--md"], capsys).startswith("| objective |")
    assert document(["judge", "explain", judge_folder, chats, "--json"], capsys) == found
    other = document(["judge", "explain", judge_folder, chats, "--row", 1, "--json"], capsys)
    pair = document([*base, "--against", "the answer is five .", "--json"], capsys)
    assert pair["second"]["score"] == pytest.approx(other["score"], abs=1e-6)
    assert pair["difference"] == math.fsum(delta["contribution"] for delta in pair["deltas"])
    assert "second" in printed([*base, "--against", "no"], capsys)


def test_reweighting_changes_no_reward(judge_folder, capsys):
    base = ["judge", "explain", judge_folder, "--prompt", PROMPT, "--response", "five", "--json"]
    before, after = document(base, capsys), document([*base, "--reweight", "safe=2"], capsys)
    assert [term["reward"] for term in after["terms"]] == [term["reward"] for term in before["terms"]]
    assert after["score"] != before["score"]
    refused([*base, "--reweight", "saef=2"], capsys, "'saef'", "Did you mean 'safe'")
    refused([*base, "--reweight", "safe"], capsys, "key=value")
    refused([*base, "--reweight", "safe=much"], capsys, "'much'")


def test_a_device_that_is_not_there_is_told(judge_folder, data, capsys, tmp_path):
    for command in (
        ["score", judge_folder, "--prompt", "a", "--response", "b"],
        ["explain", judge_folder, "--prompt", "a", "--response", "b"],
        ["audit", judge_folder, "--preferences", data / "preferences.jsonl"],
        ["evaluate", judge_folder, "--suite", "llmbar", "--data", tmp_path],
    ):
        refused(["judge", *command, "--device", "cuda:99"], capsys, "device='cuda:99'")
    refused(["judge", "evaluate", tmp_path, "--suite", "judgebench", "--data", tmp_path], capsys, "suite='judgebench'")


def test_what_cannot_be_scored_is_told_in_a_sentence(judge_folder, chats, capsys, tmp_path):
    refused(["judge", "score", judge_folder], capsys, "--prompt")
    refused(["judge", "score", judge_folder, chats, "--prompt", "a", "--response", "b"], capsys, "either")
    refused(["judge", "score", judge_folder, "--prompt", "a"], capsys, "--response")
    refused(["judge", "score", tmp_path, chats], capsys, "config.json")
    refused(["judge", "score", judge_folder, tmp_path / "none.jsonl"], capsys, "none.jsonl")
    refused(["judge", "explain", judge_folder, chats, "--row", 3], capsys, "row=3", "3 conversations")
    refused(
        ["judge", "explain", judge_folder, "--prompt", "a", "--response", "b", "--against", "c", "--md"], capsys, "--md"
    )
    for line in ("{", "[]", '{"prompt": "a"}', '{"messages": []}', '{"messages": [{"role": "user", "content": "a"}]}'):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + f"\n{line}\n")
        refused(["judge", "score", judge_folder, tmp_path / "bad.jsonl"], capsys, "line 2")
    (tmp_path / "bad.jsonl").write_text("\n")
    refused(["judge", "score", judge_folder, tmp_path / "bad.jsonl"], capsys, "empty")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    LlamaModel(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Responses are good if they say yes; longer ones are rated wordy."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    ratings, preferences = [], []
    for index in range(60):
        prompt = " ".join(generator.choices(["a", "b", "c", "d", "e", "f", "g", "h"], k=5)) + f" {index % 10}"
        texts = [f"{word} {'x ' * generator.randint(1, 8)}" for word in ("yes", "no")]
        for text in texts:
            ratings.append(
                {
                    "prompt": prompt,
                    "response": text,
                    "ratings": {"good": text.startswith("yes"), "verbosity": len(text.split())},
                }
            )
        preferences.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    (folder / "ratings.jsonl").write_text("\n".join(map(json.dumps, ratings)))
    (folder / "preferences.jsonl").write_text("\n".join(map(json.dumps, preferences)))
    (folder / "objectives.yaml").write_text("good: {low: 0, high: 1}\nverbosity: {low: 0, high: 20}\n")
    return folder


def of(backbone, data):
    return [
        *("--backbone", backbone, "--ratings", data / "ratings.jsonl", "--preferences", data / "preferences.jsonl"),
        *("--objectives", data / "objectives.yaml"),
    ]


QUICK = ("--set", "hidden=8", "--set", "layers=1", "--set", "steps=40", "--set", "batch_size=32")


@pytest.mark.long
def test_a_fit_from_files_saves_a_judge_that_scores(backbone, data, tmp_path, capsys):
    told = document(["judge", "features", *of(backbone, data), "--out", tmp_path / "feats", "--json"], capsys)
    assert told["rows"] == {"ratings": 120, "preferences": 120}
    assert told["pooling"] == "last"
    shards = {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "feats").rglob("*.safetensors"))}
    base = ["judge", "fit", *of(backbone, data), "--features", tmp_path / "feats", *QUICK]
    found = document([*base, "--out", tmp_path / "judge", "--json"], capsys)
    assert {file: file.stat().st_mtime_ns for file in shards} == shards, (
        "features that are there are not computed again"
    )
    assert found["objectives"] == ["good", "verbosity"]
    assert found["pairs"] == 60
    assert {"gate", "fixed weights"} <= set(found["accuracies"])
    assert found["decorrelation"] is not None, "verbosity is a nuisance by default"
    judge = Judge.load(tmp_path / "judge")
    explained = judge.explain(conversation("a b c", "yes"))
    assert explained.weights["verbosity"] == 0.0
    assert json.loads((tmp_path / "judge" / "fit.json").read_text())["objectives"] == found["objectives"]
    document([*base, "--out", tmp_path / "again", "--json"], capsys)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "judge" / "model.safetensors"
    ).read_bytes()
    text = printed([*base, "--out", tmp_path / "again", "--scope", "pooled", "--layout", "official"], capsys)
    assert "fixed weights" in text
    assert "ships:" in text
    assert "Correlation (spearman) with verbosity" in text
    assert text.count("[") >= 2, "what decorrelation has left comes with intervals"
    assert "Llama" in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.long
def test_preferences_alone_become_an_audited_judge(backbone, data, tmp_path, capsys):
    """One command: objectives are counted, the judge is calibrated, and the audit is of prompts that nothing was fitted on."""
    base = ["judge", "fit", "--backbone", backbone, "--preferences", data / "preferences.jsonl", *QUICK]
    found = document([*base, "--out", tmp_path / "judge", "--json"], capsys)
    assert set(found["objectives"]) <= {"verbosity", "structure", "refusal", "overlap", "preferred"}
    assert {"verbosity", "preferred"} <= set(found["objectives"])
    assert found["audit"]["prompts"] <= found["compared_prompts"] < found["prompts"]["train"]
    assert json.loads((tmp_path / "judge" / "audit.json").read_text())["pairs"]["judge"]["count"] > 0
    assert set(found["gate_minus"]) == set(found["accuracies"]) - {"gate"}
    assert set(found["calibration"]["gain"]) == {"a constant", "length alone"}
    told = printed(
        ["judge", "explain", tmp_path / "judge", "--prompt", "a b c", "--response", "yes", "--against", "no no"], capsys
    )
    assert "the first is better with probability" in told
    again = Judge.load(tmp_path / "judge")
    assert again.model.config.intercept
    assert again.explain(conversation("a b c", "yes")).unfamiliar is not None
    one, other = conversation("a b c", "yes"), conversation("a b c", "no no")
    assert again.compare(one, other).probability == pytest.approx(1 - again.compare(other, one).probability)
    assert again.reweight({"preferred": 2.0}).compare(one, other).probability is None
    refused([*base, "--layout", "official", "--out", tmp_path / "x"], capsys, "no place for intercepts")


def test_features_computed_in_other_batches_serve_a_fit(backbone, data, tmp_path, capsys):
    document(
        ["judge", "features", *of(backbone, data), "--out", tmp_path / "feats", "--batch-size", 5, "--json"], capsys
    )
    base = ["judge", "fit", *of(backbone, data), "--features", tmp_path / "feats", *QUICK, "--json"]
    document([*base, "--out", tmp_path / "judge", "--how", "joint"], capsys)


def test_rows_with_one_id_keep_their_own_ratings(backbone, data, tmp_path, capsys):
    """Public files often give every response to a prompt the prompt's id."""
    rows = [json.loads(line) for line in (data / "ratings.jsonl").read_text().split("\n")]
    (tmp_path / "ratings.jsonl").write_text("\n".join(json.dumps(row | {"id": row["prompt"]}) for row in rows))
    found = []
    for name, ratings in (("ids", tmp_path / "ratings.jsonl"), ("lines", data / "ratings.jsonl")):
        command = [
            "judge",
            "fit",
            *of(backbone, data),
            "--ratings",
            ratings,
            "--out",
            tmp_path / name,
            *QUICK,
            "--json",
        ]
        found.append(document(command, capsys)["ridge"])
    assert found[0] == found[1]


@pytest.mark.slow
def test_under_torchrun_a_fit_is_shared_and_written_once(backbone, data, tmp_path):
    arguments = map(str, [*of(backbone, data), "--out", tmp_path / "judge", *QUICK, "--json", "--threads", 1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*launch, "-m", "telltale", "judge", "fit", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout)["pairs"] == 60
    assert (tmp_path / "judge" / "fit.json").is_file()


@pytest.mark.slow
def test_a_fit_without_files_takes_every_option_of_the_command(tmp_path, capsys, monkeypatch):
    """The first command of the tutorial once ended in a TypeError: it was never run as a command."""
    short = partial(default_judge.embedded_default, prompts=20, steps=2)
    monkeypatch.setattr(default_judge, "embedded_default", short)
    options = ["--intercept", "--scope", "pooled", "--method", "pearson", "--set", "steps=3"]
    found = document(["judge", "fit", "--out", tmp_path / "judge", "--json", *options], capsys)
    assert set(found["unseen"]) == set(found["accuracies"])
    assert Judge.load(tmp_path / "judge").objectives == default_judge.OBJECTIVES


@pytest.mark.long
def test_what_cannot_be_fitted_is_told_in_a_sentence(backbone, data, tmp_path, capsys):
    base = ["judge", "fit", *of(backbone, data), "--out", tmp_path / "judge"]
    refused([*base, "--scope", "prompt"], capsys, "scope='prompt'")
    refused([*base, "--method", "rank"], capsys, "method='rank'")
    refused([*base, "--layout", "hub"], capsys, "layout='hub'")
    refused([*base, "--set", "hiden=8"], capsys, "hiden", "hidden")
    refused([*base, "--nuisance", "length"], capsys, "'length'", "good, verbosity")
    refused([*base, "--context-length", 2], capsys, "context_length=2")
    refused([*base, "--how", "both"], capsys, "how='both'")
    refused([*base, "--device", "cuda:99"], capsys, "device='cuda:99'")
    refused(
        ["judge", "fit", "--nuisance", "concise", "--out", tmp_path / "judge"], capsys, "--nuisance", "--preferences"
    )
    refused(["judge", "fit", "--set", "hiden=8", "--out", tmp_path / "judge"], capsys, "hiden")
    refused(["judge", "fit", "--out", data], capsys, "holds something that is no judge")
    refused(["judge", "fit", "--ratings", data / "ratings.jsonl"], capsys, "--backbone")
    refused(["judge", "fit", "--backbone", backbone, "--ratings", data / "ratings.jsonl"], capsys, "--preferences")
    refused(["judge", "features", *of(tmp_path, data)], capsys, "config.json")
    (tmp_path / "ratings.jsonl").write_text(json.dumps({"prompt": "a", "response": "b", "ratings": {"good": 3}}))
    bad = [*of(backbone, data), "--ratings", tmp_path / "ratings.jsonl"]
    refused(["judge", "fit", *bad, "--out", tmp_path / "judge"], capsys, "line 1", "good", "3")
    assert not (tmp_path / "judge").exists()
