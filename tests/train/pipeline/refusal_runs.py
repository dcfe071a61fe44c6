"""What ranks do in the tests of runs that must not train wrongly: one fault each, and what every rank says of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import TelltaleError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.torch_schedules import TorchPipelineTrainer
from telltale.train.pipeline.trainer import PipelineTrainer

ce = nn.functional.cross_entropy


def batch(t: int, seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + t)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


class Remembering(nn.Module):
    """Keeps a mean of what it saw in a buffer of its own, as a vector quantizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += x.mean(0)
        return x * self.scale


STRAIGHT = Plan.manual([[0, 1], [2]], policy="stash")
REPLICAS = Plan.manual([[0, 1, 2]], replicas=[2], policy="stash")


def faults(rank: int) -> dict[str, Callable[[], Any]]:
    """Name -> a run of two ranks with that fault."""

    def train(plan: Plan, batches: Callable[[int], Any], model: nn.Sequential | None = None, **settings: Any) -> Any:
        options: dict[str, Any] = {"optimizer": lambda named: torch.optim.SGD(named, lr=0.1), "loss": ce, "timeout": 8}
        stop = settings.pop("stop", 6)
        return PipelineTrainer(model or net(), plan, **options | settings).train(batches, stop=stop)

    return {
        "other data from minibatch 3 on": lambda: train(STRAIGHT, lambda t: batch(t, seed=rank if t >= 3 else 0)),
        "other sizes": lambda: train(STRAIGHT, lambda t: batch(t, rows=6 + rank)),
        "other labels": lambda: train(STRAIGHT, lambda t: (batch(t)[0], batch(t, seed=rank)[1])),
        "other ends": lambda: train(STRAIGHT, batch, stop=4 + rank),
        "a buffer that replicas move": lambda: train(
            REPLICAS, batch, nn.Sequential(Remembering(), nn.Linear(8, 8), nn.Linear(8, 5))
        ),
        "one replica's weights touched": lambda: train(
            REPLICAS, lambda t: _touching(t, rank), model=_TOUCHED.setdefault(rank, net())
        ),
        "a float": lambda: train(STRAIGHT, batch, loss=lambda o, y: float(ce(o, y))),
        "per-sample losses": lambda: train(STRAIGHT, batch, loss=lambda o, y: ce(o, y, reduction="none")),
        "a loss without graph": lambda: train(STRAIGHT, batch, loss=lambda o, y: ce(o.detach(), y)),
        "no label at all": lambda: train(
            Plan.manual([[0, 1], [2]], policy="flush", microbatches=2), lambda t: (batch(t)[0], torch.full((6,), -100))
        ),
        "L-BFGS": lambda: train(STRAIGHT, batch, optimizer=lambda named: torch.optim.LBFGS([p for _, p in named])),
        "synchronised batch norm": lambda: train(
            STRAIGHT, batch, nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 5))
        ),
        "other data on torch's schedule": lambda: TorchPipelineTrainer(
            net(),
            Plan.manual([[0, 1], [2]], policy="gpipe", microbatches=2),
            optimizer=lambda named: torch.optim.SGD(named, lr=0.1),
            loss=ce,
            timeout=8,
        ).train(lambda t: batch(t, seed=rank), stop=4),
    }


_TOUCHED: dict[int, nn.Sequential] = {}


def _touching(t: int, rank: int) -> tuple[Tensor, Tensor]:
    """A user's own code that acts on one rank alone."""
    if rank == 1 and t == 3:
        with torch.no_grad():
            _TOUCHED[rank][2].bias.add_(1e-7 + 1.0)
    return batch(t)


def refused(rank: int, name: str) -> tuple[str, float]:
    """What this rank says, and after how many seconds."""
    began = time.monotonic()
    try:
        faults(rank)[name]()
    except TelltaleError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "it trained", time.monotonic() - began


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x].mean(1)


class Unembed(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def tied_from_other_seeds(rank: int, kind: str) -> Tensor:
    """The tied weight of this rank after training from a seed of its own."""
    torch.manual_seed(rank)
    first = Embed()
    model = nn.Sequential(first, nn.Linear(16, 16), Unembed(first.weight))
    options: dict[str, Any] = {"optimizer": lambda named: torch.optim.SGD(named, lr=0.05), "loss": ce, "timeout": 20}
    plan = Plan.manual([[0, 1], [2]], policy=kind, microbatches=2)

    def tokens(t: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(t)
        return torch.randint(0, 11, (6, 4), generator=generator), torch.randint(0, 11, (6,), generator=generator)

    trainer = (TorchPipelineTrainer if kind == "gpipe" else PipelineTrainer)(model, plan, **options)
    trainer.train(tokens, stop=8)
    return first.weight.detach().clone()
