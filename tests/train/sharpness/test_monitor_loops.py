"""The monitor inside the training loops of others: what it reads there, and that training does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.presets import build as build_preset
from telltale.train import train
from telltale.train.pipeline.layered import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.sharpness import SharpnessMonitor
from telltale.train.sharpness.callbacks.hugging_face import EdgeOfStabilityCallback
from telltale.train.sharpness.callbacks.lightning_trainer import EdgeOfStability
from telltale.train.sharpness.callbacks.pipeline_reference import StalenessSharpness
from telltale.train.sharpness.callbacks.training_loop import SharpnessCallback
from telltale.train.sharpness.monitor import read_readings
from train.pipeline.pipeline_models import OPTIMIZERS, batch, build, loss
from train.test_loop import CONFIG, RECIPE, Stop, nano, pattern
from train.test_trainer import Rows, arguments

lightning = pytest.importorskip("lightning.pytorch")


def test_the_plain_loop_is_watched_resumed_and_unchanged(tmp_path):
    plain, watched = nano(), nano()
    train(plain, pattern(), CONFIG, run_dir=tmp_path / "plain", layerskip=RECIPE)
    callback = SharpnessCallback(run_dir=tmp_path / "watched", every=3, budget=1.0, rows=2)
    train(watched, pattern(), CONFIG, run_dir=tmp_path / "watched", layerskip=RECIPE, callbacks=[callback])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    readings = read_readings(tmp_path / "watched")
    assert [reading.step for reading in readings] == [3, 6, 9, 12]
    assert readings == callback.monitor.readings
    assert all(reading.ratio > 0 and reading.threshold == pytest.approx(38.0, rel=1e-3) for reading in readings)
    assert [reading.rate for reading in readings] == [CONFIG.learning_rate_at(reading.step - 1) for reading in readings]


def test_a_resumed_loop_goes_on_with_its_readings(tmp_path):
    stopped = SharpnessCallback(run_dir=tmp_path / "run", every=2, budget=1.0)
    with pytest.raises(KeyboardInterrupt):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", callbacks=[stopped, Stop(9)])
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [2, 4, 6, 8]
    resumed = SharpnessCallback(run_dir=tmp_path / "run", every=2, budget=1.0)
    train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", resume=True, callbacks=[resumed])
    # The checkpoint was of step 5: what was read after it is forgotten, and the count goes on from there.
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [2, 4, 7, 9, 11]


def test_hugging_faces_trainer(tmp_path):
    def run(name: str, callbacks: list[Any], **fields: Any) -> tuple[nn.Module, Trainer]:
        model = build_preset("nano", vocabulary_size=50)
        job = Trainer(
            model=model,
            args=arguments(tmp_path / name, gradient_accumulation_steps=2, max_steps=6, **fields),
            train_dataset=Rows(),
            callbacks=callbacks,
        )
        job.train()
        return model, job

    probe = [{"input_ids": Rows().ids[:2]}]
    callback = EdgeOfStabilityCallback(probe, every=2, budget=1.0)
    plain, _ = run("plain", [])
    watched, job = run("watched", [callback])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    readings = read_readings(tmp_path / "watched")
    assert [reading.step for reading in readings] == [2, 4, 6]
    # The rate that the step was taken with: the schedule is linear from 1e-3 at the first step to 0.
    assert [reading.rate for reading in readings] == pytest.approx([1e-3 * (1 - step / 6) for step in (1, 3, 5)])
    assert [entry["sharpness_ratio"] for entry in job.state.log_history if "sharpness_ratio" in entry] == [
        reading.ratio for reading in readings
    ]


def test_a_trainer_that_shards_its_weights_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = "zero3.json"
    with pytest.raises(UnsupportedModelError, match="deepspeed"):
        EdgeOfStabilityCallback([None]).on_train_begin(args, None, None)


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_lightning(tmp_path):
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(
        torch.randn(48, 4, generator=generator), torch.randn(48, 1, generator=generator)
    )

    def mean_loss(module, batch):
        return functional.mse_loss(module.net(batch[0]), batch[1])

    def fitted(callbacks: list[Any]) -> Regression:
        lightning.seed_everything(1, verbose=False)
        module = Regression()
        lightning.Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
        return module

    callback = EdgeOfStability(mean_loss, [data[:8]], run_dir=tmp_path, every=2, budget=1.0)
    plain, watched = fitted([]), fitted([callback])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [reading.step for reading in read_readings(tmp_path)] == [2, 4, 6]
    assert callback.monitor is not None
    assert callback.monitor.readings[0].threshold == pytest.approx(3.8)


def watched_reference(policy: str, optimizer: str, stages: int, **options: Any) -> tuple[nn.Module, StalenessSharpness]:
    net = build("mixed")
    net[4].p = 0.0
    root_loss: Callable[[nn.Module, Any], torch.Tensor] = lambda root, item: loss(root(item[0]), item[1])  # noqa: E731
    watch = StalenessSharpness(root_loss, [batch(0)], every=1, budget=1.0, **options)
    run = Reference(
        sequential(net, loss),
        Plan.even(len(net), stages, policy=policy),
        optimizer=OPTIMIZERS[optimizer],
        on_update=watch,
    )
    watch.follow(run)
    run.run(batch, stop=6)
    return net, watch


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_reference_of_one_stage_reads_as_a_plain_loop(optimizer: str) -> None:
    _, watch = watched_reference("stash", optimizer, 1)
    net = build("mixed")
    net[4].p = 0.0
    net.train()
    own = OPTIMIZERS[optimizer](list(net.named_parameters()))
    monitor = SharpnessMonitor(
        net, lambda root, item: loss(root(item[0]), item[1]), [batch(0)], optimizer=own, every=1, budget=1.0
    )
    for minibatch in range(6):
        inputs, targets = batch(minibatch)
        own.zero_grad()
        loss(net(inputs), targets).backward()
        own.step()
        monitor.step()
    assert [reading.ratio for reading in watch.readings] == pytest.approx(
        [reading.ratio for reading in monitor.readings], rel=1e-4
    )


def test_staleness_is_read_without_touching_the_reference() -> None:
    unwatched = build("mixed")
    unwatched[4].p = 0.0
    Reference(
        sequential(unwatched, loss), Plan.even(len(unwatched), 4, policy="stash"), optimizer=OPTIMIZERS["adamw"]
    ).run(batch, stop=6)
    net, watch = watched_reference("stash", "adamw", 4)
    for one, other in zip(unwatched.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(watch.readings) == 6
    assert all(reading.ratio > 0 for reading in watch.readings)


def test_a_hook_that_was_not_told_its_reference_says_so() -> None:
    with pytest.raises(ConfigError, match="follow"):
        StalenessSharpness(None, [0])(0, 0, nn.Linear(1, 1))


def test_options_reach_the_monitor(tmp_path):
    callback = SharpnessCallback(jacobian="gd", every=4, budget=1.0)
    train(nano(), pattern(), replace(CONFIG, steps=4), run_dir=tmp_path, callbacks=[callback])
    assert copy.copy(callback.monitor.readings[0].threshold) == 2.0
    with pytest.raises(ConfigError, match="rows=0"):
        SharpnessCallback(rows=0)
