"""The monitor inside the training loops of others: what it reads there, and that training does not notice."""

from __future__ import annotations

import copy
import csv
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.presets import build as build_preset
from telltale.train import train
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.sharpness import Probe, SharpnessMonitor
from telltale.train.sharpness.callbacks import (
    EdgeOfStabilityCallback,
    SharpnessCallback,
    StalenessSharpness,
)
from telltale.train.sharpness.lightning_callback import EdgeOfStability
from telltale.train.sharpness.monitor import read_readings
from train.pipeline.pipeline_models import OPTIMIZERS, batch, build, loss
from train.sharpness import parallel_runs
from train.test_hf_trainer import Rows, arguments
from train.test_loop import CONFIG, RECIPE, Stop, nano, pattern

lightning = pytest.importorskip("lightning.pytorch")


@pytest.mark.long
def test_the_plain_loop_is_watched_resumed_and_unchanged(tmp_path):
    plain, watched = nano(), nano()
    train(plain, pattern(), CONFIG, run_dir=tmp_path / "plain", layerskip=RECIPE)
    callback = SharpnessCallback(run_dir=tmp_path / "watched", every=3, budget=1.0, rows=2)
    train(watched, pattern(), CONFIG, run_dir=tmp_path / "watched", layerskip=RECIPE, callbacks=[callback])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    readings = read_readings(tmp_path / "watched")
    assert [reading.step for reading in readings] == [1, 3, 6, 9, 12]
    assert readings == callback.monitor.readings
    assert all(reading.ratio > 0 and reading.threshold == pytest.approx(38.0, rel=1e-3) for reading in readings)
    assert [reading.rate for reading in readings] == [CONFIG.learning_rate_at(reading.step - 1) for reading in readings]


@pytest.mark.long
def test_a_resumed_loop_goes_on_with_its_readings(tmp_path):
    stopped = SharpnessCallback(run_dir=tmp_path / "run", every=2, budget=1.0)
    with pytest.raises(KeyboardInterrupt):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", callbacks=[stopped, Stop(9)])
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [1, 2, 4, 6, 8]
    resumed = SharpnessCallback(run_dir=tmp_path / "run", every=2, budget=1.0)
    train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", resume=True, callbacks=[resumed])
    # The checkpoint was of step 5: what was read after it is forgotten, and the count goes on from there.
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [1, 2, 4, 7, 9, 11]


@pytest.mark.long
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
    assert [reading.step for reading in readings] == [1, 2, 4, 6]
    # The rate that the step was taken with: the schedule is linear from 1e-3 at the first step to 0.
    assert [reading.rate for reading in readings] == pytest.approx([1e-3 * (1 - step / 6) for step in (0, 1, 3, 5)])
    assert [entry["sharpness_ratio"] for entry in job.state.log_history if "sharpness_ratio" in entry] == [
        reading.ratio for reading in readings
    ]


def trained_by_hugging_face(folder, callbacks: list[Any], resume: str | None = None, **fields: Any) -> nn.Module:
    model = build_preset("nano", vocabulary_size=50)
    options = {"max_steps": 4, "save_steps": 2} | fields
    Trainer(model=model, args=arguments(folder, **options), train_dataset=Rows(), callbacks=callbacks).train(
        resume_from_checkpoint=resume
    )
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"max_grad_norm": 0.01, "weight_decay": 0.1, "optim": "sgd"}],
    ids=["mixed precision", "checkpointing", "clipping and decay"],
)
def test_hugging_faces_trainer_in_other_ways(tmp_path, fields):
    probe = [{"input_ids": Rows().ids[:2]}]
    callback = EdgeOfStabilityCallback(probe, every=2, budget=1.0, sd_every=4, sd_runs=1, sd_steps=3)
    plain = trained_by_hugging_face(tmp_path / "plain", [], **fields)
    watched = trained_by_hugging_face(tmp_path / "watched", [callback], **fields)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters(), strict=True))
    assert [(r.step, r.sd is not None) for r in callback.monitor.readings] == [(1, False), (2, False), (4, True)]
    # What is read is the Hessian of the model itself, not of one that Accelerate runs in bfloat16.
    clean = build_preset("nano", vocabulary_size=50)
    clean.load_state_dict(watched.state_dict())
    vector = torch.randn(callback.monitor.probe.size, generator=torch.Generator().manual_seed(0))
    products = [Probe(model, None, probe, mode="eval").operator().matvec(vector) for model in (watched, clean)]
    assert torch.equal(*products)


