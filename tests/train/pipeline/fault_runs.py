"""What the ranks do in the tests of faults: a small pipeline in which one rank kills itself, raises or sleeps."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from telltale.errors import TelltaleError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

TIMEOUT = 4.0
NAP = 13.0
STRAIGHT = Plan.even(3, 3)
REPLICATED = Plan.manual([[0, 1], [2]], replicas=[2, 1])


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    sys.exit(3)


def fail() -> None:
    raise ValueError("no such row")


def sleep() -> None:
    time.sleep(NAP)


def trainer_of(plan: Plan = STRAIGHT, **options: Any) -> PipelineTrainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = lambda named: torch.optim.SGD(named, lr=0.1)  # noqa: E731
    return PipelineTrainer(net, plan, optimizer=optimizer, loss=nn.functional.mse_loss, timeout=TIMEOUT, **options)


def in_batches(rank: int, culprit: int, deed: Callable[[], None], at: int, plan: Plan) -> None:
    """``culprit`` does ``deed`` when it is asked for minibatch ``at``; a second before, all have given a sign of life."""
    trainer = trainer_of(plan)

    def guilty(t: int) -> Any:
        if t == at and rank == culprit:
            time.sleep(1.2)
            deed()
        return batch(t)

    trainer.train(guilty, stop=12)


def with_nan(rank: int) -> None:
    """Minibatch 6 is not finite, on every rank."""
    trainer_of().train(lambda t: (batch(t)[0] * (float("nan") if t == 6 else 1.0), batch(t)[1]), stop=12)


def in_evaluation(rank: int) -> None:
    """Rank 1 dies in the second minibatch of an evaluation."""
    trainer = trainer_of()
    trainer.train(batch, stop=3)
    trainer.evaluate(lambda t: kill() if rank == 1 and t == 1 else batch(t), 4)


def in_losses(rank: int) -> None:
    """Rank 1 dies when the others exchange losses."""
    trainer = trainer_of()
    if rank == 1:
        trainer.groups.losses = lambda *_: kill()
    trainer.train(batch, stop=6)


def in_clipping(rank: int) -> None:
    """Rank 1 dies while the others wait for its gradient norms."""
    trainer = trainer_of(Plan.even(3, 3, policy="flush", microbatches=3), grad_clip=1.0)
    if rank == 1:
        trainer.exchange.start = lambda *_, **__: kill()
    trainer.train(batch, stop=6)


def at_construction(rank: int) -> None:
    """Rank 2 does not come."""
    if rank == 2:
        time.sleep(NAP)
    trainer_of().train(batch, stop=3)


def going_on(rank: int) -> tuple[list[str], list[float], float]:
    """Two trainers that stop by an error, which every rank catches, and a third in the same processes: the errors, the losses of
    the third, and the seconds that all took, with a time-out of a minute."""
    began, told = time.monotonic(), []

    def trainer(loss: Callable[[Tensor, Tensor], Any] = nn.functional.mse_loss) -> PipelineTrainer:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        sgd = lambda named: torch.optim.SGD(named, lr=0.1)  # noqa: E731
        return PipelineTrainer(net, Plan.manual([[0, 1], [2]]), optimizer=sgd, loss=loss, timeout=60)

    loader: Any = DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 8)), batch_size=4)
    for loss, batches in ((nn.functional.mse_loss, loader), (lambda o, y: float(o.detach().sum()), batch)):
        try:
            trainer(loss).train(batches, stop=6)
        except TelltaleError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told, trainer().train(batch, stop=3), time.monotonic() - began
