"""Small models with everything that a wrong implementation gets wrong: layer norm, convolution, dropout, ties, frozen parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from telltale.train.pipeline.runtime.collectives import untie

loss = nn.CrossEntropyLoss()

OPTIMIZERS: dict[str, Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda named: torch.optim.AdamW(named, lr=0.01),
}


class Convolution(nn.Module):
    """16 features -> 16 features through a convolution over them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(1, 4, 3, padding=1)
        self.out = nn.Linear(4 * 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.kernel(x[:, None])).flatten(1))


class Checkpointed(nn.Module):
    """A block whose activations the user's own code recomputes in the backward; ``x * gain`` reads its weight again there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.full((16,), 1.25))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._block, x, use_reentrant=False)

    def _block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * self.gain)


class Fork(nn.Module):
    """One value -> (features, integer codes, features that skip ahead)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.project(x)
        return hidden, hidden.detach().argmax(dim=1), hidden * 2


class Through(nn.Module):
    """Works on the first value and passes the integer codes and the skipping features on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, codes: Tensor, skip: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(self.mix(self.norm(x))), codes, skip


class Join(nn.Module):
    """Brings the three values together; the table is indexed by the integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, codes: Tensor, skip: Tensor) -> Tensor:
        return self.out(x + self.table(codes) + skip)


class Idle(nn.Module):
    """Has one parameter that no output depends on, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.used


def mixed() -> nn.Sequential:
    """LayerNorm, convolution and dropout in eight layers."""
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        Convolution(),
        nn.Dropout(0.2),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    )


def frozen() -> nn.Sequential:
    """The middle two layers of ``mixed``'s second half, and its first two, have nothing to train."""
    net = mixed()
    for index in (0, 1, 5, 6):
        net[index].requires_grad_(False)
    return net


def tied(*, apart: bool = False) -> nn.Sequential:
    """The first and the last layer share a weight (``apart``: did)."""
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8))
    net[5].weight = net[0].weight
    if apart:
        untie(net)
    return net


def tied_thrice() -> nn.Sequential:
    """Three layers share a weight."""
    net = tied()
    net[3].weight = net[0].weight
    return net


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "mixed": mixed,
    "frozen": frozen,
    "tied": tied,
    "tied-thrice": tied_thrice,
    "untied": lambda: tied(apart=True),
    "several": lambda: nn.Sequential(Fork(), Through(), Through(), Through(), Join()),
    "checkpointed": lambda: nn.Sequential(
        nn.Linear(8, 16),
        Checkpointed(nn.LayerNorm(16)),
        Checkpointed(nn.Dropout(0.3)),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    ),
    "idle": lambda: nn.Sequential(nn.Linear(8, 16), Idle(), Idle(), nn.Linear(16, 4)),
}


def build(name: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return MODELS[name]()


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def uneven_batch(t: int) -> tuple[Tensor, Tensor]:
    inputs, targets = batch(t)
    return inputs[: 3 + t * t % 4], targets[: 3 + t * t % 4]


BATCHES = {"even": batch, "uneven": uneven_batch}


def warm(minibatch: int) -> float:
    return min(1.0, (minibatch + 1) / 10)