@pytest.mark.long
def test_a_resumed_trainer_goes_on_with_its_readings(tmp_path):
    probe = [{"input_ids": Rows().ids[:2]}]
    whole = trained_by_hugging_face(tmp_path, [EdgeOfStabilityCallback(probe, every=1, budget=1.0)])
    first = read_readings(tmp_path)
    resumed = EdgeOfStabilityCallback(probe, every=1, budget=1.0)
    again = trained_by_hugging_face(tmp_path, [resumed], resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    assert [reading.step for reading in read_readings(tmp_path)] == [1, 2, 3, 4]
    assert read_readings(tmp_path)[:2] == first[:2]
    assert [reading.step for reading in resumed.monitor.readings] == [1, 2, 3, 4]


def test_a_trainer_that_shards_its_weights_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = "zero3.json"
    with pytest.raises(UnsupportedModelError, match="deepspeed"):
        EdgeOfStabilityCallback([None]).on_train_begin(args, None, None)


class Regression(lightning.LightningModule):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = optimizer
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.automatic_optimization = optimizer not in ("manual", "two")

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = functional.mse_loss(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        if self.kind == "two":
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[4])]
        if self.kind == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.kind == "scheduled":
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return optimizer


def mean_loss(module: Any, batch: Any) -> torch.Tensor:
    return functional.mse_loss(module.net(batch[0]), batch[1])


GENERATOR = torch.Generator().manual_seed(3)
DATA = torch.utils.data.TensorDataset(torch.randn(48, 4, generator=GENERATOR), torch.randn(48, 1, generator=GENERATOR))


def fitted(callbacks: list[Any], optimizer: str = "sgd", checkpoint: Any = None, **options: Any) -> Regression:
    lightning.seed_everything(1, verbose=False)
    module = Regression(optimizer)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        **({"max_epochs": 2, "accelerator": "cpu", "callbacks": callbacks, "logger": False} | quiet | options)
    )
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=8, shuffle=True), ckpt_path=checkpoint)
    return module


def test_lightning(tmp_path):
    callback = EdgeOfStability(mean_loss, [DATA[:8]], run_dir=tmp_path, every=2, budget=1.0)
    plain, watched = fitted([], accumulate_grad_batches=2), fitted([callback], accumulate_grad_batches=2)
    for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [reading.step for reading in read_readings(tmp_path)] == [1, 2, 4, 6]
    assert callback.monitor is not None
    assert callback.monitor.readings[0].threshold == pytest.approx(3.8)


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {"precision": "bf16-mixed"}),
        ("sgd", {"precision": "64-true", "gradient_clip_val": 0.01}),
        ("manual", {}),
    ],
)
def test_lightning_in_other_ways(optimizer: str, options: dict[str, Any]) -> None:
    callback = EdgeOfStability(mean_loss, [DATA[:8]], every=3, budget=1.0, sd_every=6, sd_runs=1, sd_steps=3)
    plain, watched = fitted([], optimizer, **options), fitted([callback], optimizer, **options)
    for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    readings = callback.monitor.readings
    assert [(r.step, r.sd is not None) for r in readings] == [(1, False), (3, False), (6, True), (9, False), (12, True)]
    assert all(0 < reading.ratio < 2 for reading in readings)


