"""The verdict on a checkpoint, and the sweep: yes where drafting pays, no with the reason where it does not."""

from __future__ import annotations

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.decode import costs_report as diagnosis
from telltale.decode.costs_report import diagnose, expected_acceptance, sweep
from telltale.errors import ConfigError, DataError
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
    assert expected_acceptance(0.5, 2) == pytest.approx((0.5 + 0.25) / 2)
    assert expected_acceptance(1.0, 7) == 1.0
    assert expected_acceptance(0.3, 0) == 0.0


def test_yes_where_early_layers_agree_and_passes_are_cheap(monkeypatch):
    monkeypatch.setattr(diagnosis, "costs_of", lambda decoder, batch: Costs(0.05))
    result = diagnose(agreeing_model(), ids())
    assert [row.agreement for row in result.exits] == [1.0, 1.0, 1.0]
    assert result.best.exit_layer == 1
    assert result.pays
    assert result.verdict.startswith("Yes")
    assert "exit layer 1" in result.verdict


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
