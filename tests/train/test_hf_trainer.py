"""The recipe inside Transformers' Trainer: steps, accumulation, resume, and a plain model afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from telltale.errors import ConfigError
from telltale.models.families import parts_of
from telltale.models.presets import build
from telltale.train.hf_trainer import LayerSkipTrainer
from telltale.train.layerskip import LayerSkipConfig


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder, **fields):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**(defaults | fields))


def trainer(folder, recipe, **fields):
    model = build("nano", vocabulary_size=50)
    return LayerSkipTrainer(model=model, args=arguments(folder, **fields), train_dataset=Rows(), layerskip=recipe)


@pytest.mark.long
def test_accumulation_stays_within_one_step_and_the_model_is_plain_afterwards(tmp_path):
    job = trainer(tmp_path, LayerSkipConfig(p_max=0.5, time_schedule="exp", rotation=2), gradient_accumulation_steps=3)
    steps = []
    compute = job.compute_loss

    def spy(model, inputs, **kwargs):
        steps.append(job.recipe.step)
        return compute(model, inputs, **kwargs)

    job.compute_loss = spy
    job.train()
    assert steps == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert job.recipe is None
    assert all("forward" not in vars(layer) for layer in parts_of(job.model).layers)


@pytest.mark.long
def test_the_loss_is_the_recipes_and_accumulation_does_not_change_it(tmp_path):
    recipe = LayerSkipConfig(p_max=0.0, e_scale=1.0, curriculum="none")
    whole = trainer(tmp_path / "a", recipe, per_device_train_batch_size=8)
    split = trainer(tmp_path / "b", recipe, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plain = trainer(tmp_path / "c", LayerSkipConfig(p_max=0.0, e_scale=0.0), per_device_train_batch_size=8)
    losses = []
    for job in (whole, split, plain):
        job.train()
        losses.append([entry["loss"] for entry in job.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.long
def test_resume_continues_the_curve(tmp_path):
    recipe = LayerSkipConfig(p_max=0.4, time_schedule="exp", rotation=2)
    whole = trainer(tmp_path / "whole", recipe)
    whole.train()
    again = trainer(tmp_path / "again", recipe)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, msg=name)


def test_evaluation_is_the_models_own_loss(tmp_path):
    job = trainer(tmp_path, LayerSkipConfig(p_max=0.5, rotation=2))
    batch = {key: value.unsqueeze(0) for key, value in Rows()[0].items()}
    with torch.no_grad():
        own = job.model.eval()(**batch).loss
        assert torch.equal(job.compute_loss(job.model, dict(batch)), own)


def test_bad_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="p_max"):
        trainer(tmp_path, LayerSkipConfig(p_max=2.0))
