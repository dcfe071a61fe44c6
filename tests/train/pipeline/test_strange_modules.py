"""Modules of strangers: what torch's own loop does with them is done, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from telltale.errors import DataError, TelltaleError, UnsupportedModelError
from telltale.train.pipeline import PipelineTrainer, Plan, reference

ce = nn.functional.cross_entropy


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(6, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1)


def plainly(net: nn.Module, stop: int, around: Any = None) -> list[float]:
    optimizer, losses = sgd(net.parameters()), []
    for t in range(stop):
        inputs, targets = batch(t)
        if around is None:
            loss = ce(net(inputs), targets)
        else:
            with around():
                loss = ce(net(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(net: nn.Sequential, layers: int, stop: int, *, recompute: bool = False, loss: Any = ce) -> list[float]:
    plan = Plan.manual([range(layers)], policy="flush", recompute=recompute)
    return PipelineTrainer(net, plan, optimizer=sgd, loss=loss).train(batch, stop=stop)


class Averaging(nn.Module):
    """Puts another tensor in its buffer's place in every forward, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = x.detach()[0] if self.last is None else self.last + 1
        return (x - self.mean + self.last) * self.scale


class Aside(nn.Module):
    """Reads a weight that it does not own, or not as a parameter."""

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.read = [owner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.read[0].t()


def seeded(make: Callable[[], nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(0)
    return make()


def test_a_child_that_stands_in_several_places_runs_in_each() -> None:
    def shared() -> nn.Sequential:
        act, inner = nn.Tanh(), nn.Linear(8, 8)
        return nn.Sequential(inner, act, inner, act, nn.Linear(8, 5))

    ours, plain = seeded(shared), seeded(shared)
    assert trained(ours, 5, 3) == plainly(plain, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_buffer_that_is_replaced_moves_once(recompute: bool) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(Averaging(), nn.Linear(8, 5))

    ours, plain = seeded(make), seeded(make)
    assert trained(ours, 2, 4, recompute=recompute) == plainly(plain, 4)
    assert torch.equal(ours[0].mean, plain[0].mean)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_around_a_run_reads_the_newest_weights(recompute: bool) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def around() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    ours, plain = seeded(make), seeded(make)
    with around():
        losses = trained(ours, 3, 4, recompute=recompute)
    assert losses == plainly(plain, 4, around)


def _hooked() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    net[0].weight.register_hook(lambda gradient: gradient / 2)
    return net


def _aside() -> nn.Sequential:
    owner = nn.Linear(8, 8)
    return nn.Sequential(owner, Aside(owner), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_hooked, "0.weight has a hook on its gradient"),
        (_aside, "reads 0.weight past its module"),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 5)), "0.weight has no shape yet"),
    ],
    ids=["hook", "aside", "lazy"],
)
@pytest.mark.parametrize("stages", [1, 2])
def test_what_a_weight_version_cannot_stand_in_for_is_refused(
    make: Callable[[], nn.Sequential], words: str, stages: int
) -> None:
    net = make()
    plan = Plan.even(len(net), stages, policy="flush")
    with pytest.raises(UnsupportedModelError, match=words):
        reference.train(net, plan, batch, optimizer=sgd, stop=2, loss=ce)


@pytest.mark.parametrize(
    "loss", [lambda o, y: ce(o.detach().requires_grad_(), y), lambda o, y: o.new_zeros((), requires_grad=True) * 2]
)
def test_a_graph_that_leads_to_no_weight_is_refused(loss: Any) -> None:
    with pytest.raises(DataError, match="the loss of minibatch 0 has a graph that leads to no weight"):
        trained(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), 2, 2, loss=loss)
    with pytest.raises(TelltaleError, match="leads to no weight"):
        reference.train(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), Plan.even(2, 2), batch, optimizer=sgd, stop=2, loss=loss
        )
