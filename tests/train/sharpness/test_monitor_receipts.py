"""Where the edge is, what a reading has to show for itself, and what a monitor does when a check fails on the way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import UnsupportedModelError
from telltale.signals import receipt
from telltale.signals.hessian import MatrixOperator
from telltale.train.sharpness import Probe, SharpnessMonitor
from telltale.train.sharpness.monitor import AFTERMATH, read_readings
from telltale.train.sharpness.readings import shares_by_module
from telltale.train.sharpness.tracking import ExtremeTracker


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(64, 8, generator=generator), torch.randint(3, (64,), generator=generator)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(data[0]), data[1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


@pytest.mark.parametrize("faster", ["0", "2", "4"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_layer_of_a_tenfold_rate_is_named_within_two_readings(faster: str, kind: Any) -> None:
    model = network()
    groups = [{"params": list(model[int(name)].parameters())} for name in ("0", "2", "4")]
    optimizer = kind(groups, lr=1e-3)
    optimizer.param_groups[("0", "2", "4").index(faster)]["lr"] *= 10
    monitor = SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, every=8, budget=1.0)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        monitor.step()
    assert [reading.step for reading in monitor.readings] == [1, 8]
    assert faster in [next(iter(reading.leading)) for reading in monitor.readings]
    for reading in monitor.readings:
        assert sum(reading.leading.values()) == pytest.approx(1.0, abs=1e-5)


def test_shares_are_squares_by_module() -> None:
    found = shares_by_module(torch.tensor([3.0, 0.0, 4.0, 0.0]), ["a.weight", "a.bias", "b.c.weight", "scale"], [1] * 4)
    assert found == {"a": pytest.approx(0.36), "b.c": pytest.approx(0.64), "scale": 0.0}


def test_a_reading_keeps_its_receipt_and_where_it_is_in_its_file(tmp_path: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, budget=1.0, run_dir=tmp_path)
    reading = monitor.check()
    assert 0 <= reading.receipt.worst < 1e-5
    assert reading.receipt.precision == "float64"
    assert read_readings(tmp_path) == [reading]


def test_the_first_reading_is_at_the_first_step_and_the_budget_holds_after_it() -> None:
    now = [0.0]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def slow(m: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        now[0] += 1.0
        return loss_of(m, data)

    monitor = SharpnessMonitor(model, slow, [batch()], optimizer=optimizer, budget=0.1, clock=lambda: now[0])
    for _ in range(400):
        now[0] += 1.0
        if monitor.step() is not None and len(monitor.readings) > 1:
            # Looks 2, 4 and 8 are dearer by a check, and waited for as long as they need.
            # (To one pass: products cost nothing by this clock.)
            assert AFTERMATH * (monitor.pace.spent - 1) <= 0.1 * monitor.pace.trained + 1e-9
    assert len(monitor.readings) > 8
    steps = [reading.step for reading in monitor.readings]
    assert steps[0] == 1
    assert steps[1] > 10
    assert monitor.pace.spent <= 0.1 * monitor.pace.trained + 1e-9


class Clamping(nn.Module):
    """A hook that does nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.bound = nn.Linear(8, 6), nn.Linear(6, 3), nn.Buffer(torch.tensor(math.inf))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        bound = self.bound
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-bound, bound))
        return self.last(h.tanh())


def test_a_check_that_fails_on_the_way_ends_the_readings_and_not_the_training() -> None:
    model = Clamping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, every=1, budget=1.0)
    assert monitor.step() is not None
    model.bound.fill_(1e-4)
    with pytest.warns(UserWarning, match="stops reading at step 2.*residual"):
        assert monitor.step() is None
    assert "residual" in monitor.refused
    assert monitor.step() is None
    assert len(monitor.readings) == 1


def test_a_loss_that_float32_rounds_away_ends_the_readings_until_it_is_back() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = 2 * torch.eye(4)
    data = torch.eye(4).repeat(3, 1) + 0.01 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = [(data, torch.arange(4).repeat(3))]
    monitor = SharpnessMonitor(model, loss_of, watched, optimizer=optimizer, every=1, budget=1.0)
    assert monitor.step() is not None
    model.weight.data = 17 * torch.eye(4)
    with pytest.warns(UserWarning, match="no reading at step 2.*rounding is"):
        assert monitor.step() is None
    assert monitor.step() is None
    model.weight.data = 10 * torch.eye(4)
    assert monitor.step().receipt.tolerance < receipt.TOLERANCE[torch.float32]


def test_a_loop_that_saves_its_tensors_through_hooks_is_read_all_the_same() -> None:
    model = network()
    with torch.autograd.graph.save_on_cpu():
        inside = Probe(model, loss_of, [batch()])
        found = inside.operator().gradient
    assert torch.equal(found, Probe(model, loss_of, [batch()]).operator().gradient)


def test_the_tracker_stays_within_its_memory_and_still_finds_the_largest() -> None:
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([3.0])]).double()
    operator = MatrixOperator(torch.diag(values))
    whole, narrow = ExtremeTracker(), ExtremeTracker(memory_limit=7 * 200 * 8)
    assert whole.memory(200, 8) == (2 * 200 * 8, 16 * 200 * 8)
    assert narrow.memory(200, 8) == (2 * 200 * 8, 7 * 200 * 8)
    for tracker in (whole, narrow):
        first, second = tracker.look(operator), tracker.look(operator)
        assert first.matvecs <= 13
        assert second.largest == pytest.approx(3.0, abs=1e-3)
        assert abs(second.largest - 3.0) <= second.error + 1e-9
        assert float(tracker.vector.norm()) == pytest.approx(1.0, abs=1e-6)


def near_a_kink() -> tuple[nn.Module, Any]:
    """One activation of 2e-9, in float64: a step of 1e-8 of the weights takes it over its kink."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    with torch.no_grad():
        model[0].bias[0] -= model[0](data[0])[0, 0] - 2e-9
    return model, data


def test_a_kink_within_the_step_is_no_hidden_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = near_a_kink()
    probe = Probe(model, loss_of, [data])
    probe.operator()
    difference = probe.receipts[0].difference
    assert difference is not None
    assert difference < 1e-3
    monkeypatch.setattr(receipt, "SHORTER", ())
    with pytest.raises(UnsupportedModelError, match="the change of the gradient"):
        probe.operator()


def test_hidden_curvature_is_hidden_from_a_shorter_step_as_well() -> None:
    model, data = near_a_kink()

    def hides(net: nn.Module, batch: Any) -> torch.Tensor:
        hidden = net[1](net[0](batch[0]))
        return functional.cross_entropy(net[2](hidden), batch[1]) + (hidden.detach() * hidden).sum()

    with pytest.raises(UnsupportedModelError):
        Probe(model, hides, [data]).operator()
