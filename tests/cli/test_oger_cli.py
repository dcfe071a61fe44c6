"""``telltale oger`` as a user calls it: inspect, train and resume, compare; and what it says when something is wrong."""

import json

import pytest

from telltale import cli
from telltale.tasks import routes

pytestmark = pytest.mark.long
PROBLEMS = routes.split()[0][:12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("oger")
    for name, rows in (("prompts", routes.prompt_rows(PROBLEMS)), ("teachers", list(routes.teacher_rows(PROBLEMS)))):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    routes.build_policy(routes.BaseRecipe(width=32, heads=2)).save_pretrained(place / "policy")
    routes.build_tokenizer().save_pretrained(place / "policy")
    return place


def files(folder):
    return [str(folder / "prompts.jsonl"), str(folder / "teachers.jsonl"), "--verifier", "routes"]


def output(capsys, arguments, code=0):
    assert cli.run([str(part) for part in arguments]) == code
    return capsys.readouterr()


def test_inspect_tells_counts_and_whether_the_encoder_sees_a_difference(folder, capsys):
    shared = ["oger", "inspect", *files(folder), "--checkpoint", folder / "policy", "--max-completion-length", 8]
    found = json.loads(output(capsys, [*shared, "--json"]).out)
    assert [row["teacher"] for row in found["teachers"]] == ["S5", "S10", "D2"]
    assert {row["usable"] for row in found["teachers"]} == {12}
    assert {row["mean_tokens"] for row in found["teachers"]} == {8.0}
    assert found["separates"] is True
    assert found["similarity"][0][0] == 1.0
    shown = output(capsys, [*shared, "--encoder", "hidden"]).out
    assert "mean cosine of two" in shown
    alike = folder / "alike.py"
    alike.write_text("def all_right(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    same = folder / "same.jsonl"
    rows = [row | {"text": f"{row['prompt_id']} the same"[-9:]} for row in routes.teacher_rows(PROBLEMS)]
    same.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["oger", "inspect", folder / "prompts.jsonl", same, "--verifier", f"{alike}:all_right", "--json"]
    blind = json.loads(output(capsys, arguments).out)
    assert blind["separates"] is False
    assert "cannot separate" in blind["verdict"]


def test_train_writes_a_run_and_resumes_it(folder, capsys, tmp_path):
    def command(out, steps, *more):
        settings = ["max_completion_length=8", "learning_rate=1e-3", "num_generations=4", "save_steps=2"]
        given = [part for setting in settings for part in ("--set", setting)]
        return ["oger", "train", folder / "policy", *files(folder), "--out", out, "--steps", steps, *given, *more]

    summary = json.loads(output(capsys, command(tmp_path / "whole", 4, "--json")).out)
    assert summary["steps"] == 4
    assert summary["last"]["oger/teacher_share"] == 0.25
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    output(capsys, command(tmp_path / "parts", 2))
    said = output(capsys, command(tmp_path / "parts", 4), code=2).err
    assert "already holds a run" in said
    output(capsys, command(tmp_path / "parts", 4, "--resume"))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    said = output(capsys, command(tmp_path / "parts", 4, "--resume", "--seed", 9), code=2).err
    assert "was begun with seed=0, not 9" in said


def test_compare_makes_a_table_and_a_page_and_goes_on(capsys, tmp_path):
    pytest.importorskip("plotly")
    arguments = [
        "oger",
        "compare",
        "--arms",
        "grpo,default",
        "--seeds",
        "0,1",
        "--steps",
        2,
        "--base-steps",
        2,
        "--problems",
        4,
    ]
    arguments += ["--out", tmp_path / "compared"]
    shown = output(capsys, arguments).out
    assert "grpo" in shown
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "teachers in the batch" in page
    files = sorted((tmp_path / "compared" / "results").iterdir())
    assert [file.name for file in files] == ["default-0.json", "default-1.json", "grpo-0.json", "grpo-1.json"]
    before = [file.stat().st_mtime_ns for file in files]
    again = json.loads(output(capsys, [*arguments, "--json"]).out)
    assert [row["arm"] for row in again["arms"]] == ["grpo", "default"]
    assert [file.stat().st_mtime_ns for file in files] == before
    said = output(capsys, [*arguments[:-6], "--base-steps", 3, "--out", tmp_path / "compared"], code=2).err
    assert "holds a comparison of another setting" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verifier", "best"], "verifier='best' is unknown"),
        (["--verifier", "absent.py:check"], "there is no file absent.py"),
        (["--verifier", "gsm8k", "--set", "oger_coeff=1"], "'oger_coeff' is no field.*Did you mean 'oger_coef'"),
        (["--set", "oger_hybrid=8"], "oger_hybrid=8 leaves no rollout of num_generations=8"),
        (["--set", "num_generations=3", "--set", "per_device_train_batch_size=4"], "TRL refuses this config"),
        (["--preset", "best"], "oger_preset='best'"),
        (["--steps", "0"], "max_steps=0"),
        (["--steps", "-3"], "max_steps=-3"),
        (["--set", "max_completion_length=3"], "no teacher trace is left for this policy"),
    ],
)
def test_bad_arguments_are_a_sentence(folder, capsys, tmp_path, arguments, message):
    command = ["oger", "train", folder / "policy", *files(folder), "--out", tmp_path / "run", "--steps", 1, *arguments]
    said = output(capsys, command, code=2).err
    import re

    assert re.search(message, said), said
    assert "Traceback" not in said


def test_a_failing_verifier_is_a_sentence(folder, capsys):
    (folder / "broken.py").write_text("def check(prompts, completions, **columns):\n    raise KeyError('answer')\n")
    command = ["oger", "inspect", *files(folder)[:2], "--verifier", f"{folder / 'broken.py'}:check"]
    said = output(capsys, command, code=2).err
    assert "the verifier check failed" in said
    assert "KeyError" in said


@pytest.mark.parametrize(
    ("seeds", "message"), [("0,0", "names a run twice"), ("-1", "seed=-1"), ("a", "not understood")]
)
def test_seeds_of_a_comparison(tmp_path, capsys, seeds, message):
    assert message in output(capsys, ["oger", "compare", "--seeds", seeds, "--out", tmp_path / "compared"], code=2).err
    assert not (tmp_path / "compared").exists()
