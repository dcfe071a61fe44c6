"""``telltale specguard``: a threshold for a pair, a report in JSON and as a page, both resumable, and refusals in one sentence."""

from __future__ import annotations

import json
import math
import signal

import pytest

from cli.commands import called, refused
from decode.step_verified.tiny_guards import model
from models.tiny_models import tiny_model
from telltale.decode.step_verified import Calibration
from telltale.tasks import chains
from telltale.tasks.chain_checker import ChainLabeler

SMALL = ["--set", "delimiter=a", "--set", "max_step_tokens=8", "--candidates", "2", "--fallback", "plain"]
SHORT = ["--max-new-tokens", "14", "--temperature", "1", "--top-p", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    for name, seed in (("target", 0), ("draft", 1)):
        model(seed).save_pretrained(root / name)
        chains.tokenizer().save_pretrained(root / name)
    tiny_model("llama", vocab_size=40).save_pretrained(root / "other")
    chains.tokenizer(["Zoe"]).save_pretrained(root / "other")
    return root


@pytest.fixture
def pair(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--target", folders / "target", "--draft", folders / "draft", *SMALL, *SHORT]


def document(arguments, capsys):
    return json.loads(called([*arguments, "--json"], capsys).out, parse_constant=pytest.fail)


@pytest.mark.long
def test_calibrate_writes_a_file_that_fits_the_pair_and_reports_what_it_tried(pair, folders, tmp_path, capsys):
    options = ["specguard", "calibrate", *pair, "--problems", "16", "--alpha", "0.9", "--labeler", "agreement"]
    found = document([*options, "-o", tmp_path / "guard.json"], capsys)
    calibration = Calibration.load(tmp_path / "guard.json")
    assert found["written"] == str(tmp_path / "guard.json")
    assert found["n"] == 8 == calibration.n
    assert len(found["tried"]) == len(calibration.tried) >= 1
    assert calibration.config.signal_model == "target"
    assert calibration.config.beta in (0.0, 0.3, 0.5, 0.7, 1.0)
    assert calibration.sampling["top_p"] is None
    from telltale.models import load

    target, tokenizer = load(folders / "target")
    calibration.guard(target, load(folders / "draft")[0], tokenizer)
    # The same command has nothing to decode, and tells the same.
    text = called([*options, "-o", tmp_path / "again.json"], capsys).out
    assert "alpha 0.9 on 8 problems" in text
    assert Calibration.load(tmp_path / "again.json") == calibration


def test_one_model_drafts_with_its_first_layers_and_an_alpha_out_of_reach_is_told(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["specguard", "calibrate", "--target", folders / "target", "--exit-layer", "2", *SMALL, *SHORT]
    captured = called([*arguments, "--problems", "8", "--alpha", "0.01", "--beta", "1"], capsys)
    assert "warning: alpha=0.01 cannot be shown with 4 calibration problems (it takes 99)" in captured.err
    assert "No threshold: the target writes every step." in captured.out
    calibration = Calibration.load(tmp_path / "guard.json")
    assert calibration.threshold == math.inf
    assert calibration.config.exit_layer == 2


@pytest.mark.long
def test_report_writes_json_and_a_page_and_takes_a_calibration(pair, tmp_path, capsys):
    common = ["--problems", "8", "--labeler", "agreement", "--batch", "4"]
    called(["specguard", "calibrate", *pair, *common, "--alpha", "0.9", "--loss", "any", "--beta", "0.3"], capsys)
    options = ["specguard", "report", *pair, *common, "--scores", "draft log-probability", "--acceptances", "0.5"]
    found = document([*options, "--guard", "guard.json", "-o", tmp_path / "report"], capsys)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == {
        key: value for key, value in found.items() if key != "written"
    }
    assert found["calibration"]["alpha"] == 0.9
    assert found["models"] == {"target": "target", "draft": "draft"}
    assert list(found["frontier"]["scores"]) == ["draft log-probability"]
    assert "Plotly.newPlot" in (tmp_path / "report" / "report.html").read_text()
    text = called([*options, "-o", tmp_path / "report"], capsys).out
    assert text.count("\n- ") >= 4
    assert f"written: {tmp_path / 'report' / 'report.html'}" in text


@pytest.mark.long
def test_an_interrupted_report_goes_on_with_the_same_command(pair, tmp_path, monkeypatch, capsys):
    options = ["specguard", "report", *pair, "--problems", "6", "--batch", "2", "--scores", "agreement"]
    options += ["--acceptances", "0.5", "-o", tmp_path / "report"]
    labels, asked = ChainLabeler.label, []

    def label(self, *arguments):
        asked.append(arguments)
        if len(asked) == 30:
            signal.raise_signal(signal.SIGINT)
        return labels(self, *arguments)

    monkeypatch.setattr(ChainLabeler, "label", label)
    captured = called(options, capsys, code=130)
    assert "a specguard command with the same command" in captured.err
    assert not (tmp_path / "report" / "report.json").exists()
    first = len(asked)
    called(options, capsys)
    second = len(asked) - first
    called([*options[:-1], tmp_path / "fresh"], capsys)
    assert second < len(asked) - first - second
    pages = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("report", "fresh")]
    assert _without_times(pages[0]) == _without_times(pages[1])


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(one) for name, one in value.items() if "milliseconds" not in name}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


@pytest.mark.long
def test_problems_of_a_file_go_through_the_template(pair, tmp_path, capsys):
    lines = [
        {"question": f"Fay has {n} .", "answer": f"Fay has {n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(9)
    ]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    options = ["specguard", "calibrate", *pair, "--data", data, "--alpha", "0.9", "--unknown", "wrong"]
    found = document([*options, "--labeler", "rollouts", "--rollouts", "2", "--shots", "1", "--beta", "1"], capsys)
    assert found["n"] == 4
    assert found["unknown"] == "wrong"


@pytest.mark.long
def test_calibrate_refuses_what_it_cannot_use(pair, capsys, subtests):
    for change, words in [
        (["--exit-layer", "2"], ["either --draft, or --exit-layer"]),
        (["--alpha", "2"], ["alpha=2.0"]),
        (["--method", "magic"], ["method='magic'"]),
        (["--beta", "much"], ["beta='much'"]),
        (["--task", "poems"], ["task='poems'", "'chains', 'gsm8k'"]),
        (["--task", "gsm8k"], ["needs --data"]),
        (["--task", "chains", "--data", "x.jsonl"], ["leave it out"]),
        (["--data", "none.jsonl"], ["none.jsonl cannot be read"]),
        (["--labeler", "me"], ["labeler='me'"]),
        (["--problems", "0"], ["problems=0"]),
        (["--problems", "1"], ["1 problems"]),
        (["--candidates", "0"], ["candidates=0"]),
        (["--set", "colour=red"], ["unknown config field 'colour'"]),
        (["--set", "threshold"], ["expected key=value"]),
        (["--score", "magic"], ["score='magic'"]),
        (["--shots", "2"], ["--shots is for --task gsm8k"]),
        (["--max-new-tokens", "500"], ["positions"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--batch", "0"], ["batch=0"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--seed", "99999999999999999999"], ["seed=99999999999999999999"]),
        (["--set", "normaliser=ecdf"], ["normaliser='ecdf'"]),
        (["--method", "ltt", "--alpha", "1"], ["alpha=1.0"]),
        (["--score", "agreement", "--temperature", "0"], ["score='agreement'", "temperature=0"]),
        (["-o", "."], ["could not write .", "it is a folder"]),
        (["-o", "/dev/null/guard.json"], ["could not write /dev/null/guard.json", "is no folder"]),
        (["--threads", "0"], ["threads=0"]),
        (["--dtype", "int3"], ["dtype='int3'"]),
        (["--method", "crc", "--risk", "accuracy-drop"], ["risk='accuracy-drop'"]),
    ]:
        with subtests.test(change=change):
            refused(["specguard", "calibrate", *pair, *change], capsys, *words)


def test_both_models_are_read_in_8_bits(folders, capsys):
    from telltale.decode.step_verified import StepVerified

    for draft in (["--draft", folders / "draft"], ["--exit-layer", "2"]):
        options = ["specguard", "costs", "--target", folders / "target", *draft, *SMALL, "--threads", "1"]
        sizes = ["--prompt-tokens", "8", "--step-tokens", "2", "--dtype", "float32"]
        opened = []
        make = StepVerified.__init__

        def noted(self, target, drafting, *rest, make=make, opened=opened, **more):
            make(self, target, drafting, *rest, **more)
            opened.append([d.weight_format for d in (self.target, self.draft) if d is not None])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepVerified, "__init__", noted)
            document([*options, *sizes, "--weights", "int8"], capsys)
        assert opened[0] == ["int8"] * len(opened[0])
    refused([*options, "--weights", "int3"], capsys, "weights='int3'", "'int8'")


def test_other_tokenizers_and_missing_folders_are_refused(pair, folders, capsys):
    rest = pair[4:]
    other = ["specguard", "calibrate", "--target", folders / "target", "--draft", folders / "other", *rest]
    refused(other, capsys, "another vocabulary")
    refused(["specguard", "report", "--target", folders / "none", "--draft", folders / "draft", *rest], capsys, "none")


@pytest.mark.long
def test_report_refuses_what_it_cannot_use(pair, folders, tmp_path, capsys):
    report = ["specguard", "report", *pair, "--problems", "4", "-o", tmp_path / "report"]
    refused([*report, "--scores", "magic"], capsys, "score 'magic'")
    refused([*report, "--acceptances", "most"], capsys, "acceptances='most'")
    refused([*report, "--acceptances", ""], capsys, "acceptances is empty")
    refused([*report, "--seeds", "0"], capsys, "seeds=0")
    refused([*report, "--seed", "99999999999999999999"], capsys, "seed=99999999999999999999")
    refused([*report, "--scores", "agreement", "--temperature", "0"], capsys, "score='agreement'", "temperature=0")
    refused([*report, "--guard", "none.json"], capsys, "none.json cannot be read")
    calibrate = ["specguard", "calibrate", *pair, "--problems", "8", "--alpha", "0.9", "--beta", "1"]
    called(calibrate, capsys)
    swapped = ["--target", folders / "draft", "--draft", folders / "target", *pair[4:]]
    refused(["specguard", "report", *swapped, "--guard", "guard.json"], capsys, "the target is not the one")
