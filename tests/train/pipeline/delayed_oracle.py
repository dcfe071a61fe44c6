"""PipeDream's delayed updates written from the papers, in torch alone: nothing of the package is imported here.

Minibatch t reads at stage s the version (number of updates of that stage) of section 3.3 of arXiv 1806.03377 and of arXiv
2006.09503; one graph goes through all stages, which are never cut apart; gradients of a replica's minibatches are summed in their
order, then those of the replicas. Every layer draws its dropout from (seed, layer, minibatch).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def versions(policy: str, replicas: Sequence[int], m: int, stage: int, t: int) -> int:
    """The version that minibatch ``t`` reads at ``stage``."""
    ahead = [(sum(replicas) - 1 - sum(replicas[:s])) // r for s, r in enumerate(replicas)]
    if policy == "stash":
        return max(0, t // replicas[stage] - ahead[stage])
    if policy == "2bw":
        return max(0, t // m - 1)
    if policy == "vertical":
        return max(0, t // m - max(math.ceil(r * w / m) for r, w in zip(replicas, ahead, strict=True)))
    assert policy in ("flush", "gpipe")
    return t // m


def train(
    net: nn.Sequential,
    stages: Sequence[Sequence[int]],
    replicas: Sequence[int],
    policy: str,
    m: int,
    *,
    optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    stop: int,
    seed: int = 0,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the minibatches [0, stop) and the weights afterwards; all minibatches must have as many rows."""
    m = math.lcm(*replicas) if policy == "vertical" else m
    own = [
        [
            (name, nn.Parameter(p.detach().clone()))
            for name, p in net.named_parameters()
            if int(name.split(".")[0]) in stage
        ]
        for stage in stages
    ]
    steppers = [optimizer(named) for named in own]
    if policy == "stash":
        for stepper, count in zip(steppers, replicas, strict=True):
            for group in stepper.param_groups:
                group["lr"] *= count / replicas[0]
    history: list[list[dict[str, Tensor]]] = [[_values(named)] for named in own]
    sums: list[dict[int, dict[str, Tensor]]] = [{} for _ in stages]
    losses = []
    for t in range(stop):
        leaves = [
            {
                name: value.clone().requires_grad_()
                for name, value in history[s][versions(policy, replicas, m, s, t)].items()
            }
            for s in range(len(stages))
        ]
        inputs, targets = batch(t)
        result = loss(_run(net, stages, leaves, inputs, seed, t), targets)
        losses.append(result.item())
        batch_end = min((t // m + 1) * m, stop)
        share = 1.0 if policy == "stash" else 1.0 / (batch_end - t // m * m)
        result.backward(torch.full_like(result, share))
        for s, count in enumerate(replicas):
            into = sums[s].setdefault(t % count, {})
            for name, leaf in leaves[s].items():
                into[name] = leaf.grad if name not in into else into[name] + leaf.grad
            size = count if policy == "stash" else m
            if (t + 1) % size == 0 or t + 1 == stop:
                _step(own[s], steppers[s], sums[s], count, t % count + 1 if policy == "stash" else None)
                sums[s] = {}
                history[s].append(_values(own[s]))
    return losses, {name: p.detach() for named in own for name, p in named}


def _run(net: Any, stages: Any, leaves: Any, values: Tensor, seed: int, t: int) -> Tensor:
    for stage, own in zip(stages, leaves, strict=True):
        for index in stage:
            prefix = f"{index}."
            torch.manual_seed(
                int.from_bytes(hashlib.blake2b(f"{seed}/{index}/{t}".encode(), digest_size=4).digest(), "little")
            )
            mine = {name.removeprefix(prefix): leaf for name, leaf in own.items() if name.startswith(prefix)}
            values = functional_call(net[index], mine, (values,))
    return values


def _step(named: Any, stepper: Any, sums: Any, replicas: int, present: int | None) -> None:
    """``present``: how many replicas had a minibatch in the round, over which the mean is taken; None: scaled already."""
    for name, parameter in named:
        parts = [sums.get(r, {}).get(name, torch.zeros_like(parameter)) for r in range(replicas)]
        if present is not None and replicas > 1:
            parts = [part * (1.0 / present) if r < present else part * 0.0 for r, part in enumerate(parts)]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        parameter.grad = total
    stepper.step()


def _values(named: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named}
