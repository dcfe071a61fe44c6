"""Bradley-Terry training that everything here shares: minus log sigmoid of the margin, early stop on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.align.judge.gating import GateConfig
from telltale.errors import NumericalError

FASTER = 10.0

Margins = Callable[[Tensor], Tensor]
"""Rows (m,) of the data -> score of the chosen response less that of the rejected one, (m,)."""


@dataclass(frozen=True)
class PairFit:
    """How one training went. Losses in nats per pair, accuracies of pairs with equal scores counted as one half."""

    steps: int
    best_step: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    curve: tuple[tuple[int, float], ...]
    """(step, held-out loss)."""


def bradley_terry(margins: Tensor) -> Tensor:
    """Mean of -ln sigma(margin): ln 2 when all scores tie."""
    return functional.softplus(-margins).mean()


def accuracy(margins: Tensor) -> float:
    """Share of pairs in the right order; ties count one half."""
    return float((margins > 0).double().mean() + 0.5 * (margins == 0).double().mean())


def train_pairs(
    margins: Margins,
    parameters: Sequence[nn.Parameter],
    train: Tensor,
    held_out: Tensor,
    config: GateConfig,
    *,
    seed: int,
    modules: Sequence[nn.Module] = (),
    faster: Sequence[nn.Parameter] = (),
    on_step: Callable[[int], None] | None = None,
) -> PairFit:
    """AdamW with a cosine to zero on rows ``train``; parameters end as they were at the best loss on rows ``held_out``.

    ``modules`` are in train mode for steps and in eval mode for evaluations; ``faster`` parameters learn ten times as fast. Raises
    :class:`~telltale.errors.NumericalError` for a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    quick = {id(parameter) for parameter in faster}
    groups = [
        {"params": [p for p in parameters if id(p) not in quick], "times": 1.0, "weight_decay": config.weight_decay},
        {"params": list(faster), "times": FASTER, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
    best, best_step, kept, curve = math.inf, 0, [p.detach().clone() for p in parameters], []
    order, place, step = train[torch.randperm(len(train), generator=generator)], 0, 0
    while True:
        if step % config.evaluate_every == 0 or step == config.steps:
            loss = _evaluated(margins, held_out, modules)[0]
            curve.append((step, loss))
            if loss < best - 1e-7:
                best, best_step, kept = loss, step, [p.detach().clone() for p in parameters]
            elif step - best_step >= config.patience * config.evaluate_every:
                break
        if step == config.steps:
            break
        if place >= len(order):
            order, place = train[torch.randperm(len(train), generator=generator)], 0
        rows = order[place : place + config.batch_size]
        place += config.batch_size
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        loss_tensor = bradley_terry(margins(rows))
        if not bool(torch.isfinite(loss_tensor)):
            raise NumericalError(
                f"the pair loss is {float(loss_tensor)} at step {step}; lower learning_rate or check the rewards."
            )
        optimizer.zero_grad(set_to_none=True)
        loss_tensor.backward()
        optimizer.step()
        step += 1
        if on_step is not None:
            on_step(step)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    train_loss, train_accuracy = _evaluated(margins, train, modules)
    held_loss, held_accuracy = _evaluated(margins, held_out, modules)
    return PairFit(step, best_step, train_loss, train_accuracy, held_loss, held_accuracy, tuple(curve))


@torch.no_grad()
def _evaluated(margins: Margins, rows: Tensor, modules: Sequence[nn.Module]) -> tuple[float, float]:
    states = [module.training for module in modules]
    for module in modules:
        module.eval()
    found = margins(rows)
    for module, state in zip(modules, states, strict=True):
        module.train(state)
    return float(bradley_terry(found)), accuracy(found)
