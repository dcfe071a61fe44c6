"""Train your own nn.Module as a pipeline: profile it, plan for two workers, train under torchrun, export.

torchrun --standalone --nproc-per-node 2 examples/pipeline_own_module.py runs/own
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telltale.train.pipeline import PipelineTrainer, Plan, Topology, plan, profile, split

MINIBATCHES = 60


class Mixer(nn.Module):
    """Any module with a forward of tensors: torch.export reads its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(6))
        self.leave = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def batch_at(minibatch: int) -> tuple[Tensor, Tensor]:
    """Every rank asks for the same minibatch by its number."""
    generator = torch.Generator().manual_seed(minibatch)
    x = torch.randn(32, 16, generator=generator)
    return x, x[:, :4].argmax(dim=1)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layered = split(Mixer(), loss=nn.functional.cross_entropy, example=batch_at(0))
    told: list[Plan | None] = [None]
    if rank == 0:
        measured = profile(layered, batch_at(0))
        told = [plan(measured, Topology.flat(world, bandwidth="1GB/s"), policy="stash")]
        if len(told[0].stages) == 1:
            told = [Plan.even(len(layered.layers), world, policy="stash")]  # tiny layers: show a pipeline all the same
        print(f"plan {told[0].describe()}, stages of {[len(stage.layers) for stage in told[0].stages]} layers")
    dist.broadcast_object_list(told, src=0)
    trainer = PipelineTrainer(
        layered, told[0], optimizer=lambda named: torch.optim.NAdam(named, lr=3e-3, betas=(0.99, 0.999))
    )
    losses = trainer.fit(batch_at, stop=MINIBATCHES, directory=folder, save_every=20)
    trainer.export(f"{folder}/model.safetensors")
    if rank == 0 and losses:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the whole model is in {folder}/model.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
