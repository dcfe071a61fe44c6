"""Whether the monitor names the layer that trains at ten times the rate of the others, within two readings.

40 runs: digits, tanh MLP of four layers, SGD, SGD with momentum or AdamW by turns; which layer is sped up and the seed differ
from run to run. Named: the module with the largest share of the steepest direction, at the first or the second reading.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from telltale.train.sharpness.monitor import SharpnessMonitor

RUNS, EVERY, TARGET, FASTER = 40, 20, 0.95, 10.0
LAYERS = ("0", "2", "4", "6")
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.002, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-4),
}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def watched(run: int) -> dict[str, Any]:
    """One run: what was sped up, and the shares of every module at both readings."""
    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(run)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    faster, kind = LAYERS[run % len(LAYERS)], list(OPTIMIZERS)[run // len(LAYERS) % len(OPTIMIZERS)]
    groups = [{"params": list(model[int(name)].parameters())} for name in LAYERS]
    optimizer = OPTIMIZERS[kind](groups)
    optimizer.param_groups[LAYERS.index(faster)]["lr"] *= FASTER
    monitor = SharpnessMonitor(
        model, loss_of, [(inputs[:256], targets[:256])], optimizer=optimizer, every=EVERY, budget=1.0
    )
    draws = torch.Generator().manual_seed(run)
    for _ in range(EVERY):
        rows = torch.randint(len(targets), (64,), generator=draws)
        optimizer.zero_grad()
        loss_of(model, (inputs[rows], targets[rows])).backward()
        optimizer.step()
        monitor.step()
    shares = [reading.leading for reading in monitor.readings]
    named = [next(iter(share)) for share in shares]
    return {
        "run": run,
        "optimizer": kind,
        "faster": faster,
        "named": named,
        "shares": shares,
        "found": faster in named[:2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [watched(run) for run in range(RUNS)]
    found = sum(run["found"] for run in runs) / RUNS
    for run in runs:
        print(run["run"], run["optimizer"], run["faster"], run["named"], run["shares"][-1])
    print(f"named in {found:.1%} of {RUNS} runs (target {TARGET:.0%})")
    if not arguments.trial:
        write_result("sharpness_where", runs=runs, found=found, target=TARGET, kept=found >= TARGET)


if __name__ == "__main__":
    main()
