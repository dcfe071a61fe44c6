"""The processes of one training job: alone, or one of several that ``torchrun`` started (data parallel)."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from telltale.errors import ConfigError
from telltale.train.config import TrainConfig


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``world`` processes. Rank 0 (``main``) writes files."""

    rank: int
    world: int

    @classmethod
    def join(cls, config: TrainConfig) -> Ranks:
        """Join the job that ``torchrun`` describes in the environment; alone without one.

        Raises :class:`~telltale.errors.ConfigError` if the batch cannot be shared out evenly.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(0, 1)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        share = config.batch_size // config.gradient_accumulation
        if share % world:
            raise ConfigError(
                f"batch_size={config.batch_size} over gradient_accumulation={config.gradient_accumulation} cannot be "
                f"shared by {world} processes; expected a multiple of {world * config.gradient_accumulation}."
            )
        return cls(dist.get_rank(), world)

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradient averaging over the ranks."""
        return module if self.world == 1 else DistributedDataParallel(module)

    def reduction(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Gradients are averaged in the backward of the forward run in this block only if ``enabled``."""
        if enabled or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of the whole batch (rows, length)."""
        return batch if self.world == 1 else batch.chunk(self.world)[self.rank]

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the ranks."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.world
        return float(value)

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag: an interruption stops all of them after the same step."""
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag))
        dist.all_reduce(count)
        return bool(count.item() > 0)

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()
