"""The edge of each block alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import ConfigError
from telltale.signals.hessian import materialise
from telltale.train.sharpness import SharpnessMonitor
from telltale.train.sharpness.edges import step_jacobian_of


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p)])
def test_blocks_are_those_of_the_dense_operator_and_their_products_are_charged(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = make(model.parameters())
    monitor = SharpnessMonitor(model, loss_of, [data], optimizer=optimizer, every=1, budget=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        reading = monitor.step()
    spent = monitor.cost.seconds
    found = monitor.by_block(steps=40)
    assert monitor.cost.seconds > spent
    view = step_jacobian_of(optimizer, monitor.probe.parameters)
    assert view is not None
    assert view.wrap is not None
    dense = materialise(view.wrap(monitor.probe.operator(check=False)))
    sizes = {str(index): sum(p.numel() for p in model[index].parameters()) for index in (0, 2, 4)}
    start = 0
    for name, size in sizes.items():
        block = dense[start : start + size, start : start + size]
        assert found[name] == pytest.approx(float(torch.linalg.eigvalsh(block).max()) / view.threshold, rel=1e-4)
        start += size
    assert reading is not None
    assert max(found.values()) <= float(torch.linalg.eigvalsh(dense).max()) / view.threshold * 1.0001
    assert set(monitor.by_block(["0", "*.bias"])) == {"0", "*.bias"}


def test_a_block_that_is_not_measured_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    data = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    monitor = SharpnessMonitor(model, loss_of, [data], optimizer=optimizer)
    with pytest.raises(ConfigError, match="holds no parameter that is measured"):
        monitor.by_block(["0"])
    with pytest.raises(ConfigError, match="does not have"):
        monitor.by_block(["5"])
