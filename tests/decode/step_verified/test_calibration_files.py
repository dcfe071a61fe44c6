"""A calibration's file: read as written, refused when it is another thing, and refused for other models, by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from decode.step_verified.tiny_guards import model, tiny_guard
from telltale.decode.calibration.calibration import config_from_dict, config_to_dict, fingerprints_of
from telltale.decode.calibration.prompts import PromptForm
from telltale.decode.calibration.risk import RealisedRisk, Tried
from telltale.decode.step_verified import Calibration, Normaliser, Scale, StepVerified
from telltale.errors import CalibrationError, CheckpointError, ConfigError, TelltaleError
from telltale.runs.files import strict_json
from telltale.tasks import chains


@pytest.fixture
def found():
    guard = tiny_guard(
        threshold=0.4375,
        normaliser=Normaliser("ecdf", Scale(-7.5, -0.1, (-7.5, -1.0, -0.1)), Scale(0.2, 0.9, (0.2, 0.9)), fitted=True),
        position_quantiles=((0.1, 0.5), (0.2,)),
    )
    return Calibration(
        config=guard.config,
        method="crc",
        risk="steps",
        alpha=0.05,
        loss="mean",
        unknown="skip",
        confidence=None,
        n=100,
        fingerprints=fingerprints_of(guard),
        prompts=PromptForm("chat", 2, "Think.", (1, 5), (7,), (9, 40)),
        labeler="Gsm8kLabeler",
        coverage={"answers": 9, "wrong": 4, "unflagged": 1, "steps": 30, "unknown": 3},
        sampling={"max_new_tokens": 24, "temperature": 0.7, "top_p": 0.8, "top_k": None},
        tried=(Tried(0.5, 0.02, 0.03, True, 0.6), Tried(0.4375, 0.03, 0.04, True, 0.7)),
        realised=RealisedRisk(0.03, 0.01, 0.09, 0.03, 0.01, 0.05, 0.04, 50, 250, 170),
        signals={"grounding": {"value": 0.4, "low": 0.3, "high": 0.5, "right": 3, "wrong": 2, "pairs": 6}},
        warnings=("the draft's grounding points the wrong way",),
    )


def test_a_file_gives_back_what_was_saved_and_is_strict_json(tmp_path, found):
    for one in (found, replace(found, config=replace(found.config, threshold=math.inf)), replace(found, realised=None)):
        path = one.save(tmp_path / "guard.json")
        raw = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert raw["n"] == 100
        assert raw["fingerprints"] == found.fingerprints
        assert Calibration.load(path) == one
    assert [file.name for file in tmp_path.iterdir()] == ["guard.json"]


def test_its_config_is_ready_to_use(tmp_path, found):
    config = Calibration.load(found.save(tmp_path / "guard.json")).config
    guard = StepVerified(model(0), model(1), chains.tokenizer(), config)
    found.check(guard)
    result = guard.generate([[1, 5, 6, 7]], max_new_tokens=12)
    assert result.stats.calibrated


@pytest.mark.parametrize("which", ["target", "draft", "tokenizer"])
def test_another_pair_is_refused_by_the_name_of_what_differs(found, which):
    models = {"target": model(0), "draft": model(1), "tokenizer": chains.tokenizer()}
    models[which] = chains.tokenizer(["Zoe"]) if which == "tokenizer" else model(2)
    if which == "tokenizer":
        models = {"target": model(0), "draft": model(1), "tokenizer": _renamed()}
    with pytest.raises(CalibrationError, match=f"the {which} is not the one that was calibrated"):
        found.guard(**models)


def _renamed():
    other = chains.tokenizer()
    other.pad_token = "<eos>"
    return other


def test_swapped_models_and_a_missing_draft_are_refused(found):
    with pytest.raises(CalibrationError, match="the target is not"):
        found.guard(model(1), model(0), chains.tokenizer())
    with pytest.raises(CalibrationError, match="made with a draft model drafting"):
        found.check(tiny_guard(draft=None, exit_layer=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("telltale_calibration"), "no calibration of format 2"),
        (lambda raw: raw.update(telltale_calibration=1), "no calibration of format 2"),
        (lambda raw: raw.pop("fingerprints"), "KeyError"),
        (lambda raw: raw["fingerprints"].pop("target"), "no fingerprints of target"),
        (lambda raw: raw.update(threshold=0.3), "was not edited"),
        (lambda raw: raw["config"].update(threshold=None), "threshold=None is not a number"),
        (lambda raw: raw["config"].update(beta=3), "beta"),
        (lambda raw: raw["config"].update(colour="red"), "unknown config field 'colour'"),
        (lambda raw: raw["config"]["normaliser"]["grounding"].update(low=1.0), "normaliser"),
        (lambda raw: raw["config"].pop("normaliser"), "normaliser"),
        (lambda raw: raw["tried"].append({"threshold": 1}), "TypeError"),
        (lambda raw: raw.update(config=[]), "cannot be used"),
        (lambda raw: raw.update(alpha="much"), "could not convert"),
        (lambda raw: raw.update(alpha=math.nan), "alpha=nan"),
        (lambda raw: raw.update(method="hope"), "method='hope'"),
        (lambda raw: raw.update(risk="none"), "risk='none'"),
        (lambda raw: raw.update(loss="little"), "loss='little'"),
        (lambda raw: raw.update(unknown="ask"), "unknown='ask'"),
        (lambda raw: raw.update(n=0), "n=0"),
        (lambda raw: raw["fingerprints"].update(draft=5), "fingerprint of the draft is 5"),
        (lambda raw: (raw.update(threshold=0.3), raw["config"].update(threshold=0.3)), "was not edited"),
        (lambda raw: raw["config"]["normaliser"]["grounding"].update(low=0.01), "was not edited"),
        (lambda raw: raw.update(alpha=0.01), "was not edited"),
        (lambda raw: raw.update(note="trust me"), "was not edited"),
        (lambda raw: raw["prompts"].update(before="x"), "prompts' form cannot be read"),
        (lambda raw: raw["prompts"].update(shots=3), "was not edited"),
        (lambda raw: raw.pop("digest"), "KeyError"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, found, change, words):
    path = found.save(tmp_path / "guard.json")
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(CalibrationError, match=words) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_what_is_no_json_or_no_file_is_refused(tmp_path, text):
    path = tmp_path / "guard.json"
    path.write_text(text)
    with pytest.raises(CalibrationError):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError):
        Calibration.load(path)


def test_an_unwritable_place_is_told(tmp_path, found):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        found.save(tmp_path / "file" / "guard.json")


def test_the_error_is_one_of_telltales_and_a_value_error():
    assert issubclass(CalibrationError, TelltaleError)
    assert issubclass(CalibrationError, ValueError)


def test_configs_come_back_from_plain_values_and_infinities_become_words(found):
    config = replace(found.config, threshold=-math.inf)
    again = json.loads(json.dumps(strict_json(config_to_dict(config), infinity_as_text=True), allow_nan=False))
    assert again["threshold"] == "-inf"
    assert config_from_dict(again) == config
    with pytest.raises(ConfigError, match="threshold=True"):
        config_from_dict(again | {"threshold": True})
