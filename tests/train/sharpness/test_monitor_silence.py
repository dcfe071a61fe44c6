"""Training with a monitor is training without one, to the last bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from telltale.train.sharpness import SharpnessMonitor

STEPS = 50

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def trained(kind: str, *, watched: bool, mode: str = "eval") -> dict[str, Any]:
    """Everything that training leaves behind, random states and gradients included."""
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(5)]
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    monitor = None
    if watched:
        monitor = SharpnessMonitor(
            model,
            loss_of,
            batches[:2],
            optimizer=optimizer,
            every=3,
            budget=1.0,
            sd_every=20,
            sd_runs=2,
            sd_steps=5,
            mode=mode,
        )
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batches[step % 5]).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
    if monitor is not None:
        assert len(monitor.readings) == 17, "the first step's, and one every so many"
        assert [step for step, _ in monitor.dimensions] == [21, 42]
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "gradients": [p.grad.clone() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["eval", "as is"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_about_training_changes(kind: str, mode: str) -> None:
    plain, watched = trained(kind, watched=False), trained(kind, watched=True, mode=mode)
    for name, value in plain.items():
        assert same(value, watched[name]), name


def test_the_comparison_above_can_fail() -> None:
    assert not same(trained("momentum", watched=False), trained("adamw", watched=False))
