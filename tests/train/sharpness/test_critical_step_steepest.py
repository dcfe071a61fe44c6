"""The forward-only channel with an optimizer: the steepest direction that updates show, in the optimizer's own metric."""

from __future__ import annotations

import copy
import math
import shutil
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from telltale.signals.hessian import materialise
from telltale.train.sharpness import CriticalStep, Probe, SharpnessMonitor
from telltale.train.sharpness.critical_step import WINDOW
from telltale.train.sharpness.edges import step_jacobian_of
from train.sharpness import sharded_runs
from train.sharpness.bowls import Bowl, quadratic

OPTIMIZERS: list[tuple[Any, float]] = [
    (lambda p: torch.optim.SGD(p, lr=0.1), 2.0),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 3.8),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 2.8),
]


@pytest.mark.parametrize(("make", "threshold"), OPTIMIZERS)
@pytest.mark.parametrize("part", [0.6, 0.95])
def test_it_finds_the_ratio_of_a_quadratic_also_under_drift(make: Any, threshold: float, part: float) -> None:
    """A flat direction moves all the time; the steepest one decays. Below the edge, too, the ratio is that of the steepest."""
    model = Bowl([part * threshold / 0.1, 1.0, 1e-3])
    optimizer = make(model.parameters())
    channel = CriticalStep(model, lambda m, b: quadratic(m, b) + 10 * m.weight[2], [None], optimizer=optimizer)
    for step in range(12):
        optimizer.zero_grad()
        (quadratic(model, None) + 10 * model.weight[2]).backward()
        channel.before()
        optimizer.step()
        if step % 4 == 3:
            reading = channel.after()
    assert reading.ratio == pytest.approx(part, rel=0.02)
    assert reading.threshold == pytest.approx(threshold)
    assert (reading.along, reading.step) == ("steepest", None)
    assert reading.forwards in (3, 6), "half of them where the updates show nothing but the direction that is known"
    assert reading.sharpness == pytest.approx(part * threshold / 0.1, rel=0.02)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def squared(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (net(data[0]) - data[1]).square().sum(1).mean()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 5, generator=generator), functional.one_hot(
        torch.randint(3, (48,), generator=generator), 3
    ).float()


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=1e-3), 0.5),
        (lambda p: torch.optim.Adam(p, lr=0.02), 0.0),
        (lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), 0.0),
        (lambda p: torch.optim.RMSprop(p, lr=0.005), 0.5),
    ],
)
def test_it_is_a_lower_bound_that_gets_near_the_largest_eigenvalue(make: Any, near: float) -> None:
    """Against the dense spectrum of the same operator, preconditioner, decay and all. Adam is far below its edge here."""
    model, data = network(), rows()
    optimizer = make(model.parameters())
    channel, pairs = CriticalStep(model, squared, [data], optimizer=optimizer), []
    for step in range(200):
        optimizer.zero_grad()
        squared(model, data).backward()
        if step % 10 >= 10 - WINDOW:
            channel.before()
        optimizer.step()
        if step % 10 == 9:
            found = channel.after()
            probe = Probe(model, squared, [data])
            view = step_jacobian_of(optimizer, probe.parameters)
            assert view is not None
            assert view.wrap is not None
            largest = float(torch.linalg.eigvalsh(materialise(view.wrap(probe.operator(check=False)))).max())
            pairs.append((largest / view.threshold, found.ratio))
    assert [pair for pair in pairs if not pair[1] <= pair[0] * 1.01] == []
    assert sum(found / largest for largest, found in pairs[-5:]) / 5 > near


def test_where_the_steepest_direction_is() -> None:
    model, data = network(), rows()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    channel = CriticalStep(model, squared, [data], optimizer=optimizer)
    for _ in range(WINDOW):
        optimizer.zero_grad()
        squared(model, data).backward()
        channel.before()
        optimizer.step()
    leading = channel.after().leading
    assert leading is not None
    assert next(iter(leading)) == "2"
    only = CriticalStep(model, squared, [data], optimizer=optimizer, parameters=["0"])
    only.before()
    optimizer.step()
    assert only.after().leading == {"0": pytest.approx(1.0)}


