"""The critical step of an update, from forward passes alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import ConfigError, NumericalError
from telltale.train.sharpness import CriticalStep, SharpnessMonitor
from train.sharpness.bowls import Bowl, quadratic


def stepped(model: nn.Module, loss: Any, batch: Any, optimizer: torch.optim.Optimizer, channel: CriticalStep) -> Any:
    optimizer.zero_grad()
    loss(model, batch).backward()
    channel.before()
    optimizer.step()
    return channel.after()


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.49, 0.8])
def test_under_gradient_descent_it_is_the_curvature_along_the_gradient(rate: float) -> None:
    model = Bowl([4.0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    channel = CriticalStep(model, quadratic, [None])
    gradient = model.curvatures * model.weight.detach()
    curvature = float(gradient @ (model.curvatures * gradient) / (gradient @ gradient))
    reading = stepped(model, quadratic, None, optimizer, channel)
    assert reading.ratio == pytest.approx(curvature * rate / 2, rel=0.02)
    assert 7 <= reading.forwards <= 15


@pytest.mark.parametrize(
    ("make", "threshold"),
    [
        (lambda p, lr: torch.optim.SGD(p, lr=lr), 2.0),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), 3.8),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True), 3.8 / 2.8),
    ],
)
def test_at_the_edge_of_each_optimizer_it_is_one(make: Any, threshold: float) -> None:
    """A step along the steepest direction then reverses the one before it."""
    model = Bowl([threshold / 0.1, 0.2])
    optimizer = make(model.parameters(), 0.1)
    channel = CriticalStep(model, quadratic, [None])
    for _ in range(300):
        reading = stepped(model, quadratic, None, optimizer, channel)
    assert reading.ratio == pytest.approx(1.0, abs=0.05)


class Lion(torch.optim.Optimizer):
    """Signs of interpolated momentum: no edge of it is known, no Jacobian either."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * (0.9 * state + 0.1 * parameter.grad).sign())
                state.mul_(0.99).add_(0.01 * parameter.grad)


class Attention(nn.Module):
    """A kernel that has no second derivative, dropout, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.last = nn.Linear(5, 12), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x[:, None]).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0, 0]
        return self.last(functional.dropout(self.norm(mixed), 0.05, self.training))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda p: Lion(p, 0.02), lambda p: torch.optim.Adafactor(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.05)],
)
def test_any_optimizer_clipped_compiled_or_fused_and_training_is_bit_identical(make: Any, compiled: bool) -> None:
    def trained(watched: bool) -> tuple[list[Tensor], list[float]]:
        torch.manual_seed(0)
        model = Attention()
        run = torch.compile(model, backend="eager") if compiled else model
        optimizer = make(model.parameters())
        batch = (torch.randn(32, 5), torch.randint(3, (32,)))
        channel = CriticalStep(run, cross_entropy, [batch]) if watched else None
        torch.manual_seed(1)
        ratios = []
        for _ in range(6):
            optimizer.zero_grad()
            cross_entropy(run, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if channel is not None:
                channel.before()
            optimizer.step()
            if channel is not None:
                ratios.append(channel.after().ratio)
        return [*copy.deepcopy(model.state_dict()).values(), torch.get_rng_state()], ratios

    (with_it, ratios), (without, _) = trained(True), trained(False)
    assert all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))
    assert all(ratio >= 0 for ratio in ratios)
    assert any(0 < ratio < math.inf for ratio in ratios)


def test_a_loss_that_is_flat_along_the_update_and_one_that_rises_at_once() -> None:
    model = Bowl([0.0, 0.0])
    channel = CriticalStep(model, lambda m, b: quadratic(m, b) + 0 * m.weight.sum(), [None])
    channel.before()
    with torch.no_grad():
        model.weight.add_(0.1)
    flat = channel.after()
    assert (flat.step, flat.ratio) == (math.inf, 0.0)
    uphill = Bowl([1.0, 1.0])
    channel = CriticalStep(uphill, quadratic, [None])
    channel.before()
    with torch.no_grad():
        uphill.weight.add_(0.1)
    risen = channel.after()
    assert (risen.step, risen.ratio) == (0.0, math.inf)


def test_it_follows_the_monitor_to_the_edge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    batch = (torch.randn(48, 5), functional.one_hot(torch.randint(3, (48,))).float())

    def squared(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (net(data[0]) - data[1]).square().sum(1).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.7)
    monitor = SharpnessMonitor(model, squared, [batch], optimizer=optimizer, every=10, budget=1.0)
    channel = CriticalStep(model, squared, [batch])
    pairs = []
    for _ in range(400):
        reading = stepped(model, squared, batch, optimizer, channel)
        found = monitor.step()
        if found is not None:
            pairs.append((found.ratio, reading.ratio))
    late = pairs[len(pairs) // 2 :]
    assert max(largest for largest, _ in late) > 0.8
    assert all(abs(critical - 1) <= 0.15 for _, critical in late)


def test_bad_input_is_named() -> None:
    model = Bowl([1.0])
    channel = CriticalStep(model, quadratic, [None])
    with pytest.raises(ConfigError, match="before"):
        channel.after()
    channel.before()
    with torch.no_grad():
        model.weight.add_(1.0)
    channel._kept[0].fill_(math.nan)
    with pytest.raises(NumericalError, match="before the update"):
        channel.after()
    with pytest.raises(ConfigError, match=r"expected one of torch\.optim"):
        CriticalStep(model, quadratic, [None], optimizer="sgd")  # type: ignore[arg-type]
