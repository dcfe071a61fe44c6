"""The mix-in keeps the contract of the method it overrides, whatever goes into a Trainer's loss.

With e_scale = p_max = 0 it is beside the plain Trainer, at e_scale .2 and p_max .1 beside a loop written out in
``exit_reference``: losses and gradients of every step are equal, on one process and on two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from telltale.errors import ConfigError, TelltaleError, UnsupportedModelError
from telltale.models.families import parts_of
from telltale.train.hf_trainer import LayerSkipMixin, LayerSkipTrainer
from telltale.train.layerskip import LayerSkipConfig
from train.exit_reference import (
    E_SCALE,
    P_MAX,
    ROTATION,
    SEED,
    Recorded,
    independent,
    model,
    power_loss,
    recording,
    token_losses,
)

OFF = LayerSkipConfig(p_max=0.0, e_scale=0.0)
ON = LayerSkipConfig(p_max=P_MAX, e_scale=E_SCALE, rotation=ROTATION, seed=SEED)
RATE = 0.5


def texts(count: int = 96) -> list[dict[str, Tensor]]:
    """Rows of 12 tokens; parts of them are not predicted, more in some rows than in others."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.randint(1, 61, (12,), generator=generator)
        labels = ids.clone()
        labels[: index % 5] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def packed() -> list[dict[str, Tensor]]:
    """The same rows, each of them two texts, told by their positions alone."""
    rows = [{key: value for key, value in row.items() if key != "attention_mask"} for row in texts()]
    for index, row in enumerate(rows):
        first = 4 + index % 4
        row["position_ids"] = torch.cat([torch.arange(first), torch.arange(12 - first)])
        row["labels"][first] = -100
    return rows


def power(logits: Tensor, labels: Tensor) -> Tensor:
    return token_losses(logits, labels) ** 1.5


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"rows": packed},
    "smoothed": {"fields": {"label_smoothing_factor": 0.3}, "each": partial(token_losses, smoothing=0.3)},
    "custom": {"options": {"compute_loss_func": power_loss}, "each": power},
    "accumulated": {"fields": {"gradient_accumulation_steps": 3}},
    "packed, smoothed and accumulated": {
        "rows": packed,
        "fields": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        "each": partial(token_losses, smoothing=0.1),
    },
    "custom and accumulated": {
        "fields": {"gradient_accumulation_steps": 2},
        "options": {"compute_loss_func": power_loss},
        "each": power,
    },
}


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**(defaults | fields))


def trained(trainer_class: type, folder: Path, kind: dict[str, Any], **options: Any) -> tuple[Any, list[float], list]:
    """The trainer after its steps, the losses it logged, and the gradients of each step."""
    recorded = Recorded()
    job = recording(trainer_class)(
        model=options.pop("model", None) or model(),
        args=arguments(folder, **kind.get("fields", {})),
        train_dataset=kind.get("rows", texts)(),
        callbacks=[recorded],
        **kind.get("options", {}),
        **options,
    )
    job.train()
    return job, [entry["loss"] for entry in job.state.log_history if "loss" in entry], recorded.gradients


