"""What the edge-of-stability monitor costs at its default settings: CPU time of training with it over training without.

Two workloads: an MLP of 281,088 weights on digits in minibatches of 128, and the tiny preset as a causal LM with AdamW. Both
contestants train the same model on the same batches from the same seed and take turns of 20 steps; their final weights must be
bit-equal. The target is 5% at most, with readings: a monitor that never looks would keep it too. Its own account is reported
beside what was measured.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from measurement import quartiles, write_result
from telltale.models.presets import build
from telltale.train.sharpness.monitor import SharpnessMonitor
from telltale.train.sharpness.probe import language_model_loss

TARGET = 0.05
TURN = 20
WIDTH = 256
LM_LENGTH, LM_ROWS, VOCABULARY = 64, 2, 1024

Batches = Callable[[int], Any]


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def mlp() -> tuple[nn.Module, Batches, Any, torch.optim.Optimizer]:
    """The network, minibatches by step, its loss and SGD with momentum."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, WIDTH, bias=False), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10, bias=False))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(targets), (128,), generator=torch.Generator().manual_seed(step))
        return inputs[rows], targets[rows]

    return model, batch, classification_loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def causal_lm() -> tuple[nn.Module, Batches, Any, torch.optim.Optimizer]:
    """The tiny preset on seeded token sequences: what it costs does not depend on what they say."""
    model = build("tiny", seed=0).train()

    def batch(step: int) -> Tensor:
        return torch.randint(VOCABULARY, (LM_ROWS, LM_LENGTH), generator=torch.Generator().manual_seed(step))

    return model, batch, None, torch.optim.AdamW(model.parameters(), lr=1e-3)


WORKLOADS = {"mlp": (mlp, 3000), "causal LM": (causal_lm, 1500)}
"""Steps enough for several readings within the budget; what a look costs is a multiple of a step, whatever the batch."""


class Stopwatch:
    """CPU seconds of one of two trainings that take turns in this process."""

    def __init__(self) -> None:
        self.total, self._since = 0.0, None

    def __enter__(self) -> None:
        self._since = time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.total, self._since = self(), None

    def __call__(self) -> float:
        return self.total if self._since is None else self.total + time.process_time() - self._since


def training(
    name: str, steps: int, clock: Stopwatch | None
) -> Generator[None, None, tuple[Tensor, SharpnessMonitor | None]]:
    """Trains in turns of :data:`TURN` steps; with a monitor if there is a clock. Returns final weights and the monitor."""
    model, batch, loss_fn, optimizer = WORKLOADS[name][0]()
    loss_of = loss_fn or language_model_loss
    monitor = None
    if clock is not None:
        monitor = SharpnessMonitor(model, loss_fn, [batch(-1)], optimizer=optimizer, clock=clock)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
        if (step + 1) % TURN == 0:
            yield
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), monitor


def side_by_side(name: str, steps: int) -> tuple[dict[bool, float], bool, dict[str, Any]]:
    """CPU seconds of both trainings, whether they end in the same weights, and what the monitor says of its cost."""
    watches = {False: Stopwatch(), True: Stopwatch()}
    runs = {watched: training(name, steps, watches[watched] if watched else None) for watched in watches}
    ends: dict[bool, tuple[Tensor, SharpnessMonitor | None]] = {}
    gc.collect()
    gc.disable()
    for turn in range(steps // TURN + 1):
        for watched in (False, True) if turn % 2 else (True, False):
            with watches[watched]:
                try:
                    next(runs[watched])
                except StopIteration as end:
                    ends[watched] = end.value
    gc.enable()
    monitor = ends[True][1]
    assert monitor is not None
    account = {
        "share_of_all": monitor.cost.share,
        "share_of_training": monitor.pace.spent / monitor.pace.trained,
        "readings": len(monitor.readings),
        "last_ratio": monitor.readings[-1].ratio if monitor.readings else None,
    }
    seconds = {watched: watch.total for watched, watch in watches.items()}
    return seconds, torch.equal(ends[True][0], ends[False][0]), account


def measured(name: str, rounds: int, share: float) -> dict[str, Any]:
    """CPU time with over without, round by round, and what the monitor itself says."""
    steps = max(10 * TURN, round(WORKLOADS[name][1] * share) // TURN * TURN)
    found = [side_by_side(name, steps) for _ in range(rounds)]
    ratios = [seconds[True] / seconds[False] - 1.0 for seconds, _, _ in found]
    low, middle, high = quartiles(ratios)
    return {
        "steps": steps,
        "extra_cpu": {"median": middle, "q1": low, "q3": high, "rounds": ratios},
        "cpu_seconds_without": [seconds[False] for seconds, _, _ in found],
        "own_account": [account for _, _, account in found],
        "bit_equal": all(equal for _, equal, _ in found),
        "target": TARGET,
        "kept": middle <= TARGET and all(account["readings"] > 0 for _, _, account in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(WORKLOADS), help="one workload, for a trial")
    parser.add_argument("--share", type=float, default=1.0, help="part of the steps, for a trial")
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in [arguments.only] if arguments.only else WORKLOADS:
        found[name] = measured(name, arguments.rounds, arguments.share)
        print(name, {key: found[name][key] for key in ("extra_cpu", "own_account", "bit_equal")}, flush=True)
    if not (arguments.trial or arguments.only):
        write_result("sharpness_monitor_cost", workloads=found)


if __name__ == "__main__":
    main()
