"""What the ranks do in the tests of torch's schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import NumericalError, PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.torch_schedules import TorchPipelineTrainer

STOP = 12
CASES: dict[str, dict[str, Any]] = {
    "flush": {"plan": Plan.even(8, 2, policy="flush", microbatches=4)},
    "gpipe": {"plan": Plan.even(8, 2, policy="gpipe", microbatches=3)},
    "interleaved": {"plan": Plan.even(8, 4, policy="interleaved", microbatches=4, chunks=2)},
    "zero bubble": {"plan": Plan.even(8, 4, policy="interleaved", microbatches=4, chunks=2), "zero_bubble": True},
    "flush clipped": {"plan": Plan.even(8, 2, policy="flush", microbatches=4), "grad_clip": 0.1},
    "flush tied": {"plan": Plan.even(8, 2, policy="flush", microbatches=2), "grad_clip": 0.1, "tied": True},
    "interleaved tied": {"plan": Plan.even(8, 4, policy="interleaved", microbatches=2, chunks=2), "tied": True},
}


loss = nn.CrossEntropyLoss()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x[:, None]).mean(1)


def model(*, tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        Convolution(),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    if tied:
        net[7].weight = net[0].weight
    return net


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(6, 8, generator=generator), torch.randint(8, (6,), generator=generator)


def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=0.01)


def rate(minibatch: int) -> float:
    return 1.0 / (1 + minibatch)


def run(rank: int) -> dict[str, Any]:
    """Per case: losses, and this rank's parameters and buffers by name."""
    found: dict[str, Any] = {}
    for name, options in CASES.items():
        settings = {key: value for key, value in options.items() if key != "tied"}
        net = model(tied=options.get("tied", False))
        trainer = TorchPipelineTrainer(
            net, settings.pop("plan"), optimizer=optimizer, loss=loss, schedule=rate, timeout=30, **settings
        )
        losses = trainer.train(batch, stop=4 if "gpipe" not in name else 6) + trainer.train(batch, stop=STOP)
        state = {n: p.detach() for chunk in trainer.stages for n, p in _named(net, chunk.stage).items()}
        found[name] = (losses, {n: value.clone() for n, value in state.items()})
    found["inside a batch"] = refusal(lambda: trainer.train(batch, stop=STOP + 1))
    found["nan"] = refusal(lambda: trainer.train(lambda t: (batch(t)[0] * float("nan"), batch(t)[1]), stop=STOP + 2))
    found["too many processes"] = refusal(
        lambda: TorchPipelineTrainer(model(), Plan.even(8, 4, policy="gpipe"), optimizer=optimizer, loss=loss)
    )
    return found


def _named(net: nn.Module, stage: nn.Module) -> dict[str, Tensor]:
    own = {id(t) for t in (*stage.parameters(), *stage.buffers())}
    return {name: t for name, t in net.state_dict(keep_vars=True).items() if id(t) in own}


def refusal(call: Any) -> str:
    try:
        call()
    except (PlanError, NumericalError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"
