"""The forward-only channel beside Lanczos on the edge runs: the critical step of each 25th update, and what it costs.

Three questions of the runs of sharpness_edges.py. Rank agreement: Spearman's rho of 1 / s with the monitor's ratio over the
readings before the ratio first passes .9, pooled for each optimizer (target .9). Plateau: the median of |1 / s - 1| over the
last third of the runs that go to their edge (target .15). Readings at equal budget: CPU time of a warm look over that of a
critical step (target 3).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from scipy import stats

from measurement import write_result
from sharpness_edges import EVERY, RUNS, Run, data, loss_of, network
from telltale.train.sharpness import CriticalStep, SharpnessMonitor

PASSED, RANK, PLATEAU, MORE = 0.9, 0.9, 0.15, 3.0


def follow(run: Run, seed: int) -> dict[str, Any]:
    """Train one run with both channels; pairs of readings, and the CPU seconds of each channel."""
    batch, model = data(), network(seed)
    optimizer = run.optimizer(model.parameters())
    monitor = SharpnessMonitor(model, loss_of, [batch], optimizer=optimizer, every=EVERY, budget=1.0, seed=seed)
    channel = CriticalStep(model, loss_of, [batch], mode="no dropout", seed=seed)
    pairs, seconds, looks, forwards = [], {"lanczos": 0.0, "forward only": 0.0}, 0, 0
    for step in range(1, run.steps + 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        due = step % EVERY == 0
        began = time.process_time()
        if due:
            channel.before()
        seconds["forward only"] += time.process_time() - began
        optimizer.step()
        began = time.process_time()
        critical = channel.after() if due else None
        middle = time.process_time()
        reading = monitor.step()
        ended = time.process_time()
        if reading is not None and critical is not None:
            pairs.append((step, reading.ratio, critical.ratio))
            forwards += critical.forwards
            if monitor.tracker.warm and looks:
                seconds["lanczos"] += ended - middle
            seconds["forward only"] += middle - began
            looks += 1
    return {
        "run": run.name,
        "optimizer": run.name.partition(",")[0],
        "seed": seed,
        "at_edge": run.at_edge,
        "pairs": pairs,
        "seconds_each": {
            "lanczos": seconds["lanczos"] / max(looks - 1, 1),
            "forward only": seconds["forward only"] / looks,
        },
        "forwards_each": forwards / looks,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for kind in dict.fromkeys(run["optimizer"] for run in found):
        some = [run for run in found if run["optimizer"] == kind]
        rising, plateau = [], []
        for run in some:
            first = next((step for step, ratio, _ in run["pairs"] if ratio >= PASSED), float("inf"))
            rising += [(ratio, critical) for step, ratio, critical in run["pairs"] if step < first]
            last = 2 / 3 * run["pairs"][-1][0]
            if run["at_edge"]:
                plateau += [abs(critical - 1) for step, _, critical in run["pairs"] if step > last]
        rows[kind] = {
            "readings_before": len(rising),
            "spearman": float(stats.spearmanr(*zip(*rising, strict=True)).statistic) if len(rising) > 2 else None,
            "plateau_median": statistics.median(plateau) if plateau else None,
            "more_readings": statistics.median(
                run["seconds_each"]["lanczos"] / run["seconds_each"]["forward only"] for run in some
            ),
            "forwards_each": statistics.mean(run["forwards_each"] for run in some),
        }
    return rows


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
            print(seed, run.name, summary(found[-1:]), flush=True)
    rows = summary(found)
    for kind, row in rows.items():
        print(kind, row)
    if not arguments.trial:
        targets = {"spearman": RANK, "plateau_median": PLATEAU, "more_readings": MORE}
        write_result("sharpness_critical", targets=targets, optimizers=rows, runs=found)


if __name__ == "__main__":
    main()