def test_under_lightning_the_rate_is_that_of_the_step_and_the_logger_hears_of_it(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    callback = EdgeOfStability(mean_loss, [DATA[:8]], every=1, budget=1.0)
    plain = fitted([], "scheduled", max_epochs=1)
    watched = fitted([callback], "scheduled", max_epochs=1, logger=logger)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    rates = [0.1 * 0.5**step for step in range(6)]
    assert [reading.rate for reading in callback.monitor.readings] == pytest.approx(rates)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as stream:
        told = [float(row["sharpness/ratio"]) for row in csv.DictReader(stream)]
    assert told == [reading.ratio for reading in callback.monitor.readings]


def test_under_lightning_a_resumed_run_goes_on_with_its_readings(tmp_path):
    def watch() -> EdgeOfStability:
        return EdgeOfStability(mean_loss, [DATA[:8]], run_dir=tmp_path / "run", every=1, budget=1.0)

    saver = lightning.callbacks.ModelCheckpoint(tmp_path, filename="half")
    fitted([watch(), saver], max_epochs=1, enable_checkpointing=True)
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    fitted([watch()], checkpoint=tmp_path / "half.ckpt")
    assert [reading.step for reading in read_readings(tmp_path / "run")] == list(range(1, 13))


def test_what_lightning_cannot_be_read_under_is_refused_at_the_start() -> None:
    with pytest.raises(UnsupportedModelError, match="2 optimizers"):
        fitted([EdgeOfStability(mean_loss, [DATA[:8]], jacobian="gd")], "two")
    trainer = SimpleNamespace(optimizers=[None], global_step=0, strategy=lightning.strategies.FSDPStrategy())
    with pytest.raises(UnsupportedModelError, match="FSDPStrategy shards"):
        EdgeOfStability(mean_loss, [DATA[:8]]).on_train_start(trainer, None)


@pytest.mark.slow
def test_data_parallel_training_is_read_by_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(parallel_runs.compare, (port, str(tmp_path / "ends.pt")), nprocs=2)
    plain, watched = torch.load(tmp_path / "ends.pt")
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


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


@pytest.mark.long
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


class Shift(nn.Module):
    """Adds ``part`` times its one weight, which starts at 1."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.part, self.weight = part, nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.part * self.weight


@pytest.mark.long
@pytest.mark.parametrize("delayed", [0.0, 0.1, 0.25, 0.4, 0.9])
def test_stale_weights_move_the_edge_both_ways(delayed: float) -> None:
    """One direction of curvature 1, a part ``delayed`` of its square in the first of two stages, whose weights are one
    minibatch old: z^2 - (1 - a (1 - p)) z + a p = 0 with a = rate. What is read is the ratio to the edge without delay."""
    edge = min(math.inf if delayed >= 0.5 else 2 / (1 - 2 * delayed), 1 / delayed if delayed else math.inf)

    def squared(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return 0.5 * outputs.square().mean()

    for share in (0.93, 1.07):
        net = nn.Sequential(Shift(math.sqrt(delayed)), Shift(math.sqrt(1 - delayed)))
        watch = StalenessSharpness(
            lambda root, item: squared(root(item[0]), None), [(torch.zeros(1), None)], every=1, budget=1.0
        )
        rate = share * edge
        run = Reference(
            sequential(net, squared),
            Plan.even(2, 2, policy="stash"),
            optimizer=lambda named, rate=rate: torch.optim.SGD(named, lr=rate),
            on_update=watch,
        )
        watch.follow(run)
        losses = run.run(lambda minibatch: (torch.zeros(1), torch.zeros(1)), stop=60).losses
        assert (losses[-1] + losses[-2] < losses[10]) == (share < 1)
        assert watch.readings[-1].ratio == pytest.approx(rate / 2, rel=1e-4)


def test_a_hook_that_was_not_told_its_reference_says_so() -> None:
    with pytest.raises(ConfigError, match="follow"):
        StalenessSharpness(None, [0])(0, 0, nn.Linear(1, 1))


def test_options_reach_the_monitor(tmp_path):
    callback = SharpnessCallback(jacobian="gd", every=4, budget=1.0)
    train(nano(), pattern(), replace(CONFIG, steps=4), run_dir=tmp_path, callbacks=[callback])
    assert copy.copy(callback.monitor.readings[0].threshold) == 2.0
    with pytest.raises(ConfigError, match="rows=0"):
        SharpnessCallback(rows=0)
