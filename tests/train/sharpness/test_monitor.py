"""The monitor on problems whose edge is known, its states, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.train.sharpness import SharpnessMonitor, edge_of
from telltale.train.sharpness.monitor import AT_EDGE, DIVERGING, PAST_EDGE, STABLE, read_readings


class Bowl(nn.Module):
    """loss = sum c_i w_i^2 / 2: the Hessian is diag(c)."""

    def __init__(self, curvature: list[float], start: float = 1.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((len(curvature),), start))
        self.register_buffer("curvature", torch.tensor(curvature))

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * self.weights.square()).sum()


def bowl_loss(model: nn.Module, batch: Any) -> Tensor:
    return model()


def monitor_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> SharpnessMonitor:
    return SharpnessMonitor(model, bowl_loss, [None], optimizer=optimizer, **({"every": 1, "budget": 1.0} | options))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: SharpnessMonitor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        monitor.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.3}),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ],
)
@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_the_ratio_is_the_distance_to_the_edge(kind: Any, options: dict[str, Any], share: float) -> None:
    edge = edge_of(kind([nn.Parameter(torch.zeros(1))], **options))
    top = share * edge.threshold / edge.rate
    model = Bowl([top, 0.1 * top, 0.0, -0.2])
    optimizer = kind(model.parameters(), **options)
    reading = monitor_of(model, optimizer).check()
    assert reading.ratio == pytest.approx(share, rel=1e-5)
    assert reading.lambda_max == pytest.approx(top, rel=1e-5)
    assert reading.lambda_min == pytest.approx(-0.2, rel=1e-4)
    assert reading.lambda_max * reading.rate / reading.threshold == pytest.approx(reading.ratio, rel=1e-6)
    assert reading.ratio_error <= 1e-4
    assert reading.state == {0.5: STABLE, 1.0: AT_EDGE, 1.5: PAST_EDGE}[share]


def test_adam_is_read_through_its_preconditioner() -> None:
    model = Bowl([3.0, 1.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.9))
    monitor = monitor_of(model, optimizer)
    with pytest.raises(DataError, match="has not stepped yet"):
        monitor.check()
    steps(model, optimizer, monitor, 5)
    state = optimizer.state[model.weights]
    p = (1 - 0.9**5) * ((state["exp_avg_sq"] / (1 - 0.9**5)).sqrt() + 1e-8)
    reading = monitor.readings[-1]
    assert reading.lambda_max == pytest.approx(float((model.curvature / p).max()), rel=1e-4)
    assert reading.threshold == pytest.approx(38.0)
    assert reading.ratio == pytest.approx(0.01 * reading.lambda_max / 38.0, rel=1e-6)


def test_before_the_first_step_of_an_adaptive_optimizer_there_is_nothing_to_read() -> None:
    model = Bowl([1.0])
    monitor = monitor_of(model, torch.optim.AdamW(model.parameters()))
    assert monitor.step() is None
    assert monitor.state == STABLE


def test_the_papers_jacobian_ignores_the_optimizer() -> None:
    model = Bowl([4.0, 1.0])
    reading = monitor_of(model, torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9), jacobian="gd").check()
    assert (reading.threshold, reading.ratio) == (2.0, pytest.approx(0.5, rel=1e-5))


def test_a_rate_of_zero_moves_nothing() -> None:
    for jacobian in ("gd", "optimizer"):
        model = Bowl([4.0, 1.0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        monitor = monitor_of(model, optimizer, jacobian=jacobian, sd_every=1)
        reading = monitor.check()
        assert (reading.ratio, reading.state, reading.sd, reading.lambda_max) == (0.0, STABLE, None, None)
        optimizer.param_groups[0]["lr"] = 0.25
        assert monitor.check().ratio == pytest.approx(0.5, rel=1e-4)


def test_the_budget_may_be_kept_by_a_clock_of_ones_own() -> None:
    """Where a process does more than this training, that must not buy it looks."""
    now = [0.0]
    model = Bowl([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor_of(model, optimizer, budget=0.5, clock=lambda: now[0])
    assert monitor.step() is not None, "the first look comes at once"
    monitor.pace.expect("edge", 3.0)
    until_a_look = 0
    while monitor.step() is None:
        now[0] += 1.0
        until_a_look += 1
    assert until_a_look == 8, "3 / .5, and what follows a look"


def test_a_schedule_and_sharpening_are_seen() -> None:
    model = Bowl([4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = monitor_of(model, optimizer)
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = 0.01 * step
        monitor.step()
    assert [reading.ratio for reading in monitor.readings] == pytest.approx([0.02 * step for step in range(1, 6)])
    assert monitor.readings[1].slope is None
    assert monitor.readings[-1].slope == pytest.approx(20.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: model(batch).mean(),
        lambda model, batch: 3.0 + 0.0 * model(batch).square().sum(),
        lambda model, batch: (model(batch) - 100.0).relu().square().mean(),
    ],
    ids=["linear", "constant", "dead"],
)
def test_linear_and_constant_losses_and_dead_networks_have_no_curvature(loss: Any) -> None:
    model = nn.Linear(3, 1)
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "every": 1, "budget": 1.0, "sd_every": 1}
    reading = SharpnessMonitor(model, loss, [torch.randn(4, 3)], **options).step()
    assert reading is not None
    assert (reading.no_curvature, reading.ratio, reading.state, reading.sd) == (True, 0.0, STABLE, 4.0)
    assert (
        not SharpnessMonitor(model, lambda m, b: m(b).square().mean(), [torch.randn(4, 3)], **options)
        .check()
        .no_curvature
    )


def test_a_loss_that_is_not_finite_is_diverging_and_never_a_number() -> None:
    model = Bowl([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor_of(model, optimizer, every=1000)
    told = monitor.step(loss=math.nan)
    assert told is not None
    assert (told.state, told.lambda_max, math.isnan(told.ratio)) == (DIVERGING, None, True)
    with torch.no_grad():
        model.weights.fill_(math.inf)
    reading = monitor.check()
    assert reading.state == DIVERGING
    assert monitor.state == DIVERGING


def test_a_loss_may_be_told_as_the_tensor_that_it_is(tmp_path: Path) -> None:
    model = Bowl([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor_of(model, optimizer, run_dir=tmp_path)
    loss = model()
    reading = monitor.step(loss)
    assert reading is not None
    assert type(reading.loss) is float
    assert [kept.loss for kept in read_readings(tmp_path)] == [float(loss.detach())] == [monitor.check(loss).loss]


def test_past_the_edge_with_a_rising_loss_is_diverging() -> None:
    model = Bowl([30.0, 1.0], start=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor_of(model, optimizer)
    steps(model, optimizer, monitor, 6)
    assert [reading.state for reading in monitor.readings] == [PAST_EDGE] * 3 + [DIVERGING] * 3


def test_an_unknown_optimizer_is_read_as_the_paper_does_with_one_warning() -> None:
    model = Bowl([4.0, 1.0])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.25)
    with pytest.warns(UserWarning, match="Adagrad is not known") as seen:
        monitor = monitor_of(model, optimizer)
    assert len(seen) == 1
    steps(model, optimizer, monitor, 2)
    assert monitor.readings[-1].ratio == pytest.approx(0.5, rel=1e-4)


def test_dimensions_are_measured_where_asked() -> None:
    model = Bowl([4.0, 1.0, 0.0, -1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monitor = monitor_of(model, optimizer, sd_every=3)
    steps(model, optimizer, monitor, 7)
    assert [step for step, _ in monitor.dimensions] == [3, 6]
    # ln 1.25, 0, ln .75, ln 0: the first and the second and .776 of the third.
    wanted = 2 + math.log(1.25) / -math.log(0.75)
    assert monitor.readings[2].sd == pytest.approx(wanted, rel=1e-6)
    assert monitor.readings[2].sd_interval is None, "one minibatch has no interval"
    assert monitor.readings[2].sd_minibatches == 1
    assert monitor.readings[3].sd is None


def test_files_are_what_was_read_and_a_resumed_run_goes_on_from_its_step(tmp_path: Path) -> None:
    model = Bowl([4.0, 1.0, -1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monitor = monitor_of(model, optimizer, sd_every=2, run_dir=tmp_path / "run")
    steps(model, optimizer, monitor, 5)
    assert read_readings(tmp_path / "run") == monitor.readings
    assert json.loads((tmp_path / "run" / "sharpness_config.json").read_text())["parameters"] == 3
    assert sorted(path.name for path in (tmp_path / "run").glob("sharpness-step-*")) == [
        "sharpness-step-000002.json",
        "sharpness-step-000004.json",
    ]
    with (tmp_path / "run" / "sharpness.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lamb')
    resumed = monitor_of(model, optimizer, run_dir=tmp_path / "run", start=3)
    assert [reading.step for reading in resumed.readings] == [1, 2, 3]
    steps(model, optimizer, resumed, 1)
    assert [reading.step for reading in read_readings(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "sharpness-step-000004.json").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = Bowl([1.0])
    with pytest.raises(CheckpointError, match="file"):
        monitor_of(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir=tmp_path / "file" / "run")


def test_the_same_seed_reads_the_same() -> None:
    ratios = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        batch = (torch.randn(16, 4), torch.randint(2, (16,)))
        monitor = SharpnessMonitor(
            model,
            lambda m, b: functional.cross_entropy(m(b[0]), b[1]),
            [batch],
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            steps=3,
            seed=5,
            every=1,
            budget=1.0,
        )
        ratios.append([monitor.check().ratio, monitor.check().ratio])
    assert ratios[0] == ratios[1]


def test_reentrant_checkpointing_is_refused_on_construction() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)

    model = Reentrant()
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        SharpnessMonitor(
            model,
            lambda m, b: m(b).square().mean(),
            [torch.randn(2, 3)],
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ).check()


def test_bfloat16_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = torch.randn(8, 4).bfloat16()
    loss = lambda m, b: m(b).float().square().mean()  # noqa: E731
    monitor = SharpnessMonitor(model, loss, [batch], optimizer=optimizer, every=1, budget=1.0)
    loss(model, batch).backward()
    optimizer.step()
    reading = monitor.step()
    assert reading is not None
    assert math.isfinite(reading.ratio)
    assert reading.ratio > 0
    assert monitor.probe.excluded == {"0.bias": "frozen"}
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"every": 0}, "every=0"),
        ({"sd_every": 0}, "sd_every=0"),
        ({"jacobian": "adam"}, "jacobian='adam'"),
        ({"steps": 1}, "steps=1"),
        ({"mode": "off"}, "mode='off'"),
        ({"start": -1}, "start=-1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    model = Bowl([1.0])
    with pytest.raises(ConfigError, match=words):
        monitor_of(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_an_empty_probe_and_foreign_parameters_are_refused() -> None:
    model = Bowl([1.0])
    with pytest.raises(DataError, match="no minibatches"):
        SharpnessMonitor(model, bowl_loss, [], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="optimizer is NoneType"):
        SharpnessMonitor(model, bowl_loss, [None], optimizer=None)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(DataError, match="does not hold 1 of the 1"):
        monitor_of(model, other).check()
