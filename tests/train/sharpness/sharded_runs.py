"""What the processes of a sharded test do: train under FSDP2 with and without the forward-only channel."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from telltale.train.sharpness.critical_step import CriticalStep

STEPS = 8


def compare(rank: int, port: int, file: str) -> None:
    """Leaves in ``file`` what the first process ended with, without and with the channel, and its readings."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in ("adamw", "signs"):
        (plain, _), (watched, ratios) = trained(rank, kind, False), trained(rank, kind, True)
        same = all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
        found[kind] = {"same": same, "ratios": ratios, "weights": watched}
    torch.save(found, f"{file}.{rank}")
    dist.destroy_process_group()


def network(kind: str) -> nn.Sequential:
    """Sizes that two processes do not share evenly; dropout where its draws are what is asked about."""
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(13, 13), nn.Dropout(0.2 if kind == "signs" else 0.0))
    first = nn.Sequential(nn.Linear(6, 13), nn.LayerNorm(13))
    return nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), nn.Linear(13, 3))


def data(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(rows[0]), rows[1])


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02) if kind == "adamw" else Signs(model.parameters())


class Signs(torch.optim.Optimizer):
    """An optimizer that nobody's table has."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())


def trained(rank: int, kind: str, watched: bool) -> tuple[list[Tensor], list[float]]:
    model = network(kind)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, rows = optimizer_of(kind, model), data(rank)
    channel = CriticalStep(model, loss_of, [rows], optimizer=optimizer) if watched else None
    torch.manual_seed(5 + rank)
    ratios = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if channel is not None:
            channel.before()
        optimizer.step()
        if channel is not None and step % 4 == 3:
            ratios.append(channel.after().ratio)
    whole = [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[attr-defined]
    return [*whole, torch.get_rng_state()], ratios
