"""Does the order of plans by simulation hold when they are run, and is the time that ``plan`` prints the measured one?

Two ranks, one thread each, a chain of linear layers in which compute dominates. The links are probed and the layers profiled in
the ranks themselves, side by side, as on the machines that will train. Eight plans (cuts, data parallelism, policies) and the
planner's own are simulated, then run; their rounds take turns, so that a slow minute meets all of them. ``pairs``: pairs of plans
whose predictions differ by more than 5%, and how many of them were measured in that order.

    python benchmarks/pipeline_order.py [--repeats 5] [--minibatches 24] [--rows 128] [--rate 1gbit]

``--rate`` runs the same on a loopback under ``tc tbf`` in a network namespace of its own (needs root, ``unshare``, ``ip``, ``tc``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from measurement import write_result
from pipeline_simulator import _optimizer, _projection, _shared_profile
from pipeline_worlds import limited_loopback, load_average, spawn
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.planner import plan as make_plan
from telltale.train.pipeline.simulation.simulator import simulated_seconds
from telltale.train.pipeline.topology import probe
from telltale.train.pipeline.trainer import PipelineTrainer

WIDTHS = [512, 768, 1024, 1280, 1024, 768, 512]
CLEAR = 0.05
"""Predictions that differ by less are not asked for their order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minibatches", type=int, default=24, help="a multiple of 4")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rate", default="1gbit", help="of the limited loopback; none: only the free one")
    parser.add_argument(
        "--limited-into", default="", help="internal: run the limited cases and leave them in this file"
    )
    options = parser.parse_args()
    sizes = options.repeats, options.minibatches, options.rows
    if options.limited_into:
        limited_loopback(options.rate)
        Path(options.limited_into).write_text(json.dumps(spawn(_measured, 2, *sizes)))
        return
    found = {"free": spawn(_measured, 2, *sizes)}
    if options.rate != "none":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "limited.json"
            again = [sys.executable, *sys.argv, "--limited-into", str(file)]
            subprocess.run(["unshare", "--net", *again], check=True, env=os.environ)
            found["limited"] = json.loads(file.read_text())
    write_result(
        "pipeline_order",
        load_average=load_average(),
        rate=options.rate,
        repeats=options.repeats,
        minibatches=options.minibatches,
        rows_per_minibatch=options.rows,
        links=found,
    )
    for link, result in found.items():
        print(
            link,
            {name: result[name] for name in ("plans", "pairs", "in_order", "worst_error", "chosen_error", "regret")},
        )


def _measured(rank: int, world: int, repeats: int, minibatches: int, rows: int) -> dict[str, Any]:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            *[nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.LayerNorm(b)) for a, b in itertools.pairwise([*WIDTHS, 64])]
        )

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(minibatch % 8)
        return torch.randn(rows, WIDTHS[0], generator=generator), torch.randn(rows, 64, generator=generator)

    topology = probe(message_bytes=2**20, repeats=9).topology
    measured = _shared_profile(build, batch, world, _projection)
    chosen = make_plan(measured, topology)
    plans = [chosen, *_plans(len(measured.layers))]
    trainers = [PipelineTrainer(build(), plan, optimizer=_optimizer, loss=_projection) for plan in plans]
    seconds: list[list[float]] = [[] for _ in plans]
    for trainer in trainers:
        trainer.train(batch, stop=4)
    for _ in range(repeats):
        for taken, trainer in zip(seconds, trainers, strict=True):
            taken.append(_steady(trainer, batch, minibatches))
    results = []
    for plan, taken in zip(plans, seconds, strict=True):
        predicted, found = simulated_seconds(plan, measured, topology), statistics.median(taken)
        results.append(
            {
                "plan": plan.describe(),
                "cuts": [stage.layers[-1] for stage in plan.stages[:-1]],
                "policy": plan.policy,
                "microbatches": plan.microbatches,
                "predicted_ms": 1e3 * predicted,
                "measured_ms": 1e3 * found,
                "spread_ms": [1e3 * min(taken), 1e3 * max(taken)],
                "error": predicted / found - 1,
            }
        )
    return _summary(results, chosen, dataclasses.asdict(topology), measured.residual)


def _plans(layers: int) -> list[Plan]:
    """Cuts from the worst to the best under stash, the best one under the other policies, and data parallelism."""
    cut = [Plan.manual([range(at), range(at, layers)]) for at in (1, 2, 3, 4, 5)]
    others = [Plan.manual([range(3), range(3, layers)], policy=policy, microbatches=4) for policy in ("flush", "2bw")]
    return [*cut, *others, Plan.manual([range(layers)], replicas=[2], policy="flush", microbatches=2)]


def _steady(trainer: PipelineTrainer, batch: Any, minibatches: int) -> float:
    """Seconds per minibatch of a long run beyond those of a short one: without the filling and draining of either, which the
    policies that drain pay in each batch."""
    long = _timed(trainer, batch, minibatches)
    return (long - _timed(trainer, batch, 4)) / (minibatches - 4)


def _timed(trainer: PipelineTrainer, batch: Any, minibatches: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    trainer.train(batch, stop=trainer.minibatch + minibatches)
    taken = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _summary(
    rows: list[dict[str, Any]], chosen: Plan, topology: dict[str, Any], residual: float | None
) -> dict[str, Any]:
    distinct = rows[1:]
    pairs = [
        (a, b) for a, b in itertools.permutations(distinct, 2) if a["predicted_ms"] < (1 - CLEAR) * b["predicted_ms"]
    ]
    best = min(row["measured_ms"] for row in rows)
    return {
        "plans": len(distinct),
        "pairs": len(pairs),
        "in_order": sum(a["measured_ms"] < b["measured_ms"] for a, b in pairs),
        "worst_error": max(abs(row["error"]) for row in rows),
        "chosen_error": rows[0]["error"],
        "chosen_said_ms": 1e3 * chosen.bottleneck,
        "regret": rows[0]["measured_ms"] / best,
        "topology": topology,
        "profile_residual": residual,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
