"""Modules of strangers: what torch's own loop does with them is done, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from telltale.errors import DataError, PlanError, TelltaleError, UnsupportedModelError
from telltale.train.pipeline import PipelineTrainer, Plan, reference
from telltale.train.pipeline.layers import as_layered, terms_of
from telltale.train.pipeline.runtime.collectives import _misfit
from telltale.train.pipeline.runtime.norm_statistics import NormStatistics
from telltale.train.pipeline.runtime.worker import Batches

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


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=0),
        partial(ce, ignore_index=0),
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0, 1.0, 5.0, 0.5]), label_smoothing=0.1),
    ],
    ids=["module", "partial", "class weights"],
)
def test_a_mean_is_over_the_terms_that_the_loss_counts(loss: Any) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def uneven(t: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batch(t)
        targets[1 : 1 + 4 * t] = 0
        return inputs, targets

    ours, plain = seeded(make), seeded(make)
    plan = Plan.even(3, 2, policy="flush", microbatches=2)
    reference.train(ours, plan, uneven, optimizer=sgd, stop=2, loss=loss)
    inputs, targets = zip(uneven(0), uneven(1), strict=True)
    optimizer = sgd(plain.parameters())
    loss(plain(torch.cat(inputs)), torch.cat(targets)).backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("required", [True, False])
def test_an_optimizer_that_cannot_step_without_a_closure_is_refused(required: bool) -> None:
    class Twice(torch.optim.Optimizer):
        """Sharpness-aware minimisation asks for the loss again, by whatever name."""

        if required:

            def step(self, compute_loss):  # type: ignore[no-untyped-def, override]
                return compute_loss()
        else:

            def step(self, closure=None):  # type: ignore[no-untyped-def, override]
                assert closure is not None, "Twice requires a closure"
                return closure()

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    with pytest.raises(PlanError, match=r"Twice\.step needs a closure"):
        reference.train(
            net, Plan.even(2, 1), batch, optimizer=lambda n: Twice([p for _, p in n], {"lr": 0.1}), stop=2, loss=ce
        )


def test_a_model_in_channels_last_is_exported(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(16, 5)).to(
        memory_format=torch.channels_last
    )
    trainer = PipelineTrainer(net, Plan.even(3, 1), optimizer=sgd, loss=ce)
    trainer.train(lambda t: (batch(t)[0].view(6, 2, 2, 2), batch(t)[1]), stop=2)
    trainer.export(tmp_path / "whole.safetensors")
    assert torch.equal(load_file(tmp_path / "whole.safetensors")["0.weight"], net[0].weight)


def test_a_norm_that_stages_share_is_refused() -> None:
    norm = nn.BatchNorm1d(8, affine=False)
    net = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, 5))
    words = "1 runs on the stages 0 and 1, and its running statistics cannot be on both"
    assert words in (_misfit(as_layered(net, ce), Plan.even(5, 2), 1, 1) or "")
    assert _misfit(as_layered(net, ce), Plan.even(5, 1), 1, 1) is None


def test_replicas_do_not_note_what_an_instance_norm_does_not_count() -> None:
    assert NormStatistics.where_needed(nn.InstanceNorm1d(8, track_running_stats=True), 2) is None
    assert NormStatistics.where_needed(nn.BatchNorm1d(8), 2) is not None


@pytest.mark.parametrize("targets", [3, "three", [1, 2, 3], np.arange(3)])
def test_what_is_no_tensor_is_in_the_digest(targets: Any) -> None:
    def digest(value: Any) -> int:
        return Batches([(torch.ones(3), value)], terms_of).digest(0)

    assert digest(targets) == digest(targets)
    assert digest(targets) != digest([4, 2, 3] if isinstance(targets, list) else targets * 2)
