"""What stale weights do to the edge and to the attractor: the same full-batch training as a pipeline of 1, 2, 4 and 7 stages.

Digits (500 images, centred, one-hot targets), a tanh network of 4,522 weights, gradient descent, policy "stash": a stage with k
stages behind it steps by gradients that are k minibatches old. One stage is training without delay. The ratio is read by the
threshold of the optimizer without delay (2 / rate), all the way; the dimension of I - rate H at the end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from telltale.errors import NumericalError
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.sharpness.callbacks import StalenessSharpness
from telltale.train.sharpness.measure import measure

RATE, EVERY = 0.3, 20
STAGES = (1, 2, 4, 7)
Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    """500 images (500, 64), centred, and their one-hot labels (500, 10)."""
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)[:500]
    return images - images.mean(), functional.one_hot(torch.tensor(data.target)[:500], 10).float()


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def root_loss(model: nn.Module, batch: Batch) -> Tensor:
    return loss_of(model(batch[0]), batch[1])


def run(stages: int, seed: int, steps: int, batch: Batch) -> dict[str, Any]:
    """One training: the ratio along it, and its loss and dimension where it ended."""
    torch.manual_seed(seed)
    widths = (64, 32, 32, 32)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    watch = StalenessSharpness(root_loss, [batch], every=EVERY, budget=1.0)
    reference = Reference(
        sequential(model, loss_of),
        Plan.even(len(model), stages, policy="stash"),
        optimizer=lambda named: torch.optim.SGD(named, lr=RATE),
        on_update=watch,
    )
    watch.follow(reference)
    found: dict[str, Any] = {"stages": stages, "seed": seed}
    try:
        found["loss"] = reference.run(lambda minibatch: batch, stop=steps).losses[-1]
    except NumericalError as error:
        found["diverged"] = str(error)
    found["steps"] = [reading.step for reading in watch.readings]
    found["ratios"] = [reading.ratio for reading in watch.readings]
    found["states"] = sorted({reading.state for reading in watch.readings})
    last = found["ratios"][2 * len(found["ratios"]) // 3 :]
    found["last_third"] = {"low": min(last), "median": statistics.median(last), "high": max(last)}
    if "diverged" not in found:
        dimension = measure(model, root_loss, [batch], rate=RATE, runs=20, steps=25)
        found |= {
            "sd": dimension.sd,
            "interval": dimension.interval and list(dimension.interval),
            "parameters": dimension.size,
        }
        found["controls"] = dimension.controls
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = digits()
    rows = []
    for stages in STAGES:
        for seed in range(arguments.seeds):
            rows.append(run(stages, seed, arguments.steps, batch))
            shown = {name: rows[-1].get(name) for name in ("loss", "last_third", "sd", "diverged")}
            print(f"{stages} stages, seed {seed}: {shown}", flush=True)
    if not arguments.trial:
        write_result("sharpness_staleness", rate=RATE, total_steps=arguments.steps, rows=rows)


if __name__ == "__main__":
    main()
