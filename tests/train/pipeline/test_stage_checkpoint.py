"""A resumed pipeline is the one that was never stopped: every policy, every boundary, and other plans where they allow it."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import telltale
from models.tiny_models import tiny_model
from telltale.errors import CheckpointError, ConfigError
from telltale.train.pipeline.checkpoint_files import complete_steps, newest_complete
from telltale.train.pipeline.export import export_step, load_weights
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.split import split
from telltale.train.pipeline.trainer import PipelineTrainer
from train.pipeline import checkpoint_runs as runs
from train.pipeline.rank_runs import run_ranks, values


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    """(outcomes of the three ranks, where their steps are)."""
    folder = tmp_path_factory.mktemp("three")
    return values(run_ranks(runs.cases_of_three, 3, str(folder), {("straight", "flush")}, True)), folder


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """Outcomes of three ranks that resume at every step under every policy."""
    folder = tmp_path_factory.mktemp("everywhere")
    return values(run_ranks(runs.cases_of_three, 3, str(folder), runs.EVERYWHERE, False))


@pytest.fixture(scope="module")
def of_two(of_three, tmp_path_factory):
    """The same of two ranks, which also read what three wrote."""
    folder = tmp_path_factory.mktemp("two")
    return values(run_ranks(runs.cases_of_two, 2, str(folder), str(of_three[1] / "straight-flush"))), folder


@pytest.mark.slow
@pytest.mark.parametrize("policy", runs.POLICIES)
@pytest.mark.parametrize("cut", ["straight", "replicated"])
def test_three_ranks_resume_everywhere(everywhere, cut, policy):
    for outcome in everywhere:
        found = outcome[f"{cut}/{policy}"]
        assert found["differ"] == []
        assert len(found["losses"]) == runs.MINIBATCHES
        assert runs.MINIBATCHES // found["alignment"] >= 4


@pytest.mark.long
@pytest.mark.parametrize("policy", runs.POLICIES)
def test_two_ranks_with_clipping_resume_everywhere(of_two, policy):
    assert [outcome[f"straight/{policy}"]["differ"] for outcome in of_two[0]] == [[], []]


def test_three_ranks_resume_in_the_middle(of_three):
    for outcome in of_three[0]:
        found = outcome["straight/flush"]
        assert found["differ"] == []
        assert len(found["losses"]) == runs.MINIBATCHES
        assert runs.MINIBATCHES // found["alignment"] >= 4


def test_a_tied_weight_with_a_clipped_norm_resumes_everywhere(of_three):
    assert [outcome["tied/2bw"]["differ"] for outcome in of_three[0]] == [[], [], []]


@pytest.mark.parametrize(
    "case",
    [
        "flush-2-2-other",
        "gpipe-2-2-replicated",
        "2bw-2-2-other",
        "vertical-1-1-other",
        "stash-1-1-other",
        "stash-1-1-replicated",
        "2bw-2-4-other",
    ],
)
def test_another_plan_is_the_reference_that_switches(of_three, case):
    assert all(outcome[case] for outcome in of_three[0])


@pytest.mark.parametrize(("policy", "microbatches"), [("flush", 2), ("2bw", 2), ("vertical", 1)])
def test_where_versions_go_by_batch_another_cut_changes_nothing(policy, microbatches):
    before = runs.plan_of(runs.STRAIGHT3, policy, microbatches)
    after = runs.plan_of(runs.OTHER3, policy, microbatches)
    _, cut = runs.switched(before, after, 4)
    _, uncut = runs.switched(before, before, 4)
    assert cut == uncut


def test_under_stash_another_cut_is_another_delay_pattern():
    before, after = runs.plan_of(runs.STRAIGHT3, "stash"), runs.plan_of(runs.STRAIGHT2, "stash")
    _, switched = runs.switched(before, after, 4)
    _, whole = runs.switched(before, before, 0)
    assert switched[0] != whole[4]


@pytest.mark.parametrize("cut", [runs.STRAIGHT2, runs.WHOLE])
def test_fewer_stages_go_on_from_three(of_three, of_two, cut):
    folder, wanted = of_three[1] / "straight-flush", of_three[0][0]["straight/flush"]["losses"][4:]
    if cut is runs.STRAIGHT2:
        assert [outcome["from three stages"] for outcome in of_two[0]] == [wanted, wanted]
        return
    trainer = runs.trainer_of(runs.plan_of(cut, "flush"), "sgd", seed=1)
    assert trainer.resume(folder / "step-000000004") == 4
    assert trainer.train(runs.batch, stop=runs.MINIBATCHES) == wanted


def test_the_whole_model_comes_out_of_a_pipeline_and_of_its_checkpoint(of_three, of_two, tmp_path):
    whole = runs.model(seed=2)
    assert load_weights(of_three[1] / "straight-flush", whole) == 8
    exported = load_file(of_two[1] / "whole.safetensors")
    assert exported.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, exported[name]), name
    export_step(of_three[1] / "straight-flush", runs.model(seed=3), tmp_path / "again.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in load_file(tmp_path / "again.safetensors").items())


def test_an_export_does_not_depend_on_where_the_stages_are(of_two):
    """Every rank had a seed of its own: what was not brought to rank 0 would be its initial weights."""
    exported = load_file(of_two[1] / "placed.safetensors")
    nets = [runs.model(seed) for seed in (1, 0)]
    net = torch.nn.Sequential(*nets[0][:3], *nets[1][3:])
    Reference(sequential(net, runs.loss), runs.plan_of(runs.STRAIGHT2, "flush"), optimizer=runs.OPTIMIZERS["sgd"]).run(
        runs.batch, stop=runs.MINIBATCHES
    )
    assert exported.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, exported[name]), name


def test_fit_goes_on_where_it_was(of_two):
    for outcome in of_two[0]:
        found = outcome["fit"]
        assert found["first"] == found["losses"][:5]
        assert found["second"] == found["losses"][4:]
        assert found["equal"]
        assert "already holds steps" in found["refused"]
        assert found["again"] == []
    run = of_two[1] / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 8, 10]
    assert [loss for record in records for loss in record["losses"]] == of_two[0][0]["fit"]["losses"]
    assert [step.minibatch for step in complete_steps(run / "checkpoints")] == [8, 10]


def test_damage_that_one_rank_sees_is_refused_by_both(of_two):
    messages = [outcome["damage"] for outcome in of_two[0]]
    assert messages[0] == messages[1]
    assert "stage-1" in messages[0]
    assert ".distcp is damaged" in messages[0]


@pytest.fixture
def steps(of_three, tmp_path):
    """Two steps of three stages under flush, to break."""
    for minibatch in (2, 4):
        name = f"step-{minibatch:09d}"
        shutil.copytree(of_three[1] / "straight-flush" / name, tmp_path / "steps" / name)
    return tmp_path / "steps"


def resumed(folder, policy="flush", *, microbatches=None, optimizer="sgd", net=None, **options):
    plan = runs.plan_of(runs.WHOLE, policy, microbatches)
    trainer = PipelineTrainer(net or runs.model(1), plan, optimizer=runs.OPTIMIZERS[optimizer], loss=runs.loss)
    return trainer.resume(folder, **options)


def test_a_step_without_one_stage_is_passed_over(steps):
    shutil.rmtree(steps / "step-000000004" / "stage-1")
    assert newest_complete(steps).minibatch == 2
    assert resumed(steps) == 2
    with pytest.raises(CheckpointError, match=r"step-000000004 is not complete: stage 1 of 3 has no part"):
        resumed(steps / "step-000000004")


def test_parts_of_two_saves_make_no_step(steps):
    file = steps / "step-000000004" / "stage-2" / "part.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save": "another"}))
    assert newest_complete(steps).minibatch == 2


def test_what_a_killed_save_left_is_cleared(steps):
    shutil.rmtree(steps / "step-000000004" / "stage-0")
    (steps / "step-000000002" / ".partial-abc").mkdir()
    (steps / "step-000000004" / ".partial-def").mkdir()
    run = steps.parent / "run"
    run.mkdir()
    steps.rename(run / "checkpoints")
    trainer = runs.trainer_of(runs.plan_of(runs.WHOLE, "flush"), "sgd")
    trainer.fit(runs.batch, stop=2, directory=run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000002"]
    assert not list((run / "checkpoints").rglob(".partial-*"))
    assert trainer.minibatch == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda part: (part / "part.json").write_text("{"), r"stage-1/part.json is not JSON"),
        (lambda part: (part / "part.json").write_text("{}"), r"is not the manifest of a pipeline checkpoint"),
        (lambda part: (part / "part.json").unlink(), r"stage-1/part.json cannot be read"),
        (lambda part: (part / ".metadata").unlink(), r"stage-1/.metadata has 0 bytes"),
        (lambda part: (part / "__0_0.distcp").write_bytes(b"x"), r"stage-1/__0_0.distcp has 1 bytes; expected \d+"),
    ],
)
def test_a_damaged_part_is_named(steps, break_it, message):
    break_it(steps / "step-000000004" / "stage-1")
    with pytest.raises(CheckpointError, match=message):
        resumed(steps / "step-000000004")


def test_what_does_not_fit_is_refused(steps, tmp_path):
    with pytest.raises(CheckpointError, match=r"another model \(fingerprint \w+\); expected one of this model"):
        resumed(steps, net=runs.tied_model())
    with pytest.raises(CheckpointError, match=r"'flush' and the plan's is 'stash'; expected .* switch_policy=True"):
        resumed(steps, "stash")
    assert resumed(steps, "stash", switch_policy=True) == 4
    with pytest.raises(CheckpointError, match=r"inside a round of this plan; expected a step at a multiple of 4"):
        resumed(steps / "step-000000002", "gpipe", microbatches=4, switch_policy=True)
    with pytest.raises(CheckpointError, match="holds the state of SGD; expected AdamW"):
        resumed(steps, optimizer="adamw")
    with pytest.raises(CheckpointError, match=r"nothing holds no step; expected step-\.\.\. folders"):
        resumed(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="another model: it differs in"):
        load_weights(steps, torch.nn.Sequential(torch.nn.Linear(8, 12)))


def test_an_old_checkpoint_stays_when_a_save_fails(steps, monkeypatch):
    trainer = runs.trainer_of(runs.plan_of(runs.WHOLE, "flush"), "sgd")
    trainer.resume(steps)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("telltale.train.pipeline.stage_checkpoint.dcp.save", full)
    trainer.train(runs.batch, stop=6)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save(steps)
    assert [step.minibatch for step in complete_steps(steps)] == [2, 4]


def test_an_optimizer_that_keeps_more_than_values_is_refused(tmp_path):
    trainer = runs.trainer_of(runs.plan_of(runs.WHOLE, "flush"))
    trainer.train(runs.batch, stop=2)
    next(iter(trainer.optimizer.optimizer.state.values()))["history"] = {1, 2}
    with pytest.raises(CheckpointError, match="the optimizer keeps 'history' as set; expected tensors or plain values"):
        trainer.save(tmp_path)


def test_groups_of_parameters_keep_their_options_and_rates_come_from_the_factory(tmp_path):
    def factory(decay, rate):
        def make(named):
            split_at = len(named) // 2
            return torch.optim.AdamW(
                [{"params": named[:split_at], "weight_decay": decay}, {"params": named[split_at:]}], lr=rate
            )

        return make

    plan = runs.plan_of(runs.WHOLE, "flush")
    trainer = PipelineTrainer(runs.model(), plan, optimizer=factory(0.5, 0.1), loss=runs.loss)
    trainer.train(runs.batch, stop=2)
    trainer.save(tmp_path)
    again = PipelineTrainer(runs.model(1), plan, optimizer=factory(0.25, 0.2), loss=runs.loss)
    again.resume(tmp_path)
    assert [group["weight_decay"] for group in again.optimizer.optimizer.param_groups] == [0.5, 0.01]
    assert [group["lr"] for group in again.optimizer.optimizer.param_groups] == [0.2, 0.2]
    mixed = PipelineTrainer(runs.model(), plan, optimizer=runs.OPTIMIZERS["adamw"], loss=runs.loss)
    with pytest.raises(CheckpointError, match=r"options for 0\.weight and others of its group differ"):
        mixed.resume(tmp_path)


def test_fit_refuses_spans_that_cut_a_round(tmp_path):
    trainer = runs.trainer_of(runs.plan_of(runs.WHOLE, "flush"))
    with pytest.raises(ConfigError, match="save_every=3 is inside a round; expected a multiple of 2"):
        trainer.fit(runs.batch, stop=6, directory=tmp_path, save_every=3)
    with pytest.raises(ConfigError, match="without a directory"):
        trainer.fit(runs.batch, stop=6, save_every=2)


def test_a_language_model_leaves_as_a_checkpoint_that_load_opens(tmp_path):
    model = tiny_model("llama")
    layered = split(model)
    words = tokenizers.models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    plan = Plan.even(len(layered.layers), 1, policy="flush", fingerprint=layered.fingerprint)
    trainer = PipelineTrainer(layered, plan, optimizer=runs.OPTIMIZERS["adamw"])
    ids = torch.arange(24).view(2, 12)
    trainer.train(lambda t: {"input_ids": ids + t}, stop=2)
    trainer.save(tmp_path / "steps")
    trainer.export(tmp_path / "exported", tokenizer=tokenizer)
    export_step(tmp_path / "steps", split(tiny_model("llama", seed=5)), tmp_path / "from-step", tokenizer=tokenizer)
    model.eval()
    for name in ("exported", "from-step"):
        opened, _ = telltale.load(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(opened(ids).logits, model(ids).logits)
