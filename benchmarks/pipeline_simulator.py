"""Predicted against measured: the simulator over many configurations, and what the planner's choice costs against the best plan.

Real compute (n = 2) runs linear layers of different widths, one thread per rank; emulated compute (n = 4) sleeps. Profiles
are taken in the ranks themselves, side by side, so that memory bandwidth is shared as it will be; the link, and what the runtime
takes per operation (a pipeline of next to no compute), are measured before.
Limited cases run on a loopback under ``tc tbf`` in a network namespace of its own (needs root, ``unshare``, ``ip``, ``tc``).

    python benchmarks/pipeline_simulator.py [--rate 1gbit] [--repeats 3]
"""

from __future__ import annotations

import argparse
import dataclasses
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
from pipeline_worlds import limited_loopback, load_average, spawn
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.planner import plan as make_plan
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.profiler import profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.topology import Topology
from telltale.train.pipeline.trainer import PipelineTrainer

ROWS = 64
MINIBATCHES = 36
REAL_REPEATS = 5
"""Real compute takes tenths of a second a run and is the least steady; medians are taken."""
REAL = {
    "even": [768] * 8,
    "rising": [256, 384, 512, 640, 768, 896, 1024],
    "one wide": [384, 384, 384, 1536, 384, 384, 384],
}
EMULATED_MS = {
    "even": [6.0] * 8,
    "rising": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "one slow": [4.0] * 4 + [16.0] + [4.0] * 3,
}
"""Forward milliseconds per layer; the backward takes twice as long."""
WIDE_BYTES = 2_000_000
"""Output of an emulated layer in the limited cases."""
POLICIES = (("flush", 4), ("2bw", 4), ("stash", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limited-into", default="", help="internal: run the limited cases and leave them in this file"
    )
    options = parser.parse_args()
    if options.limited_into:
        limited_loopback(options.rate)
        limited = _cases("limited", options.repeats), spawn(_regret, 4, "limited", options.repeats)
        Path(options.limited_into).write_text(json.dumps(limited))
        return
    rows = _cases("free", options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "limited.json"
        again = [sys.executable, *sys.argv, "--limited-into", str(file)]
        subprocess.run(["unshare", "--net", *again], check=True, env=os.environ)
        limited, regret_limited = json.loads(file.read_text())
    rows += limited
    errors = [abs(row["error"]) for row in rows]
    regret = {"free": spawn(_regret, 4, "free", options.repeats), "limited": regret_limited}
    write_result(
        "pipeline_simulator",
        load_average=load_average(),
        rate_of_limited_cases=options.rate,
        median_error=statistics.median(errors),
        worst_error=max(errors),
        rows=rows,
        plan_regret_emulated=regret,
    )
    print(
        f"median {statistics.median(errors):.3f} worst {max(errors):.3f}; regret {[case['regret'] for case in regret.values()]}"
    )


def _cases(link: str, repeats: int) -> list[dict[str, Any]]:
    rows = spawn(_emulated, 4, link, repeats)
    return rows + (spawn(_real, 2, link, REAL_REPEATS) if link == "free" else [])


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grads[0], None


class _Emulated(nn.Module):
    """Sleeps; its weights are there to be updated and, where there are many, to be averaged over replicas."""

    def __init__(self, milliseconds: float, weights: int = 1) -> None:
        super().__init__()
        self.seconds = milliseconds / 1e3
        self.scale = nn.Parameter(torch.ones(weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(x * self.scale.mean(), self.seconds)


def _projection(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Its gradient is the targets', of ordinary size. Through a layer norm that of a mean or a square is next to nothing, and how
    long arithmetic on such numbers takes depends on the minibatch."""
    return (outputs * targets).mean()


def _square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.mean() - targets.mean()) ** 2


def _emulated(rank: int, world: int, link: str, repeats: int) -> list[dict[str, Any]]:
    width = WIDE_BYTES // 4 if link == "limited" else 64

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, width), torch.zeros(1)

    topology, overhead = _topology(world, shared=link == "limited"), _host_overhead()
    rows = []
    for name, layers in EMULATED_MS.items():

        def build(layers: list[float] = layers) -> nn.Sequential:
            return nn.Sequential(*[_Emulated(milliseconds) for milliseconds in layers])

        measured = _shared_profile(build, batch, topology.workers)
        for policy, m in POLICIES:
            chosen = make_plan(measured, topology, policy=policy, microbatches=m if m > 1 else None)
            plan = Plan.even(len(layers), world, policy=policy, microbatches=m) if len(chosen.stages) < 2 else chosen
            rows.append(
                {"mix": name, "link": link, "compute": "emulated", "workers": world}
                | _compare(plan, measured, topology, build, batch, repeats, overhead)
            )
    return rows


def _real(rank: int, world: int, link: str, repeats: int) -> list[dict[str, Any]]:
    topology, overhead = _topology(world, shared=False), _host_overhead()
    rows = []
    for name, widths in REAL.items():

        def build(widths: list[int] = widths) -> nn.Sequential:
            torch.manual_seed(0)
            pairs = zip(widths, [*widths[1:], 64], strict=True)
            return nn.Sequential(*[nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.LayerNorm(b)) for a, b in pairs])

        def batch(minibatch: int, width: int = widths[0]) -> tuple[torch.Tensor, torch.Tensor]:
            generator = torch.Generator().manual_seed(minibatch % 8)
            return torch.randn(ROWS, width, generator=generator), torch.randn(ROWS, 64, generator=generator)

        measured = _shared_profile(build, batch, world, _projection)
        for policy, m in POLICIES:
            plan = _best_straight(measured, topology, policy, m)
            rows.append(
                {"mix": name, "link": link, "compute": "real", "workers": world}
                | _compare(plan, measured, topology, build, batch, repeats, overhead, _projection)
            )
    return rows


def _best_straight(measured: Profile, topology: Topology, policy: str, m: int) -> Plan:
    """The straight two-stage plan that the simulator likes best."""
    count = len(measured.layers)
    plans = [Plan.manual([range(cut), range(cut, count)], policy=policy, microbatches=m) for cut in range(1, count)]
    return min(plans, key=lambda plan: simulate(plan, measured, topology, minibatches=MINIBATCHES).makespan)


def _host_overhead() -> float:
    """Seconds that the runtime itself takes per operation: a pipeline of next to no compute, two ranks or more."""
    world = dist.get_world_size()

    def build() -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(world)])

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(4, 4), torch.zeros(1)

    seconds = statistics.median(_run(Plan.even(world, world, policy="stash"), build, batch, 3)) / MINIBATCHES
    told: list[Any] = [seconds / 3]
    dist.broadcast_object_list(told, 0)
    return told[0]


def _compare(
    plan: Plan,
    measured: Profile,
    topology: Topology,
    build: Any,
    batch: Any,
    repeats: int,
    overhead: float,
    loss: Any = _square,
) -> dict[str, Any]:
    seconds = _run(plan, build, batch, repeats, loss)
    predicted = simulate(plan, measured, topology, minibatches=MINIBATCHES, overhead=overhead).makespan
    row = {
        "plan": plan.describe(),
        "cuts": [stage.layers[-1] for stage in plan.stages],
        "policy": plan.policy,
        "microbatches": plan.microbatches,
        "measured_s": statistics.median(seconds),
        "spread_s": [min(seconds), max(seconds)],
        "predicted_s": predicted,
        "host_overhead_s_per_operation": overhead,
        "error": predicted / statistics.median(seconds) - 1,
    }
    if dist.get_rank() == 0:
        print(row, flush=True)
    return row


def _run(plan: Plan, build: Any, batch: Any, repeats: int, loss: Any = _square) -> list[float]:
    trainer = PipelineTrainer(build(), plan, optimizer=_optimizer, loss=loss)
    trainer.train(batch, stop=12)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        trainer.train(batch, stop=trainer.minibatch + MINIBATCHES)
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(seconds)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def _optimizer(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=1e-4)


def _shared_profile(build: Any, batch: Any, world: int, loss: Any = _square) -> Profile:
    """Every rank profiles at the same time; medians over the ranks."""
    dist.barrier()
    own = profile(sequential(build(), loss), batch(0), repeats=9, warm_up=2, optimizer=_optimizer)
    views: list[Any] = [None] * world
    dist.all_gather_object(views, own)
    layers = []
    for parts in zip(*[view.layers for view in views], strict=True):
        timed = {
            field: statistics.median(getattr(part, field) for part in parts)
            for field in ("forward", "backward", "update", "version")
        }
        layers.append(dataclasses.replace(parts[0], **timed))
    return dataclasses.replace(own, layers=tuple(_checked(layers)))


def _checked(layers: list[LayerProfile]) -> list[LayerProfile]:
    assert all(layer.compute > 0 for layer in layers)
    return layers


def _topology(world: int, *, shared: bool) -> Topology:
    """Latency and bandwidth between ranks 0 and 1, by ping-pong of small and large messages."""
    seconds = {size: _ping_pong(size) for size in (256, 2_000_000)}
    bandwidth = (2_000_000 - 256) / max(1e-9, seconds[2_000_000] - seconds[256])
    told: list[Any] = [bandwidth, seconds[256]]
    dist.broadcast_object_list(told, 0)
    return Topology.flat(world, bandwidth=told[0], latency=told[1], shared_link=shared)


def _ping_pong(size: int, rounds: int = 20) -> float:
    """Seconds one way."""
    rank, buffer = dist.get_rank(), torch.zeros(size // 4)
    dist.barrier()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        if rank == 0:
            dist.send(buffer, 1)
            dist.recv(buffer, 1)
        elif rank == 1:
            dist.recv(buffer, 0)
            dist.send(buffer, 0)
        times.append((time.perf_counter() - began) / 2)
    return statistics.median(times)


def _regret(rank: int, world: int, link: str, repeats: int) -> dict[str, Any]:
    """Measured time of the planner's choice over that of the best of many plans for four workers.

    "free": few weights, so that data parallelism is best; "limited": 1 MB of weights per layer on a slow link.
    """
    layers = EMULATED_MS["rising"]
    weights = 250_000 if link == "limited" else 1

    def build() -> nn.Sequential:
        return nn.Sequential(*[_Emulated(milliseconds, weights) for milliseconds in layers])

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, 64), torch.zeros(1)

    topology = _topology(world, shared=link == "limited")
    measured = _shared_profile(build, batch, world)
    chosen = make_plan(measured, topology, policy="stash")
    count = len(layers)
    plans = [chosen, Plan.even(count, 4)]
    plans += [
        Plan.manual([range(cut), range(cut, count)], replicas=r) for cut in (4, 5, 6) for r in ([2, 2], [3, 1], [1, 3])
    ]
    plans += [Plan.manual([range(a), range(a, b), range(b, count)], replicas=[1, 2, 1]) for a, b in ((3, 6), (4, 7))]
    plans += [Plan.manual([range(4), range(4, 6), range(6, count)], replicas=[2, 1, 1])]
    plans += [Plan.manual([range(3), range(3, 5), range(5, 7), range(7, count)])]
    plans = [plan for plan in plans if plan.workers == world]
    rows = []
    for plan in plans:
        seconds = statistics.median(_run(plan, build, batch, repeats))
        rows.append(
            {"plan": plan.describe(), "cuts": [stage.layers[-1] for stage in plan.stages], "measured_s": seconds}
        )
        if rank == 0:
            print(rows[-1], flush=True)
    best = min(row["measured_s"] for row in rows)
    return {"chosen": rows[0], "best_s": best, "regret": rows[0]["measured_s"] / best, "plans": rows}


if __name__ == "__main__":
    main()
