"""What the ranks do in the tests of bad input: build trainers that must be refused, and run into one error each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import TelltaleError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

TIMEOUT = 10.0
mse = nn.functional.mse_loss


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)


class Narrowing(nn.Module):
    """Hands on one column less from its fourth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)[:, : 8 if self.calls < 4 else 7]


class Listing(nn.Module):
    """Hands on a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x)]


class Crowd(nn.Module):
    """Hands on 17 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x),) * 17


def net(first: Callable[[], nn.Module] = lambda: nn.Linear(8, 8)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first(), nn.LayerNorm(8), nn.Linear(8, 8))


def sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1)


CUT = Plan.manual([[0, 1], [2]])


def trainer_of(**options: Any) -> PipelineTrainer:
    settings: dict[str, Any] = {"model": net(), "plan": CUT, "optimizer": sgd, "loss": mse, "timeout": TIMEOUT}
    return PipelineTrainer(**(settings | options))


REFUSED: dict[str, Callable[[int], dict[str, Any]]] = {
    "world": lambda rank: {"plan": Plan.even(3, 3)},
    "fingerprint": lambda rank: {"plan": Plan.even(3, 2, fingerprint="0123456789abcdef")},
    "layers": lambda rank: {"plan": Plan.manual([[0, 1], [2, 3]])},
    "different cuts": lambda rank: {"plan": Plan.manual([[0], [1, 2]] if rank else [[0, 1], [2]])},
    "different policies": lambda rank: {"plan": Plan.even(3, 2, policy="stash" if rank else "vertical")},
    "different models": lambda rank: {"model": net() if rank else net(Narrowing)},
    "different clipping": lambda rank: {"plan": Plan.even(3, 2, policy="vertical"), "grad_clip": 1.0 if rank else None},
    "few microbatches": lambda rank: {
        "plan": Plan.manual([[0, 1], [2]], replicas=[1, 3], policy="2bw", microbatches=2)
    },
    "interleaved": lambda rank: {"plan": Plan.even(3, 2, policy="interleaved")},
    "no loss": lambda rank: {"loss": None},
    "a module": lambda rank: {"model": nn.Linear(8, 8)},
    "prefetch": lambda rank: {"prefetch": -1},
    "prefetch type": lambda rank: {"prefetch": 1.5},
    "timeout": lambda rank: {"timeout": 0.0},
    "clip": lambda rank: {"grad_clip": -1.0},
    "reduction": lambda rank: {"reduction": "mean"},
}


def refused(rank: int) -> dict[str, str]:
    """Words of the error of each trainer that must not come to be."""
    told = {}
    for name, options in REFUSED.items():
        try:
            trainer_of(**options(rank))
            told[name] = "accepted"
        except TelltaleError as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def until_it_fails(rank: int, name: str) -> None:
    """Runs ``FAILING[name]``; its error ends the rank."""
    FAILING[name](rank)


def _nan(rank: int) -> None:
    trainer_of(
        loss=lambda y, target: mse(y, target) * (float("nan") if target[0, 0] == batch(5)[1][0, 0] else 1)
    ).train(batch, stop=9)


def _bad_factory(rank: int) -> None:
    def factory(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if rank == 1:
            raise ValueError("lr may not be a Tuesday")
        return sgd(named)

    trainer_of(optimizer=factory).train(batch, stop=4)


def _inside_a_round(rank: int) -> None:
    trainer = trainer_of(plan=Plan.manual([[0, 1], [2]], policy="flush", microbatches=4))
    trainer.train(batch, stop=6)
    trainer.train(batch, stop=12)


def _backwards(rank: int) -> None:
    trainer = trainer_of()
    trainer.train(batch, stop=4)
    trainer.train(batch, stop=2)


FAILING: dict[str, Callable[[int], Any]] = {
    "nan": _nan,
    "not scalar": lambda rank: trainer_of(loss=lambda y, target: (y - target).square().mean(1)).train(batch, stop=4),
    "narrowing": lambda rank: trainer_of(model=net(Narrowing), plan=Plan.manual([[0], [1, 2]])).train(batch, stop=9),
    "list": lambda rank: trainer_of(model=net(Listing)).train(batch, stop=4),
    "crowd": lambda rank: trainer_of(model=net(Crowd), plan=Plan.manual([[0], [1, 2]])).train(batch, stop=4),
    "short": lambda rank: trainer_of().train([batch(t) for t in range(3)], stop=5),
    "no pair": lambda rank: trainer_of().train(lambda t: batch(t)[0], stop=5),
    "batches type": lambda rank: trainer_of().train(7, stop=5),  # type: ignore[arg-type]
    "stop type": lambda rank: trainer_of().train(batch, stop=2.5),  # type: ignore[arg-type]
    "no optimizer": lambda rank: trainer_of(optimizer=lambda named: None).train(batch, stop=4),
    "factory": _bad_factory,
    "inside a round": _inside_a_round,
    "backwards": _backwards,
    "evaluate nothing": lambda rank: trainer_of().evaluate(batch, 0),
}