def test_weights_that_have_not_moved_and_rows_that_are_interrupted() -> None:
    model, data = network(), rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    channel = CriticalStep(model, squared, [data], optimizer=optimizer)
    channel.before()
    assert channel.after().ratio == 0.0

    def step() -> None:
        optimizer.zero_grad()
        squared(model, data).backward()
        optimizer.step()

    channel.forget()
    channel.before()
    step()
    channel.after()
    step()  # Not seen: what follows is a new row, not one of three updates.
    channel.before()
    assert len(channel._kept) == 1
    step()
    channel.after()
    channel.before()  # Right behind the last: the row goes on.
    assert len(channel._kept) == 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part[:, None] for part in self.mix(x).chunk(3, -1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.last(mixed[:, 0]).mean(1)


def test_fused_attention_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash kernel alone is allowed, and nothing takes its place."""

    def composed(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("attention was composed")

    torch.manual_seed(0)
    model = Attention()
    data = torch.randn(6, 7, 8), torch.randint(3, (6,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(net(batch[0]), batch[1])

    channel = CriticalStep(model, loss, [data], optimizer=optimizer)
    monkeypatch.setattr(torch, "_scaled_dot_product_attention_math", composed)
    for _ in range(4):
        optimizer.zero_grad()
        loss(model, data).backward()
        channel.before()
        optimizer.step()
    reading = channel.after()
    assert math.isfinite(reading.ratio)
    assert reading.forwards >= 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_model_is_read_and_trains_the_same() -> None:
    def trained(watched: bool) -> tuple[list[Tensor], list[float]]:
        model, data = network(), rows()
        run = torch.compile(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        channel = CriticalStep(run, squared, [data], optimizer=optimizer) if watched else None
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            squared(run, data).backward()
            if channel is not None:
                channel.before()
            optimizer.step()
            if channel is not None:
                found.append(channel.after().ratio)
        return [*copy.deepcopy(model.state_dict()).values(), torch.get_rng_state()], found

    (with_it, ratios), (without, _) = trained(True), trained(False)
    assert all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))
    assert all(math.isfinite(ratio) for ratio in ratios)


def test_muon_has_the_critical_step_of_its_update() -> None:
    model, data = nn.Sequential(nn.Linear(5, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False)), rows()
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    channel, found = CriticalStep(model, squared, [data], optimizer=optimizer), []
    for _ in range(5):
        optimizer.zero_grad()
        squared(model, data).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        channel.before()
        optimizer.step()
        found.append(channel.after())
    assert {reading.along for reading in found} == {"update"}
    assert any(0 < reading.ratio < math.inf for reading in found)
    assert found[-1].sharpness == pytest.approx(2 * found[-1].ratio / 0.02)


def test_a_monitor_reads_both_channels_and_training_is_the_same(tmp_path: Any) -> None:
    def trained(forward: bool) -> tuple[list[Tensor], SharpnessMonitor]:
        model, data = network(), rows()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.3)
        monitor = SharpnessMonitor(
            model, squared, [data], optimizer=optimizer, every=10, budget=1.0, forward=forward, run_dir=tmp_path
        )
        for _ in range(200):
            optimizer.zero_grad()
            squared(model, data).backward()
            optimizer.step()
            monitor.step()
        return [parameter.detach().clone() for parameter in model.parameters()], monitor

    (plain, without), (watched, monitor) = trained(False), trained(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert all(reading.forward_ratio is None for reading in without.readings)
    pairs = [(reading.ratio, reading.forward_ratio) for reading in monitor.readings]
    assert all(found is not None and found <= 1.02 * ratio for ratio, found in pairs)
    assert pairs[-1][0] > 0.8
    assert pairs[-1][1] == pytest.approx(pairs[-1][0], rel=0.15)
    from telltale.train.sharpness.readings import read_readings

    assert [reading.forward_ratio for reading in read_readings(tmp_path)] == [found for _, found in pairs]


@pytest.mark.slow
def test_sharded_over_two_processes_it_reads_what_one_process_reads(tmp_path: Any) -> None:
    """FSDP2 on gloo: training to the last bit, both processes the same readings, and those of the whole model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded_runs.compare, (port, str(tmp_path / "ends")), nprocs=2)
    ends = [torch.load(f"{tmp_path / 'ends'}.{rank}") for rank in range(2)]
    for kind in ("adamw", "signs"):
        assert all(end[kind]["same"] for end in ends)
        assert ends[0][kind]["ratios"] == ends[1][kind]["ratios"]
        assert all(math.isfinite(ratio) for ratio in ends[0][kind]["ratios"])
    model = sharded_runs.network("adamw")
    optimizer = sharded_runs.optimizer_of("adamw", model)
    both = tuple(torch.cat(parts) for parts in zip(*map(sharded_runs.data, range(2)), strict=True))
    channel, found = CriticalStep(model, sharded_runs.loss_of, [both], optimizer=optimizer), []
    for step in range(sharded_runs.STEPS):
        optimizer.zero_grad()
        sharded_runs.loss_of(model, both).backward()
        channel.before()
        optimizer.step()
        if step % 4 == 3:
            found.append(channel.after().ratio)
    assert ends[0]["adamw"]["ratios"] == pytest.approx(found, rel=0.05)
