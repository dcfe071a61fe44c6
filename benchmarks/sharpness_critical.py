"""The forward-only channel beside Lanczos on the edge runs, and what each costs.

The runs are those of sharpness_edges.py, whose own result is written as well from three seeds on. Three questions.
Rank agreement: Spearman's rho of the channel's ratio with the monitor's over the readings before the latter first passes .9,
pooled for each optimizer (target .9). Plateau: the median of |ratio - 1| over the last third of the runs that go to their edge
(target .15). Readings at equal budget: CPU time of a warm look over that of a reading, on this network (N = 3,466), where what
goes around a pass weighs most, and on one of 281,088 weights (target 3). The update's own critical step, without an
optimizer's table, is read beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from scipy import stats
from torch import nn

from measurement import write_result
from sharpness_edges import CONTROL, EDGE, EVERY, RUNS, Run, Watch, follow, loss_of
from sharpness_monitor_cost import classification_loss, mlp
from telltale.train.sharpness import CriticalStep, SharpnessMonitor
from telltale.train.sharpness.critical_step import WINDOW

PASSED, RANK, PLATEAU, MORE = 0.9, 0.9, 0.15, 3.0
TARGETS = {"spearman": RANK, "plateau_median": PLATEAU, "more_readings": MORE}
LARGER_STEPS, LARGER_EVERY = 400, 20


class Forward(Watch):
    """Both forms of the channel at the monitor's steps; the searched one every tenth of them, for it is not the question."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, float, float]] = []
        self.searched: list[tuple[int, float, float]] = []
        self.seconds: dict[str, list[float]] = {"lanczos": [], "forward only": []}
        self.forwards: list[int] = []

    def begin(self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self._channel = CriticalStep(model, loss_of, [batch], optimizer=optimizer, seed=seed)
        self._update = CriticalStep(model, loss_of, [batch], seed=seed)
        self._spent = 0.0

    def ahead(self, step: int) -> None:
        began = time.process_time()
        if 0 < -step % EVERY < WINDOW or step % EVERY == 0:
            self._channel.before()
        self._spent += time.process_time() - began
        if step % (10 * EVERY) == 0:
            self._update.before()

    def behind(self, step: int) -> None:
        if step % EVERY:
            return
        began = time.process_time()
        self._newest = self._channel.after()
        self._spent += time.process_time() - began
        self.seconds["forward only"].append(self._spent)
        self.forwards.append(self._newest.forwards)
        self._spent = 0.0

    def looked(self, step: int, reading: Any, seconds: float, warm: bool) -> None:
        if step % EVERY:
            return
        if warm:
            self.seconds["lanczos"].append(seconds)
        self.pairs.append((step, reading.ratio, self._newest.ratio))
        if step % (10 * EVERY) == 0:
            self.searched.append((step, reading.ratio, self._update.after().ratio))

    def record(self, run: Run, seed: int) -> dict[str, Any]:
        return {
            "run": run.name,
            "optimizer": run.name.partition(",")[0],
            "seed": seed,
            "at_edge": run.at_edge,
            "pairs": [[step, round(one, 5), round(other, 5)] for step, one, other in self.pairs],
            "critical_step_of_the_update": [[step, round(one, 5), other] for step, one, other in self.searched],
            "seconds_each": {name: statistics.median(each) for name, each in self.seconds.items()},
            "forwards_each": statistics.mean(self.forwards),
        }


def before_passing(run: dict[str, Any]) -> list[tuple[float, float]]:
    first = next((step for step, ratio, _ in run["pairs"] if ratio >= PASSED), float("inf"))
    return [(ratio, found) for step, ratio, found in run["pairs"] if step < first]


def rank(pairs: list[tuple[float, float]]) -> float | None:
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def plateau(run: dict[str, Any]) -> list[float]:
    last = 2 / 3 * run["pairs"][-1][0]
    return [abs(found - 1) for step, _, found in run["pairs"] if step > last] if run["at_edge"] else []


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for kind in dict.fromkeys(run["optimizer"] for run in found):
        some = [run for run in found if run["optimizer"] == kind]
        pooled = [pair for run in some for pair in before_passing(run)]
        flat = [off for run in some for off in plateau(run)]
        rows[kind] = {
            "readings_before": len(pooled),
            "spearman": rank(pooled),
            "spearman_of_runs_that_go_there": rank([p for run in some if run["at_edge"] for p in before_passing(run)]),
            "spearman_each_run": {f"{run['run']}, seed {run['seed']}": rank(before_passing(run)) for run in some},
            "plateau_median": statistics.median(flat) if flat else None,
            "more_readings": statistics.median(
                run["seconds_each"]["lanczos"] / run["seconds_each"]["forward only"] for run in some
            ),
            "forwards_each": statistics.mean(run["forwards_each"] for run in some),
        }
    return rows


def larger() -> dict[str, Any]:
    """Seconds of a warm look and of a reading on the MLP of sharpness_monitor_cost.py, minibatches of 128."""
    model, batch, _, optimizer = mlp()
    probe = [batch(-1)]
    monitor = SharpnessMonitor(
        model, classification_loss, probe, optimizer=optimizer, every=LARGER_EVERY, budget=1.0, on_reading=()
    )
    channel = CriticalStep(model, classification_loss, probe, optimizer=optimizer)
    looks, reads, ratios = [], [], []
    for step in range(1, LARGER_STEPS + 1):
        optimizer.zero_grad()
        classification_loss(model, batch(step)).backward()
        spent, began = 0.0, time.process_time()
        if 0 < -step % LARGER_EVERY < WINDOW or step % LARGER_EVERY == 0:
            channel.before()
        spent += time.process_time() - began
        optimizer.step()
        began = time.process_time()
        forward = channel.after() if step % LARGER_EVERY == 0 else None
        spent += time.process_time() - began
        began = time.process_time()
        reading = monitor.step()
        if reading is not None and forward is not None:
            looks.append(time.process_time() - began)
            reads.append(spent)
            ratios.append((step, reading.ratio, forward.ratio))
    return {
        "weights": 281_088,
        "more_readings": statistics.median(looks) / statistics.median(reads),
        "seconds_each": {"lanczos": statistics.median(looks), "forward only": statistics.median(reads)},
        "pairs": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    edges = []
    for seed in arguments.seeds:
        for run in RUNS:
            watch = Forward()
            edges.append(follow(run, seed, watch))
            found.append(watch.record(run, seed))
            print(seed, run.name, edges[-1]["passed"], edges[-1]["last_third"], summary(found[-1:]), flush=True)
            if not arguments.trial:  # A run that is cut short leaves what it has.
                write_result(
                    "sharpness_critical", targets=TARGETS, seeds=arguments.seeds, optimizers=summary(found), runs=found
                )
    if not arguments.trial and len(arguments.seeds) >= 3:
        write_result("sharpness_edges", acceptance={"edge": EDGE, "control": CONTROL}, runs=edges)
    wide = larger()
    rows = summary(found)
    for kind, row in rows.items():
        print(kind, {key: value for key, value in row.items() if key != "spearman_each_run"})
    print(wide["more_readings"])
    if not arguments.trial:
        write_result(
            "sharpness_critical", targets=TARGETS, seeds=arguments.seeds, optimizers=rows, larger=wide, runs=found
        )


if __name__ == "__main__":
    main()
