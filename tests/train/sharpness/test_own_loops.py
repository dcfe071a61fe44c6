"""Loops as people write them: mixed precision, accumulation, averaged weights, fused steps; both channels, and no bit changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import UnsupportedModelError
from telltale.train.sharpness import SharpnessMonitor

ROWS = 8


class Tied(nn.Module):
    """Token ids in; the last layer has the embedding's weight. Dropout, batch norm, an integer buffer that counts passes, a
    frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.first = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 11, bias=False)
        self.last.weight = self.tokens.weight
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.arange(8) % 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.frozen(self.tokens(ids) + self.shift)
        return self.last(self.drop(functional.gelu(self.norm(self.first(hidden)))))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (ROWS,), generator=generator), torch.randint(11, (ROWS,), generator=generator)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two rates, and one group without decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": trained[:1], "lr": 0.003}, {"params": trained[1:], "lr": 0.02, "weight_decay": 0.0}]


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda g: torch.optim.AdamW(g, lr=0.01, fused=True),
    "foreach": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, weight_decay=0.01, foreach=True),
    "amsgrad": lambda g: torch.optim.Adam(g, lr=0.01, amsgrad=True, foreach=False),
}


def trained(kind: str, *, watched: bool, resume: bool = False) -> tuple[dict[str, Any], list[Any]]:
    """bfloat16 autocast, a gradient scaler, two minibatches an update, clipping, a cosine schedule, averaged weights."""
    model = Tied()
    optimizer = KINDS[kind](groups(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.manual_seed(7)
    monitor = None
    readings: list[Any] = []
    for step in range(12):
        if watched and (step == 0 or (resume and step == 6)):
            if monitor is not None:
                monitor.close()
            monitor = SharpnessMonitor(
                model, loss_of, [batch(100)], optimizer=optimizer, every=3, budget=1.0, forward=True, start=step
            )
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch(2 * step + part)) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if monitor is not None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                readings.append(monitor.step(loss))
        schedule.step()
        averaged.update_parameters(model)
    state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"scaler": scaler.state_dict(), "random": torch.get_rng_state(), "rates": schedule.state_dict()}
    return copy.deepcopy(state), [reading for reading in readings if reading is not None]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_is_the_same_with_both_channels_on(kind: str, resume: bool) -> None:
    (plain, _), (watched, readings) = trained(kind, watched=False), trained(kind, watched=True, resume=resume)
    for name, value in plain.items():
        assert same(value, watched[name]), name
    assert len(readings) == (6 if resume else 5)
    assert all(math.isfinite(reading.ratio) and reading.ratio > 0 for reading in readings)
    assert sum(reading.forward_ratio is not None for reading in readings) >= 4
    assert all(
        reading.forward_ratio <= reading.ratio + reading.ratio_error + 0.01
        for reading in readings
        if reading.forward_ratio is not None
    )
    assert readings[-1].rate < readings[0].rate


def test_a_search_along_its_own_direction_has_no_edge() -> None:
    model = Tied()
    optimizer = torch.optim.LBFGS([parameter for parameter in model.parameters() if parameter.requires_grad])
    with pytest.raises(UnsupportedModelError, match=r"LBFGS.*jacobian='gd'"):
        SharpnessMonitor(model, loss_of, [batch(0)], optimizer=optimizer)
    with_rate = SharpnessMonitor(model, loss_of, [batch(0)], optimizer=optimizer, jacobian="gd", budget=1.0)
    optimizer.step(lambda: backward(model, optimizer))
    reading = with_rate.step()
    assert reading is not None
    assert reading.threshold == 2.0


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, batch(0))
    loss.backward()
    return loss