def same(ours: tuple[list[float], list], theirs: tuple[list[float], list]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=2e-5)
    assert len(ours[1]) == len(theirs[1]) > 0
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() <= other.keys()
        for name, gradient in other.items():
            # A layer that every row skipped has no gradient at all.
            torch.testing.assert_close(
                mine.get(name, torch.zeros(())).expand_as(gradient), gradient, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("name", KINDS)
def test_switched_off_it_is_the_plain_trainer_to_the_bit(name, tmp_path):
    _, losses, gradients = trained(LayerSkipTrainer, tmp_path, KINDS[name], layerskip=OFF)
    _, wanted, theirs = trained(Trainer, tmp_path, KINDS[name])
    assert losses == wanted
    for mine, other in zip(gradients, theirs, strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize("name", KINDS)
def test_switched_on_it_is_the_loop_written_out(name, tmp_path):
    kind = KINDS[name]
    job, losses, gradients = trained(LayerSkipTrainer, tmp_path, kind, layerskip=ON)
    wanted, theirs, dropped = independent(
        [[micro] for micro in job.batches], learning_rate=RATE, each=kind.get("each", token_losses)
    )
    assert dropped > 0
    same((losses, gradients), (wanted, theirs))


def job_on_two_ranks(folder: str) -> None:
    """What each of two processes runs: every kind with the recipe off and on, and the plain Trainer."""
    torch.set_num_threads(1)
    found = {}
    for name, kind in KINDS.items():
        for label, cls, options in (
            ("plain", Trainer, {}),
            ("off", LayerSkipTrainer, {"layerskip": OFF}),
            ("on", LayerSkipTrainer, {"layerskip": ON}),
        ):
            smaller = kind | {"fields": kind.get("fields", {}) | {"per_device_train_batch_size": 4}}
            job, losses, gradients = trained(cls, Path(folder), smaller, **options)
            found[name, label] = (losses, gradients, job.batches)
    torch.save(found, Path(folder) / f"rank{os.environ['RANK']}.pt")


def torchrun(tmp_path: Path, module: str, function: str, *, seconds: int = 300) -> None:
    """Run ``function(folder)`` of a test module in two processes."""
    tests = Path(__file__).parents[1]
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(tests)!r})\nfrom {module} import {function}\n{function}({str(tmp_path)!r})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=seconds
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_on_two_ranks_as_on_one(tmp_path):
    torchrun(tmp_path, "train.test_hf_trainer_contract", "job_on_two_ranks")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, kind in KINDS.items():
        first, second = ranks[0][name, "off"], ranks[1][name, "off"]
        plain = ranks[0][name, "plain"]
        assert first[0] == pytest.approx(plain[0], rel=1e-6)
        same((first[0], first[1]), (plain[0], plain[1]))
        first, second = ranks[0][name, "on"], ranks[1][name, "on"]
        steps = [list(micro) for micro in zip(first[2], second[2], strict=True)]
        wanted, theirs, dropped = independent(steps, learning_rate=RATE, each=kind.get("each", token_losses))
        theirs = [{f"module.{key}": value for key, value in step.items()} for step in theirs]
        mine = [{f"module.{key.removeprefix('module.')}": value for key, value in step.items()} for step in first[1]]
        assert dropped > 0
        same((first[0], mine), (wanted, theirs))


def agreement(predicted: Any) -> dict[str, float]:
    """A compute_metrics of a user's."""
    logits, labels = torch.from_numpy(predicted.predictions), torch.from_numpy(predicted.label_ids)
    counted = labels[:, 1:] != -100
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].float().mean())}


def test_evaluation_prediction_and_metrics_are_the_trainers_while_the_recipe_is_on(tmp_path):
    found = []
    for cls, options in ((LayerSkipTrainer, {"layerskip": LayerSkipConfig(p_max=0.9, rotation=2)}), (Trainer, {})):
        for fields in ({}, {"label_smoothing_factor": 0.2}):
            job = cls(model(), arguments(tmp_path, **fields), compute_metrics=agreement, **options)
            if cls is LayerSkipTrainer:
                job._put_on(1, 10)
            evaluated = job.evaluate(texts(20))
            predicted = job.predict(texts(20))
            clock = ("runtime", "per_second", "preparation_time")
            found.append(
                (
                    {key: value for key, value in evaluated.items() if not key.endswith(clock)},
                    torch.from_numpy(predicted.predictions),
                    {key: value for key, value in predicted.metrics.items() if not key.endswith(clock)},
                )
            )
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert "eval_accuracy" in ours[0]
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def test_training_that_evaluates_goes_on_as_if_it_had_not(tmp_path):
    _, losses, _ = trained(LayerSkipTrainer, tmp_path, {}, layerskip=ON)
    kind = {"fields": {"eval_strategy": "steps", "eval_steps": 1}}
    _, watched, _ = trained(LayerSkipTrainer, tmp_path, kind, layerskip=ON, eval_dataset=texts(8))
    assert watched == losses


def test_with_outputs_asked_for_the_loss_is_the_same_and_the_outputs_are_the_models(tmp_path):
    job = LayerSkipTrainer(model(), arguments(tmp_path), layerskip=LayerSkipConfig(p_max=0.0, rotation=2))
    job._put_on(0, 10)
    job.model.train()
    batch = {key: torch.stack([row[key] for row in texts(4)]) for key in texts(1)[0]}
    alone = job.compute_loss(job.model, dict(batch))
    loss, outputs = job.compute_loss(job.model, dict(batch), return_outputs=True)
    assert torch.equal(loss, alone)
    assert outputs.logits.shape == (4, 12, 61)


