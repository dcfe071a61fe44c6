"""What the processes of a data-parallel test do: train once without a monitor and once with one on the first process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from telltale.train.sharpness.monitor import SharpnessMonitor


def compare(rank: int, port: int, file: str) -> None:
    """Leaves in ``file`` what the first process ended with, without and with a monitor."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ends = [trained(rank, watched) for watched in (False, True)]
    if rank == 0:
        torch.save(ends, file)
    dist.destroy_process_group()


def trained(rank: int, watched: bool) -> list[Tensor]:
    """Accumulation without synchronisation, clipping, a schedule."""
    generator = torch.Generator().manual_seed(rank)
    data = torch.randn(24, 4, generator=generator), torch.randn(24, 1, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    torch.manual_seed(5 + rank)
    monitor = None
    if watched and rank == 0:
        probe = [tuple(part[:8] for part in data)]
        monitor = SharpnessMonitor(
            parallel, loss_of, probe, optimizer=optimizer, every=2, budget=1.0, sd_every=5, sd_runs=1, sd_steps=3
        )
    for step in range(10):
        optimizer.zero_grad()
        with parallel.no_sync():
            loss_of(parallel, [part[:4] for part in data]).backward()
        loss_of(parallel, [part[2 * step : 2 * step + 4] for part in data]).backward()
        nn.utils.clip_grad_norm_(parallel.parameters(), 0.5)
        optimizer.step()
        if monitor is not None:
            monitor.step()
        schedule.step()
    if monitor is not None:
        assert (len(monitor.readings), len(monitor.dimensions)) == (6, 1)
    return [*model.state_dict().values(), torch.get_rng_state()]


def loss_of(model: nn.Module, rows: Any) -> Tensor:
    return functional.mse_loss(model(rows[0]), rows[1])
