"""What would stale weights do to my training? Every policy's delayed updates, computed exactly in one process.

python examples/delayed_updates.py
"""

import copy
import statistics

import torch
from torch import Tensor, nn

from telltale.train.pipeline import Plan, delay_aware_nadam, reference

STAGES = 4
MINIBATCHES = 240
POLICIES = {"flush": 1, "stash": 1, "vertical": 1, "2bw": STAGES}
"""flush with m=1 is training without delay."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(STAGES) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    return nn.Sequential(nn.Linear(8, 64), *hidden, nn.Linear(64, 4))


def batch_at(minibatch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(minibatch)
    x = torch.randn(32, 8, generator=generator)
    return x, (x[:, :4] * x[:, 4:]).argmax(dim=1)


def main() -> None:
    start = model()
    optimizers = {
        "SGD 0.1, momentum 0.9": lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
        "AdamW 3e-3": lambda named: torch.optim.AdamW(named, lr=3e-3),
        "NAdam 3e-3, beta1 0.99": delay_aware_nadam(3e-3),
    }
    print(f"mean loss of the last 40 of {MINIBATCHES} minibatches, {STAGES} stages")
    for name, optimizer in optimizers.items():
        for policy, microbatches in POLICIES.items():
            plan = Plan.even(len(start), STAGES, policy=policy, microbatches=microbatches)
            network = copy.deepcopy(start)
            result = reference.train(
                network, plan, batch_at, optimizer=optimizer, stop=MINIBATCHES, loss=nn.functional.cross_entropy
            )
            behind = MINIBATCHES - 1 - result.trace[-1][0][0] * (microbatches if policy == "2bw" else 1)
            loss = statistics.fmean(result.losses[-40:])
            print(f"{name:<24}{policy:<10} loss {loss:.3f}   (first stage reads weights {behind} minibatches old)")


if __name__ == "__main__":
    main()