def test_labels_that_are_shifted_already_are_not_shifted_again(tmp_path):
    job = LayerSkipTrainer(model(), arguments(tmp_path), layerskip=LayerSkipConfig(p_max=0.0, rotation=2))
    job._put_on(0, 10)
    job.model.train()
    batch = {key: torch.stack([row[key] for row in texts(4)]) for key in texts(1)[0]}
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    given = job.compute_loss(job.model, batch | {"shift_labels": shifted})
    torch.testing.assert_close(given, job.compute_loss(job.model, dict(batch)))


def test_under_bfloat16_the_exits_run_in_the_models_autocast(tmp_path):
    job, _, _ = trained(LayerSkipTrainer, tmp_path, {"fields": {"bf16": True}}, layerskip=OFF)
    seen = []
    on = LayerSkipConfig(p_max=0.0, rotation=2)
    job = LayerSkipTrainer(model(), arguments(tmp_path, bf16=True), layerskip=on, train_dataset=texts())
    head = job.model.lm_head
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    job.train()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) > 3


def test_a_batch_without_anything_to_predict_adds_nothing(tmp_path):
    rows = texts(24)
    for row in rows[8:16]:
        row["labels"][:] = -100
    kind = {
        "rows": lambda: rows,
        "fields": {"gradient_accumulation_steps": 3, "max_steps": 1, "train_sampling_strategy": "sequential"},
    }
    job, losses, gradients = trained(LayerSkipTrainer, tmp_path, kind, layerskip=ON)
    wanted, theirs, _ = independent([[micro] for micro in job.batches], learning_rate=RATE)
    same((losses, gradients), (wanted, theirs))


def test_training_that_fails_leaves_a_plain_model(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in texts()]
    job = LayerSkipTrainer(model(), arguments(tmp_path), train_dataset=rows, layerskip=ON)
    with pytest.raises(ConfigError, match=r"attention_mask, input_ids and no labels"):
        job.train()
    assert job.recipe is None
    assert all("forward" not in vars(layer) for layer in parts_of(job.model).layers)


def test_a_model_made_when_training_begins_gets_the_recipe(tmp_path):
    job = LayerSkipTrainer(model_init=model, args=arguments(tmp_path), train_dataset=texts(), layerskip=ON)
    job.train()
    first = job.state.log_history[0]["loss"]
    job.train()
    assert job.state.log_history[0]["loss"] == first


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, **kwargs)


class Below(LayerSkipMixin, OwnLoss):
    pass


class Above(OwnLoss, LayerSkipMixin, Trainer):
    pass


def test_a_loss_that_the_exits_do_not_know_is_refused_and_one_around_them_is_not(tmp_path):
    with pytest.raises(ConfigError, match=r"OwnLoss computes a loss of its own.*before LayerSkipMixin"):
        Below(model(), arguments(tmp_path), layerskip=ON)
    Below(model(), arguments(tmp_path), layerskip=OFF)
    _, doubled, _ = trained(Above, tmp_path, {"fields": {"max_steps": 1}}, layerskip=ON)
    _, plain, _ = trained(LayerSkipTrainer, tmp_path, {"fields": {"max_steps": 1}}, layerskip=ON)
    assert doubled == pytest.approx([2 * plain[0]])


def test_what_the_exits_cannot_follow_is_refused_when_the_trainer_is_made(tmp_path):
    def refused(match: str, error: type = ConfigError, fields: dict[str, Any] | None = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            LayerSkipTrainer(
                args=arguments(tmp_path, **(fields or {})), **({"model": model(), "layerskip": ON} | options)
            )

    refused("torch_compile", fields={"torch_compile": True})
    refused("compiled", model=torch.compile(model(), backend="eager"))
    distilled = LayerSkipConfig(exit_target="distill")
    refused("compute_loss_func with exit_target", layerskip=distilled, compute_loss_func=power_loss)
    capped = model()
    capped.config.final_logit_softcapping = 30.0
    refused("final_logit_softcapping", UnsupportedModelError, model=capped)
    routed = model()
    routed.config.output_router_logits = True
    refused("output_router_logits", model=routed)
    flexible = model()
    flexible.config._attn_implementation = "flex_attention"
    refused("flex_attention", model=flexible)
    refused("has no config", TelltaleError, model=torch.nn.Linear(2, 2))
