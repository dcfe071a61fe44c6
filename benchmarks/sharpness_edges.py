"""The edge of stability is real: full-batch training drives lambda_max * rate to each optimizer's own threshold.

Digits (500 images, centred), tanh network 64-32-32-10, half squared error on one-hot labels, full batch (spec: Cohen et al.
2021 and 2022 for adaptive methods). The monitor reads the ratio along the way; a cold Lanczos run of 40 steps checks it. Over
the last third of each run the ratio must lie in [0.9, 1.1]; the two runs at a low rate must stay below 0.8.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from telltale.signals.lanczos import lanczos
from telltale.train.sharpness.edges import step_jacobian_of
from telltale.train.sharpness.monitor import SharpnessMonitor
from telltale.train.sharpness.probe import Probe

IMAGES, CLASSES, WIDTHS = 500, 10, (64, 32, 32)
EVERY, COLD_STEPS = 25, 40
EDGE, CONTROL = (0.9, 1.1), 0.8

Optimizers = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Run:
    """One optimizer for so many steps, and whether it should reach its edge."""

    name: str
    optimizer: Optimizers
    steps: int
    at_edge: bool = True


RUNS = (
    Run("gd, rate .5", lambda p: torch.optim.SGD(p, lr=0.5), 2000),
    Run("gd, rate 1", lambda p: torch.optim.SGD(p, lr=1.0), 2000),
    Run("heavy ball .9, rate .6", lambda p: torch.optim.SGD(p, lr=0.6, momentum=0.9), 2500),
    Run("nesterov .9, rate .15", lambda p: torch.optim.SGD(p, lr=0.15, momentum=0.9, nesterov=True), 2000),
    Run("adam, rate .001", lambda p: torch.optim.Adam(p, lr=1e-3), 6000),
    Run("adam, rate .003", lambda p: torch.optim.Adam(p, lr=3e-3), 2500),
    Run("heavy ball .9, rate .2", lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), 2500, at_edge=False),
    Run("nesterov .9, rate .1", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 2000, at_edge=False),
)


def data() -> tuple[Tensor, Tensor]:
    """Pixels (500, 64) in [0, 1] less each pixel's mean, and one-hot labels (500, 10)."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[:IMAGES] / 16, dtype=torch.float32)
    return pixels - pixels.mean(0), functional.one_hot(torch.tensor(labels[:IMAGES]), CLASSES).float()


def network(seed: int) -> nn.Sequential:
    """A tanh network with biases: 3,466 parameters."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for rows, columns in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(rows, columns), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], CLASSES))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of an image, averaged over images."""
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()


def cold_ratio(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, seed: int) -> float:
    """The same ratio without the monitor: 40 Lanczos steps from a random start."""
    probe = Probe(model, loss_of, [batch])
    view = step_jacobian_of(optimizer, probe.parameters)
    assert view is not None
    hessian = probe.operator()
    operator = hessian if view.wrap is None else view.wrap(hessian)
    start = torch.randn(probe.size, generator=torch.Generator().manual_seed(seed))
    return float(lanczos(operator, start, COLD_STEPS).nodes.max()) / view.threshold


class Watch:
    """What goes along with a run beside the monitor: nothing here, the forward-only channel in sharpness_critical.py."""

    def begin(self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
        pass

    def ahead(self, step: int) -> None:
        """Right before the optimizer's step."""

    def behind(self, step: int) -> None:
        """Right after it."""

    def looked(self, step: int, reading: Any, seconds: float, warm: bool) -> None:
        """The monitor has looked, for so many CPU seconds."""


def follow(run: Run, seed: int, watch: Watch | None = None) -> dict[str, Any]:
    """Train one run, watched; the readings, and how the last third went."""
    batch, model, watch = data(), network(seed), watch or Watch()
    optimizer = run.optimizer(model.parameters())
    monitor = SharpnessMonitor(model, loss_of, [batch], optimizer=optimizer, every=EVERY, budget=1.0, seed=seed)
    watch.begin(model, batch, optimizer, seed)
    checks, began = [], time.process_time()
    for step in range(1, run.steps + 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        watch.ahead(step)
        optimizer.step()
        watch.behind(step)
        warm, before = monitor.tracker.warm, time.process_time()
        reading = monitor.step()
        if reading is not None:
            watch.looked(step, reading, time.process_time() - before, warm)
        if reading is not None and step % (run.steps // 4) < EVERY and step > EVERY:
            checks.append({"step": step, "monitor": reading.ratio, "cold": cold_ratio(model, batch, optimizer, step)})
    monitor.close()
    last = [reading.ratio for reading in monitor.readings if reading.step > run.steps * 2 / 3]
    low, middle, high = min(last), statistics.median(last), max(last)
    passed = EDGE[0] <= low and high <= EDGE[1] if run.at_edge else high < CONTROL
    return {
        "run": run.name,
        "seed": seed,
        "steps": run.steps,
        "expected": "at the edge" if run.at_edge else "below the edge",
        "last_third": {"min": low, "median": middle, "max": high, "readings": len(last)},
        "inside_share": sum(EDGE[0] <= ratio <= EDGE[1] for ratio in last) / len(last),
        "passed": passed,
        "states": {
            state: sum(r.state == state for r in monitor.readings) for state in {r.state for r in monitor.readings}
        },
        "first_at_edge": next((r.step for r in monitor.readings if r.ratio >= EDGE[0]), None),
        "loss": float(loss_of(model, batch).detach()),
        "against_cold_lanczos": checks,
        "cpu_seconds": time.process_time() - began,
        "timeline": [[r.step, round(r.ratio, 4), round(r.ratio_error, 5)] for r in monitor.readings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in arguments.seeds:
        for run in RUNS:
            found.append(follow(run, seed))
            last = found[-1]["last_third"]
            print(
                f"{'ok  ' if found[-1]['passed'] else 'FAIL'} seed {seed} {run.name}: {last['min']:.3f} .. {last['max']:.3f}",
                flush=True,
            )
    if not arguments.trial:
        write_result("sharpness_edges", acceptance={"edge": EDGE, "control": CONTROL}, runs=found)


if __name__ == "__main__":
    main()
