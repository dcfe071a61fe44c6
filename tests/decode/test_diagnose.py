"""The verdict on a checkpoint, and the sweep: yes where drafting pays, no with the reason where it does not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.decode.models_that_draft import drafting_model, exits_for, random_prompt

from models.tiny_models import tiny_model
from telltale.decode import diagnose as diagnosis
from telltale.decode.costs_report import expected_acceptance, sweep
from telltale.decode.diagnose import NgramOutlook, diagnose
from telltale.errors import ConfigError, DataError
from telltale.models.draft_exits import attached
from telltale.models.families import parts_of


class Costs:
    """A machine on which a pass over n tokens costs ``slope`` (n - 1) more single ones."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def relative(self, width: int) -> float:
        return 1.0 + self.slope * (width - 1)

    def speedup(self, exit_layer: int, length: int, acceptance_rate: float) -> float:
        spent = (length + 1) * exit_layer + (4 - exit_layer) * self.relative(length + 1)
        return (1.0 + acceptance_rate * length) * 4 / spent


def ids() -> list[torch.Tensor]:
    return [torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))]


def agreeing_model():
    """Layers after the first add nothing, so every exit says what the last layer says."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in parts_of(model).layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_acceptance_expected_of_independent_drafts():
    assert expected_acceptance([0.5], 2) == pytest.approx((0.5 + 0.25) / 2)
    assert expected_acceptance([1.0], 7) == 1.0
    assert expected_acceptance([0.3], 0) == 0.0


def test_yes_where_early_layers_agree_and_passes_are_cheap(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(0.05))
    result = diagnose(agreeing_model(), ids())
    assert [row.agreement for row in result.exits] == [1.0, 1.0, 1.0]
    assert result.best.exit_layer == 1
    assert result.pays
    assert result.verdict.startswith("Yes")
    assert "exit layer 1" in result.verdict


def test_draft_exits_of_a_retrofit_are_what_is_judged(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(0.05))
    model = drafting_model()
    texts = [torch.tensor([random_prompt(seed, 24) for seed in range(4)])]
    plain = diagnose(model, texts)
    assert [row.exit_layer for row in plain.exits] == [1, 2, 3]
    with attached(model, exits_for(model)):
        judged = diagnose(model, texts)
    assert [(row.exit_layer, row.loss) for row in judged.exits] == [(1, None), (2, None)]
    # They can draft two of three tokens of the vocabulary.
    assert 0 < judged.exits[1].agreement < plain.exits[1].agreement


def test_no_and_train_first_where_early_layers_disagree(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(0.05))
    result = diagnose(tiny_model("llama"), ids())
    assert not result.pays
    assert "recipe" in result.verdict


def test_no_and_use_ngrams_where_wide_passes_are_dear(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(1.0))
    result = diagnose(agreeing_model(), ids())
    assert not result.pays
    assert "n-gram" in result.verdict


class EveryExit(Costs):
    """A machine for a model of any depth."""

    def __init__(self, slope: float, layers: int) -> None:
        super().__init__(slope)
        self.layers = layers

    def speedup(self, exit_layer: int, length: int, acceptance_rate: float) -> float:
        spent = (length + 1) * exit_layer + (self.layers - exit_layer) * self.relative(length + 1)
        return (1.0 + acceptance_rate * length) * self.layers / spent


@pytest.mark.parametrize(("layers", "first"), [(4, 2), (12, 3), (9, 3), (5, 2)])
def test_training_is_promised_for_an_exit_that_the_recipe_trains_with_what_it_takes(layers, first, monkeypatch):
    costs = EveryExit(0.05, layers)
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: costs)
    model = tiny_model("llama", num_hidden_layers=layers)
    result = diagnose(model, ids())
    training = result.training
    cheapest = max(
        (costs.speedup(exit_layer, length, expected_acceptance([0.9], length)), exit_layer)
        for exit_layer in range(1, layers)
        for length in range(1, 13)
    )
    assert cheapest[1] < first <= training.exit_layer
    assert f"{cheapest[0]:.2f}x" not in result.verdict
    assert f"exit layer {training.exit_layer} with drafts of {training.draft_length} token" in result.verdict
    assert f"{training.predicted_speedup:.2f}x if it came to agree on 90%" in result.verdict
    assert "10,000 steps" in result.verdict
    assert training.memory_bytes == 16 * sum(p.numel() for p in model.parameters())
    assert training.fits
    monkeypatch.setattr(diagnosis, "_memory_of", lambda device: 1000)
    assert "train elsewhere" in diagnose(model, ids()).verdict


def test_a_model_too_shallow_for_a_trained_exit_is_promised_nothing(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: EveryExit(0.05, 2))
    result = diagnose(tiny_model("llama", num_hidden_layers=2), ids())
    assert result.training is None
    assert "too shallow" in result.verdict
    alone = diagnose(tiny_model("llama", num_hidden_layers=1), ids())
    assert alone.verdict.startswith("No: the model has one layer")


def test_ngrams_are_run_on_the_texts_and_the_verdict_says_what_they_gave(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(0.05))
    result = diagnose(tiny_model("llama"), ids())
    assert result.ngram.speedup > 0
    assert "n-gram drafts" in result.verdict
    for outlook, words in (
        (NgramOutlook(40, 0.5, 1.31), r"gave 1\.31x on these texts \(50% of 40 accepted\).*without any training"),
        (NgramOutlook(40, 0.1, 0.97), r"plain decoding is the choice: n-gram drafts gave 0\.97x"),
        (NgramOutlook(0, 0.0, 1.0), r"plain decoding is the choice: n-gram drafts found nothing"),
        (None, r"no room to try n-gram drafts"),
    ):
        monkeypatch.setattr(diagnosis, "_ngrams", lambda *arguments, outlook=outlook: outlook)
        verdict = diagnose(tiny_model("llama"), ids()).verdict
        assert re.search(words, verdict), verdict


@pytest.mark.long
def test_the_case_of_the_promise_that_no_training_keeps(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(Path(__file__).parent / "cases" / "case_13_diagnose_promise.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert not ended.value.code


def test_nothing_to_predict_is_refused():
    with pytest.raises(DataError, match="no token"):
        diagnose(tiny_model("llama"), [])


def test_sweep_measures_every_pair_and_knows_full_acceptance():
    prompt = torch.arange(12)
    result = sweep(agreeing_model(), [prompt], exit_layers=[1, 3], draft_lengths=(1, 4), new_tokens=16, rounds=1)
    assert [(p.exit_layer, p.draft_length) for p in result.points] == [(1, 1), (1, 4), (3, 1), (3, 4)]
    assert all(point.acceptance_rate == 1.0 for point in result.points)
    assert all(point.speedup > 0 and point.tokens_per_second > 0 for point in result.points)
    assert result.best.speedup == max(point.speedup for point in result.points)


def test_sweep_refuses_what_cannot_be_swept():
    with pytest.raises(ConfigError, match="prompts"):
        sweep(tiny_model("llama"), [])
    with pytest.raises(ConfigError, match="exit_layer"):
        sweep(tiny_model("llama"), [torch.arange(5)], exit_layers=[4])
