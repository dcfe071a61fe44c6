"""A causal LM through two stages as ``telltale train --pipeline`` runs it: the same training as the plain loop's."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import telltale
from telltale.errors import ConfigError, PlanError
from telltale.runs.run_dir import RunDir
from telltale.train.loop import train
from telltale.train.pipeline.job import (
    check_job,
    layered_for_training,
    minibatches_per_step,
    straight_plan,
    tied_across_stages,
)
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.collectives import untie
from telltale.train.pipeline.simulation.timeline import Timeline
from train.pipeline.job_runs import CONFIG, LAYERS, RECIPE, corpus, jobs, model, plan
from train.pipeline.rank_runs import run_ranks, values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def ranks(folder):
    return values(run_ranks(jobs, 2, str(folder)))


def losses(path):
    return [record["loss"] for record in RunDir.open(path).metrics() if "loss" in record]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["layerskip", "none"])
def test_flush_trains_what_the_plain_loop_trains_with_accumulation(ranks, folder, tmp_path, recipe):
    """Two stages add up the tied weight's gradient and the norm in another order, so equality is up to float32 rounding."""
    data = corpus()
    config = dataclasses.replace(CONFIG, gradient_accumulation=2)
    layerskip = RECIPE if recipe == "layerskip" else None
    train(model(data), data, config, run_dir=tmp_path / "loop", layerskip=layerskip, tokenizer=data.tokenizer)
    name = "flush" if recipe == "layerskip" else "plain"
    assert losses(folder / name) == pytest.approx(losses(tmp_path / "loop"), rel=1e-5)
    expected, _ = telltale.load(tmp_path / "loop" / "model")
    found, _ = telltale.load(folder / name / "model")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-5)


def test_a_run_leaves_plan_metrics_timeline_and_a_model(ranks, folder):
    for rank, found in enumerate(ranks):
        assert found["stash"].finished
        assert found["stash"].step == CONFIG.steps
        assert (found["stash"].quality is not None) == (rank == 0)
    run = folder / "stash"
    assert Plan.load(run / "plan.json").policy == "stash"
    assert len(losses(run)) == CONFIG.steps
    held_out = [record["held_out"] for record in RunDir.open(run).metrics() if "held_out" in record]
    assert [set(record) for record in held_out] == [{"objective"}, {"objective"}, {"losses", "agreement"}]
    timeline = Timeline.load(run / "timeline.json")
    assert timeline.ranks == 2
    assert {event.kind for event in timeline.events} == {"F", "B", "U"}
    network, _ = telltale.load(run / "model")
    assert network.config.tie_word_embeddings is False
    assert "lm_head.weight" in dict(network.named_parameters())
    assert "Plotly" in (run / "timeline.html").read_text()


