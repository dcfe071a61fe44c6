"""A stranger under the certificate: a world model built, fed and trained by TorchRL's own code, on Pendulum-v1.

TorchRL's ``GymEnv`` and ``Collector`` gather 5,000 random steps, its ``ReplayBuffer`` serves them, and ``WorldModelLoss``
trains a ``WorldModel`` made of its ``MLP``: an encoder that passes the observation on, dynamics that write the next
latent, and a reward head that reads the next latent, as its documentation has it. The second model differs in one
thing: its dynamics add their output to the latent. Both are stepped through ``FromTorchRL`` and certified for level 2;
the planner is given the known reward. One record per arm in ``runs/world_torchrl.jsonl``, which is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchrl
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import GymEnv
from torchrl.modules import MLP, WorldModel
from torchrl.objectives import WorldModelLoss

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.failures import failures
from telltale.world.models.torchrl_adapter import FromTorchRL

RECORDS = Path("runs/world_torchrl.jsonl")
STEPS, BATCH = 5000, 256
ARMS = ("next state", "change of state")


class Added(torch.nn.Module):
    """The latent plus what TorchRL's MLP makes of it and the action."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return latent + self.network(latent, action)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--episodes", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = world.make("physical/Pendulum-v1")
    records = JsonLines(RECORDS)
    done = {record["arm"] for record in records}
    for arm in ARMS:
        if arm in done:
            continue
        model, training = train(arm, arguments.updates)
        adapted = FromTorchRL(model.step_module, observation="latent")
        found = world.certify(adapted, place, 2, episodes=arguments.episodes, horizon=20, seed=0)
        assert found.evaluation is not None
        labels = [failure.label for failure in failures(found, adapted, place)]
        returns = found.evaluation.returns
        record = {
            "arm": arm,
            **found.summary(),
            "return_mean": sum(returns) / len(returns),
            "failures": dict(Counter(labels)),
            **training,
        }
        records.append(record)
        print(record, flush=True)
    write_result("world_torchrl", torchrl=torchrl.__version__, steps=STEPS, batch=BATCH, updates=arguments.updates,
                 runs=list(records))  # fmt: skip


def train(output: str, updates: int) -> tuple[WorldModel, dict[str, Any]]:
    """A world model trained by TorchRL's loss on TorchRL's replay buffer; the losses of the last 100 updates."""
    start = time.process_time()
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(STEPS), sampler=SamplerWithoutReplacement(), batch_size=BATCH, generator=None
    )
    for batch in Collector(env, None, frames_per_batch=1000, total_frames=STEPS):
        buffer.extend(batch.exclude("collector"))
    network = MLP(in_features=4, out_features=3, depth=2, num_cells=64, activation_class=torch.nn.SiLU)
    head = MLP(in_features=3, out_features=1, depth=2, num_cells=64, activation_class=torch.nn.SiLU)
    model = WorldModel(
        TensorDictModule(torch.nn.Identity(), in_keys=["observation"], out_keys=["latent"]),
        TensorDictModule(
            Added(network) if output == "change of state" else network,
            in_keys=["latent", "action"],
            out_keys=[("next", "latent")],
        ),
        TensorDictModule(head, in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
    )
    loss = WorldModelLoss(model, losses=["latent", "reward"])
    loss.set_keys(predicted_latent=("next", "latent"), target_latent=("next", "observation"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    last: list[list[float]] = []
    for update in range(updates):
        terms = loss(buffer.sample())
        total = terms["loss_latent"] + terms["loss_reward"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        if update >= updates - 100:
            last.append([terms["loss_latent"].item(), terms["loss_reward"].item()])
    mean = torch.tensor(last).mean(0).tolist()
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, {
        "training_cpu_seconds": time.process_time() - start,
        "loss_latent": mean[0],
        "loss_reward": mean[1],
    }


if __name__ == "__main__":
    main()
