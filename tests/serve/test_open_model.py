"""From folders on disk to a served model: what goes together, and an early exit that is measured and told."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from decode.models_that_draft import exits_for
from serve.small_servers import models, running
from serve.small_tokenizers import byte_level, words
from telltale.decode import costs_report
from telltale.decode.calibration.calibration import Calibration, fingerprints_of
from telltale.decode.step_verified import StepVerifiedConfig
from telltale.errors import CheckpointError, ConfigError, DataError, TelltaleError
from telltale.models.draft_exits import checkpoint_fingerprint, draft_exits_path
from telltale.models.loading import load_model
from telltale.models.open import open_decoder
from telltale.serve.open_model import ServedModel, open_served


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, a draft, and a draft with another tokenizer."""
    found = {}
    for name, late, tokenizer in (("target", 0.3, byte_level()), ("draft", 0.1, byte_level()), ("other", 0.1, words())):
        found[name] = tmp_path_factory.mktemp(name) / name
        models(late).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def test_what_is_served_without_a_word(folders):
    found = open_served(folders["target"])
    assert (found.name, found.decode, found.decoder.config.policy) == ("target", "autoregressive", "target")
    assert open_served(folders["target"], name="mine").entry()["id"] == "mine"
    drafting = open_served(folders["target"], draft=folders["draft"])
    assert drafting.decode == "step-verified"
    assert drafting.entry()["telltale"]["draft"] == "draft"
    assert "not calibrated" in drafting.entry()["telltale"]["chosen"]


def test_settings_of_steps(folders):
    found = open_served(
        folders["target"], draft=folders["draft"], settings={"threshold": float("inf"), "candidates": 2}
    )
    assert found.decoder.config.candidates == 2
    assert found.entry()["telltale"]["threshold"] == "inf"
    alone = open_served(folders["target"], decode="step-verified", exit_layer=2, settings={"score": "agreement"})
    assert (alone.decoder.exit_layer, alone.decoder.draft) == (2, None)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draft_exits_beside_the_checkpoint_draft_for_the_server(folders, tmp_path, temperature):
    folder = tmp_path / "target"
    shutil.copytree(folders["target"], folder)
    exits = replace(exits_for(load_model(folder)), made_for=checkpoint_fingerprint(folder))
    exits.save(draft_exits_path(folder))
    found = open_served(folder, decode="self-speculative", exit_layer=2, draft_length=3, backend="fused").decoder
    assert list(found.target.draft_heads.exits) == [1, 2]
    prompts = [[5, 6, 7, 8, 9], [3, 1]]
    options = {"max_new_tokens": 24, "eos_token_id": [], "temperature": temperature}
    given = found.generate(prompts, **options, generator=torch.Generator().manual_seed(0))
    assert 0 < given.stats.speculated_accepted < given.stats.speculated
    if temperature == 0.0:
        plain = open_served(folder, backend="fused").decoder.generate(prompts, **options)
        assert given.tokens.tolist() == plain.tokens.tolist()
    replace(exits, made_for="another").save(draft_exits_path(folder))
    with pytest.raises(CheckpointError, match="made for other weights"):
        open_served(folder, decode="self-speculative", exit_layer=2, draft_length=3)
    assert open_served(folder).decode == "autoregressive"


@pytest.fixture
def calibration(folders, tmp_path):
    """A calibration of the pair, as a file."""
    config = StepVerifiedConfig(delimiter="e", max_step_tokens=16, candidates=2, beta=1.0, threshold=0.25)
    pair = open_served(folders["target"], draft=folders["draft"]).decoder
    found = Calibration(
        config=config,
        method="crc",
        risk="steps",
        alpha=0.05,
        loss="mean",
        unknown="skip",
        confidence=None,
        n=200,
        fingerprints=fingerprints_of(pair),
        sampling={"temperature": 0.7, "top_p": None, "top_k": None, "max_new_tokens": 64},
    )
    return found.save(tmp_path / "guard.json"), found


def test_a_calibrated_pair_says_which_answers_the_calibration_covers(folders, calibration):
    path, made = calibration
    found = open_served(folders["target"], draft=folders["draft"], guard=path)
    assert (found.decode, found.decoder.config) == ("step-verified", made.config)
    assert found.entry()["telltale"]["calibration"]["alpha"] == 0.05
    assert "calibrated for steps risk 0.05" in found.entry()["telltale"]["chosen"]
    with running(found) as server:

        def covered(override=None, **sampling):
            body = {"telltale": override or {}} if override else {}
            answer = server.client().completions.create(
                model="target", prompt="two", max_tokens=2, extra_body=body, **sampling
            )
            return answer.telltale["calibrated"]

        assert covered(temperature=0.7)
        assert covered(temperature=0.7, top_p=1)
        assert covered({"threshold": 0.25}, temperature=0.7)
        assert not covered(temperature=0.8)
        assert not covered(temperature=0.7, top_p=0.9)
        assert not covered({"threshold": 0.2}, temperature=0.7)
        assert not covered({"speculate": False}, temperature=0.7)


