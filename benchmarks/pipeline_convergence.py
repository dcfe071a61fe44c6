"""What weight staleness does to training: every policy's exact delayed updates in one process, over optimizers and seeds.

Two tasks: scikit-learn's digits with an 8-layer perceptron, one layer per stage, and a character-level transformer of 8 blocks
on Python's standard library. Nothing here is timed; it may run beside other work.

    python benchmarks/pipeline_convergence.py [--seeds 5] [--characters-seeds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from measurement import write_result
from telltale.errors import NumericalError
from telltale.train.pipeline import reference
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.optimizer import delay_aware_nadam

POLICIES = {
    "sync": ("flush", 1),
    "stash": ("stash", 1),
    "none": ("none", 1),
    "vertical": ("vertical", 1),
    "2bw": ("2bw", 8),
    "sync m=8": ("flush", 8),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD 0.1": lambda named: torch.optim.SGD(named, lr=0.1),
    "SGD 0.03": lambda named: torch.optim.SGD(named, lr=0.03),
    "SGD 0.01, momentum 0.9": lambda named: torch.optim.SGD(named, lr=0.01, momentum=0.9),
    "SGD 0.03, momentum 0.9": lambda named: torch.optim.SGD(named, lr=0.03, momentum=0.9),
    "AdamW 3e-3": lambda named: torch.optim.AdamW(named, lr=3e-3),
    "NAdam 3e-3, beta1 0.99": delay_aware_nadam(3e-3),
}
BATCH, EPOCHS = 16, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--characters-seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = [
        _row("digits", 8, optimizer, policy, options.seeds, _digits_run)
        for optimizer in OPTIMIZERS
        for policy in POLICIES
    ]
    digits += [_row("digits", 4, "SGD 0.1", policy, options.seeds, _digits_run) for policy in POLICIES]
    characters = [
        _row("characters", 8, optimizer, policy, options.characters_seeds, _characters_run)
        for optimizer in ("SGD 0.1", "AdamW 3e-3", "NAdam 3e-3, beta1 0.99")
        for policy in POLICIES
    ]
    write_result(
        "pipeline_convergence",
        compute="one process, exact delayed updates (telltale.train.pipeline.reference)",
        digits={"batch": BATCH, "epochs": EPOCHS, "rows": digits},
        characters={"minibatches": MINIBATCHES, "rows": characters},
    )


def _row(task: str, stages: int, optimizer: str, policy: str, seeds: int, run: Callable[..., Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; a diverged run counts as its chance-level metric and is counted."""
    name, microbatches = POLICIES[policy]
    outcomes = [run(stages, OPTIMIZERS[optimizer], name, microbatches, seed) for seed in range(seeds)]
    finite = [(metric, loss) for metric, loss in outcomes if math.isfinite(loss)]
    row = {
        "task": task,
        "stages": stages,
        "optimizer": optimizer,
        "policy": policy,
        "diverged": len(outcomes) - len(finite),
        "seeds": seeds,
        "metric": [round(metric, 4) for metric, _ in outcomes],
        "metric_mean": _mean([metric for metric, _ in finite]),
        "metric_sd": _spread([metric for metric, _ in finite]),
        "final_loss_mean": _mean([loss for _, loss in finite]),
    }
    print(task, stages, optimizer, policy, row["metric_mean"], row["final_loss_mean"], f"diverged {row['diverged']}")
    return row


def _digits_run(stages: int, optimizer: Any, policy: str, microbatches: int, seed: int) -> tuple[float, float]:
    """(test accuracy, mean training loss of the last epoch)."""
    inputs, targets, test_inputs, test_targets = _digits()
    torch.manual_seed(seed)
    widths = [64, *[128] * 7, 10]
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    net = nn.Sequential(*[nn.Sequential(layer, nn.ReLU()) for layer in layers[:-1]], layers[-1])
    per_epoch = len(inputs) // BATCH
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(inputs), generator=generator) for _ in range(EPOCHS)]

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = divmod(minibatch, per_epoch)
        rows = orders[epoch][index * BATCH : (index + 1) * BATCH]
        return inputs[rows], targets[rows]

    stop = per_epoch * EPOCHS // 8 * 8
    plan = Plan.even(8, stages, policy=policy, microbatches=microbatches)
    try:
        losses = reference.train(
            net, plan, batch, optimizer=optimizer, stop=stop, loss=nn.functional.cross_entropy, seed=seed
        ).losses
    except NumericalError:
        return math.nan, math.nan
    with torch.no_grad():
        accuracy = (net(test_inputs).argmax(1) == test_targets).float().mean().item()
    return accuracy, statistics.fmean(losses[-per_epoch:])


_DIGITS: list[torch.Tensor] = []


def _digits() -> list[torch.Tensor]:
    if not _DIGITS:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
        labels = torch.tensor(data.target)[order]
        _DIGITS.extend([images[:1437], labels[:1437], images[1437:], labels[1437:]])
    return _DIGITS


MINIBATCHES, CONTEXT, WIDTH, ROWS = 320, 64, 64, 16


class _Block(nn.Module):
    """Pre-norm causal transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, _ = hidden.shape
        parts = self.mix(self.norm_1(hidden)).view(rows, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return hidden + self.feed(self.norm_2(hidden))


class _Embedding(nn.Module):
    """Characters and positions to vectors, and the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.block = _Block()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.characters(ids) + self.positions(torch.arange(ids.shape[1])))


def _characters_run(stages: int, optimizer: Any, policy: str, microbatches: int, seed: int) -> tuple[float, float]:
    """(held-out nats per character, mean training loss of the last 40 minibatches)."""
    text = _text()
    torch.manual_seed(seed)
    head = nn.Sequential(_Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))
    net = nn.Sequential(_Embedding(), *[_Block() for _ in range(6)], head)
    train, held_out = text[:-40_000], text[-40_000:]

    def cut(source: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        windows = source[starts[:, None] + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 100_003 + minibatch)
        return cut(train, torch.randint(len(train) - CONTEXT - 1, (ROWS,), generator=generator))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    plan = Plan.even(8, stages, policy=policy, microbatches=microbatches)
    try:
        losses = reference.train(
            sequential(net, loss), plan, batch, optimizer=optimizer, stop=MINIBATCHES, seed=seed
        ).losses
    except NumericalError:
        return math.nan, math.nan
    with torch.no_grad():
        inputs, targets = cut(held_out, torch.arange(0, 39_000, 130))
        nats = loss(net(inputs), targets).item()
    return nats, statistics.fmean(losses[-40:])


def _text() -> torch.Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "json"
    names = sorted(folder.glob("*.py")) + sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    raw = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in names)
    return torch.tensor([ord(character) for character in raw if ord(character) < 128])


def _mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None


def _spread(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


if __name__ == "__main__":
    main()