def test_runs_are_entered_once_or_resumed_with_the_same_settings(ranks, folder):
    for found in ranks:
        assert found["again"].startswith("CheckpointError")
        assert "already holds a run" in found["again"]
        assert found["other"].startswith("ConfigError")
        assert "minibatches_per_step" in found["other"]
        assert found["resumed"].finished
    steps = [json.loads(line).get("step") for line in (folder / "flush" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_refused_resume_leaves_the_plan_of_the_run(ranks):
    for found in ranks:
        assert "ConfigError" in found["other"] or "CheckpointError" in found["other"]
        assert found["plan after other"] == plan("flush", 2)


def test_a_tied_model_under_stash_is_refused_with_the_remedy_before_anything_is_written(ranks, folder):
    for found in ranks:
        assert found["tied"].startswith("PlanError")
        assert "--untie" in found["tied"]
        assert "2bw" in found["tied"]
    assert not (folder / "tied").exists()


def test_every_rank_was_told_the_same_topology(ranks):
    first, second = (found["probe"] for found in ranks)
    assert first == second
    assert first.topology.workers == 2
    assert {found.kind for found in first.measurements} == {"message", "all-reduce"}
    assert first.topology.levels[0].bandwidth == min(found.bandwidth for found in first.measurements)
    assert all(found.latency > 0 for found in first.measurements)


@pytest.mark.parametrize("name", ["own", "interleaved"])
def test_extended_interleaved_and_read_by_stage_it_is_the_same_training(ranks, folder, name):
    """Runs of four steps that are extended to six with other checkpoints, by ranks that hold their own stages alone, under flush
    and on torch's interleaved schedule, against six steps of flush at once."""
    assert losses(folder / name) == losses(folder / "long")
    whole, _ = telltale.load(folder / "long" / "model")
    found, _ = telltale.load(folder / name / "model")
    assert found.config.tie_word_embeddings
    for key, value in whole.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert sorted(path.name for path in (folder / name / "checkpoints").iterdir())[-1] == "step-000000012"


def test_what_an_extension_may_not_change(ranks, folder):
    for found in ranks:
        assert found["own"].finished
        assert found["interleaved"].step == 6
        assert "train.steps=4 differs" in found["shortened"]
        assert found["exits"].startswith("PlanError: the recipe's active exits change")
    assert RunDir.open(folder / "own").config()["train"]["checkpoint_every"] == 3
    assert not (folder / "exits").exists()


def test_a_rank_reads_its_own_stage_alone(ranks):
    first, second = (found["own on meta"] for found in ranks)
    assert "model.layers.3.mlp.up_proj.weight" in first
    assert "model.layers.0.mlp.up_proj.weight" in second
    assert not set(first) & set(second)
    assert "model.embed_tokens.weight" not in first + second  # tied: both stages have it
    assert ranks[0]["own"].quality is None


def test_minibatches_per_step():
    assert minibatches_per_step(plan("stash")) == 1
    assert minibatches_per_step(plan("none")) == 1
    assert minibatches_per_step(plan("2bw", 3)) == 3
    assert minibatches_per_step(plan("gpipe", 4)) == 4
    assert minibatches_per_step(Plan.manual([[0, 1], [2]], replicas=[2, 3], policy="vertical")) == 6
    assert minibatches_per_step(Plan.even(LAYERS, 4, policy="interleaved", microbatches=4, chunks=2)) == 4


def test_a_plan_without_a_profile_takes_minibatches_that_divide_the_batch():
    made = straight_plan(6, 3, 20)
    assert (made.describe(), made.policy, made.microbatches) == ("1-1-1", "flush", 10)
    with pytest.raises(PlanError, match="7 stages for 6 layers"):
        straight_plan(6, 7, 20)


def test_what_does_not_go_together_is_refused():
    network = model(corpus())
    layered = layered_for_training(network, precision="float32", layerskip=None)
    with pytest.raises(PlanError, match="7 layers"):
        check_job(layered, Plan.even(7, 2, policy="flush"), CONFIG)
    with pytest.raises(ConfigError, match="multiple of 3"):
        check_job(layered, plan("flush", 3), CONFIG)
    with pytest.raises(ConfigError, match="gradient_accumulation=4"):
        check_job(layered, plan("flush", 2), dataclasses.replace(CONFIG, gradient_accumulation=4))
    assert tied_across_stages(layered, plan("stash")) == ["model.embed_tokens.weight"]
    assert tied_across_stages(layered, Plan.even(LAYERS, 1)) == []
    with pytest.raises(PlanError, match="untie"):
        check_job(layered, plan("stash"), CONFIG)
    untie(network)
    check_job(layered_for_training(network, precision="float32", layerskip=None), plan("stash"), CONFIG)


def test_bfloat16_is_autocast_of_every_layer_and_keeps_float32_weights():
    data = corpus()
    network = model(data)
    batch = {"input_ids": data.train[:50].view(2, 25)}
    found = {}
    for precision in ("float32", "bfloat16"):
        layered = layered_for_training(network, precision=precision, layerskip=None)
        values_ = layered.inputs(batch)
        for layer in layered.layers:
            values_ = layer.call(values_, batch, 0)
        found[precision] = (values_[0].dtype, layered.loss(values_, batch, 0))
    assert found["float32"][0] == torch.float32
    assert found["bfloat16"][0] == torch.bfloat16
    assert found["bfloat16"][1].item() != found["float32"][1].item()
    assert found["bfloat16"][1].item() == pytest.approx(found["float32"][1].item(), rel=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(**batch, labels=batch["input_ids"], use_cache=False).loss
    assert found["bfloat16"][1].item() == pytest.approx(expected.item(), rel=1e-3)
