"""Final weights and losses of the distributed runtime against the one-process reference, bit for bit. Real compute.

Straight pipelines of 2 and 4 stages and replicated ones, every policy, SGD with momentum and weight decay, and AdamW, with and
without gradient clipping, 23 minibatches (a ragged last round), evaluation in the middle. The model has linear layers, a
convolution, layer norms, GELU and dropout.

    python benchmarks/pipeline_equality.py
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from measurement import write_result
from pipeline_worlds import spawn
from telltale.train.pipeline import reference
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

OPTIMIZERS: dict[str, Any] = {
    "SGD momentum 0.9": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda named: torch.optim.AdamW(named, lr=1e-2),
}
POLICIES = (("stash", 1), ("vertical", 1), ("2bw", 0), ("2bw", -1), ("flush", 4), ("gpipe", 4), ("none", 1))
"""(policy, microbatches); 0 is the number of workers, -1 one less."""
STRAIGHT = {2: [range(3), range(3, 8)], 4: [range(2), range(2, 4), range(4, 6), range(6, 8)]}
REPLICATED = {
    3: [([range(3), range(3, 8)], [2, 1]), ([range(3), range(3, 8)], [1, 2])],
    4: [
        ([range(3), range(3, 6), range(6, 8)], [2, 1, 1]),
        ([range(3), range(3, 6), range(6, 8)], [1, 2, 1]),
        ([range(4), range(4, 8)], [2, 2]),
        ([range(4), range(4, 8)], [3, 1]),
    ],
}
CUT, STOP = 12, 23


def main() -> None:
    rows = list(itertools.chain.from_iterable(spawn(_compare, world) for world in (2, 3, 4)))
    wrong = [row for row in rows if not row["equal"]]
    write_result("pipeline_equality", cases=len(rows), unequal=wrong, rows=rows)
    print(f"{len(rows)} cases, {len(wrong)} unequal")


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.out = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.convolution(x[:, None])).flatten(1))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), _Convolution(), nn.Dropout(0.2)]
    return nn.Sequential(*first, nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def _batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(minibatch)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def _compare(rank: int, world: int) -> list[dict[str, Any]]:
    shapes = [(STRAIGHT[world], [1] * world)] if world in STRAIGHT else []
    rows = []
    for (stages, replicas), (policy, m), (optimizer, factory), limit in itertools.product(
        shapes + REPLICATED.get(world, []), POLICIES, OPTIMIZERS.items(), (None, 0.5)
    ):
        needed = max(1, world + m) if m < 1 else m
        plan = Plan.manual(stages, replicas=replicas, policy=policy, microbatches=needed)
        settings = {"optimizer": factory, "grad_clip": limit}
        trainer = PipelineTrainer(_model(), plan, loss=nn.functional.cross_entropy, reduction="ordered", **settings)
        losses = trainer.train(_batch, stop=CUT)
        trainer.evaluate(_batch, 3)
        losses += trainer.train(_batch, stop=STOP)
        oracle = _model()
        run = reference.Reference(sequential(oracle, nn.functional.cross_entropy), plan, **settings)
        expected = run.run(_batch, stop=CUT).losses + run.run(_batch, stop=STOP).losses
        weights = dict(oracle.named_parameters())
        own = trainer.model.parameter_names(trainer.stage.first, trainer.stage.stop)
        equal = losses == expected and all(torch.equal(own[name], weights[name]) for name in own)
        everywhere: list[Any] = [None] * world
        dist.all_gather_object(everywhere, (equal, trainer.most_versions))
        rows.append(
            {
                "plan": plan.describe(),
                "policy": policy,
                "microbatches": needed,
                "optimizer": optimizer,
                "grad_clip": limit,
                "equal": all(equal for equal, _ in everywhere),
                "most_versions_per_rank": [versions for _, versions in everywhere],
            }
        )
    return rows


if __name__ == "__main__":
    main()