def test_a_calibration_of_other_models_or_with_other_settings_is_refused(folders, calibration, tmp_path):
    path, made = calibration
    draft = {"draft": folders["draft"], "guard": path}
    for options, word in (
        ({"draft": folders["target"], "guard": path}, "draft"),
        ({"guard": path}, "--draft"),
        (draft | {"settings": {"beta": 1}}, "--set"),
        (draft | {"exit_layer": 2}, "--exit-layer"),
        (draft | {"decode": "autoregressive"}, "--draft"),
        (draft | {"guard": tmp_path / "none.json"}, "none.json"),
    ):
        with pytest.raises(TelltaleError, match=word):
            open_served(folders["target"], **options)
    replace(made, config=replace(made.config, threshold=float("inf"))).save(path)
    assert "nothing is accepted" in open_served(folders["target"], **draft).entry()["telltale"]["chosen"]


def test_an_exit_that_was_asked_for_is_taken(folders):
    found = open_served(folders["target"], decode="self-speculative", exit_layer=3, draft_length=2)
    config = found.decoder.config
    assert (config.policy, config.exit_layer, config.draft_length) == ("speculative", 3, 2)
    assert "measured_speedup" not in found.about


@pytest.mark.long
@pytest.mark.parametrize("measured", [2.0, 0.5])
def test_an_exit_that_is_measured_is_told_and_taken_only_if_it_pays(folders, monkeypatch, measured):
    monkeypatch.setattr(costs_report, "_measured", lambda *arguments: [measured for _ in arguments[-1]])
    found = open_served(folders["target"], decode="self-speculative")
    config = found.decoder.config
    assert config.policy == ("speculative" if measured > 1 else "target")
    told = found.entry()["telltale"]
    assert f"exit layer {config.exit_layer}" in told["chosen"]
    assert f"{measured:.2f}x measured" in told["chosen"]
    assert ("no exit pays" in told["chosen"]) == (measured < 1)
    assert (told["exit_layer"], told["measured_speedup"]) == (config.exit_layer, measured)
    asked = open_served(folders["target"], decode="self-speculative", exit_layer=1)
    assert (asked.decoder.config.policy, asked.decoder.config.exit_layer) == ("speculative", 1)
    asked = open_served(folders["target"], decode="self-speculative", draft_length=4)
    assert asked.decoder.config.draft_length == 4


def test_the_warm_up_measures_the_models_own_text():
    decoder = open_decoder(models())
    found = costs_report.tune(decoder, byte_level())
    assert 1 <= found.exit_layer < decoder.layers
    assert found.tokens == costs_report.TUNING_ROWS * (
        len(costs_report._beginnings(decoder, byte_level())[0]) + costs_report.TUNING_TOKENS - 1
    )
    assert 0 < found.agreement <= 1
    assert found.measured > 0
    starts = costs_report._beginnings(decoder, byte_level())
    assert len({tuple(start) for start in starts}) == costs_report.TUNING_ROWS
    (first, *_) = costs_report._own_text(decoder, starts)
    logits = decoder.model(first[:, :-1]).logits
    own = first[0, len(starts[0]) :]
    assert torch.equal(logits[0, len(starts[0]) - 1 :].argmax(-1), own), "the text is not the model's own"


REFUSED = [
    ({"decode": "medusa"}, "medusa"),
    ({"exit_layer": 2}, "--exit-layer"),
    ({"draft_length": 2}, "--draft-length"),
    ({"settings": {"beta": 1}}, "--set"),
    ({"decode": "autoregressive", "draft": "draft"}, "--draft"),
    ({"decode": "self-speculative", "draft": "draft"}, "--draft"),
    ({"decode": "self-speculative", "exit_layer": 0}, "exit_layer=0"),
    ({"decode": "self-speculative", "exit_layer": 4}, "exit_layer=4"),
    ({"decode": "self-speculative", "exit_layer": 4, "draft_length": 1}, "exit_layer=4"),
    ({"decode": "step-verified"}, "--draft"),
    ({"decode": "step-verified", "draft": "draft", "draft_length": 2}, "--draft-length"),
    ({"draft": "draft", "settings": {"tau": 1}}, "tau"),
    ({"draft": "draft", "settings": {"beta": 2}}, "beta=2"),
    ({"draft": "draft", "exit_layer": 2}, "both --draft and --exit-layer"),
    ({"dtype": "int3"}, "int3"),
    ({"name": ""}, "name=''"),
]


@pytest.mark.parametrize(("options", "word"), REFUSED, ids=[word for _, word in REFUSED])
def test_options_that_do_not_go_together(folders, options, word):
    options = {key: folders.get(value, value) if key == "draft" else value for key, value in options.items()}
    with pytest.raises(ConfigError, match=word):
        open_served(folders["target"], **options)


def test_models_that_cannot_be_served(folders, tmp_path):
    with pytest.raises(CheckpointError, match="none"):
        open_served(tmp_path / "none")
    with pytest.raises(DataError, match="another vocabulary"):
        open_served(folders["target"], draft=folders["other"])


def test_the_fingerprint_is_of_what_decides_over_answers(folders):
    found = open_served(folders["target"], draft=folders["draft"])
    again = open_served(folders["target"], draft=folders["draft"])
    other = open_served(folders["target"], draft=folders["draft"], settings={"threshold": 0.1})
    assert found.fingerprint == again.fingerprint != other.fingerprint
    assert isinstance(replace(found, name="x"), ServedModel)
    assert replace(found, name="x").fingerprint != found.fingerprint
