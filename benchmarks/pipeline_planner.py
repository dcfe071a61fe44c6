"""The pipeline planner: published plans, CPU time beside the official optimizer, and a thousand layers on 64 x 8 workers.

    python benchmarks/pipeline_planner.py --profiles FOLDER [--official CHECKOUT]

``--profiles`` holds profiles in the official text format (``vgg16.txt``, ``resnet50.txt``, ...); ``--official`` is a checkout
of msr-fiddle/pipedream, whose optimizer runs unchanged in a process of its own, with its own cost model and its default
of free cuts. Both sides are timed from the profile's text to the stages, in CPU seconds, without starting Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from measurement import write_result
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.costs import COST_MODELS, cost_of_stages
from telltale.train.pipeline.planning.partition import Problem, solve
from telltale.train.pipeline.planning.planner import plan, reordered_for
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.topology import Level, Topology

TEN_GIGABIT = 1.25e9
PUBLISHED = {"vgg16": "15-1", "alexnet": "15-1", "resnet50": "16"}
"""SOSP'19, table 1, 16 workers."""

OFFICIAL_RUN = """
import contextlib, importlib.util, io, json, sys, time, types
sys.modules["graphviz"] = types.ModuleType("graphviz")  # only its drawings need it
sys.path[:0] = [".", ".."]
spec = importlib.util.spec_from_file_location("official", "optimizer_graph_hierarchical.py")
official = importlib.util.module_from_spec(spec)
spec.loader.exec_module(official)
official.straight_pipeline = official.use_memory_constraint = official.use_fewer_machines = False
official.activation_compression_ratio, official.memory_size = None, 16e9
machines, bandwidths, path = json.loads(sys.argv[1])
start = time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    best, _ = official.main(machines, path, bandwidths, 16e9, False, False, False, None, None, False, False)
print(json.dumps({"seconds": time.process_time() - start, "objective": best}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    paths = {path.stem: path for path in sorted(arguments.profiles.glob("*.txt"))}
    if arguments.official:
        for path in sorted(arguments.official.glob("profiler/*/profiles/*/graph.txt")):
            paths.setdefault(path.parent.name, path)
    plans = published_plans(paths)
    thousand = thousand_layers(arguments.rounds)
    official = compare(paths, arguments.official, arguments.rounds) if arguments.official else []
    write_result("pipeline_planner", plans=plans, official=official, thousand_layers=thousand)


def published_plans(paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Every profile under every cost model, on 16 workers in a row and as 4 x 4."""
    topologies = {
        "16 at 10 Gbit/s": Topology.flat(16, bandwidth=TEN_GIGABIT),
        "4 at 10 GB/s x 4 at 10 Gbit/s": Topology((Level(4, 10e9), Level(4, TEN_GIGABIT))),
    }
    rows = []
    for name, path in paths.items():
        profile = Profile.load(path)
        for shape, topology in topologies.items():
            for model in COST_MODELS:
                found, seconds = timed(lambda profile=profile, t=topology, m=model: plan(profile, t, cost_model=m))
                row = {
                    "profile": name,
                    "topology": shape,
                    "cost_model": model,
                    "plan": found.describe(),
                    "workers": found.workers,
                    "policy": found.policy,
                    "milliseconds_per_minibatch": 1e3 * found.bottleneck,
                    "speedup_over_one_worker": profile.compute / found.bottleneck,
                    "cpu_seconds": seconds,
                }
                if topology.is_flat and name in PUBLISHED:
                    row |= {"published": PUBLISHED[name], "as_published": found.describe() == PUBLISHED[name]}
                print(row)
                rows.append(row)
    return rows


def compare(paths: dict[str, Path], official: Path, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds and objective of both programs under the official cost model with free cuts.

    On one level only: on two the official code divides the exchange of an unsplit stage by the machines below, and that of
    a split one not, which is no model that a plan could be compared under.
    """
    cases = [("vgg16", [16]), ("resnet50", [16]), ("gnmt", [16]), ("gnmt_large", [4])]
    bandwidths = {1: [TEN_GIGABIT], 2: [10e9, TEN_GIGABIT]}
    results = []
    for name, machines in cases:
        if name not in paths:
            continue
        speeds = bandwidths[len(machines)]
        levels = tuple(Level(count, speed) for count, speed in zip(machines, speeds, strict=True))
        theirs = [run_official(official, machines, speeds, paths[name]) for _ in range(2)]
        ours = [timed(lambda path=paths[name], levels=levels: official_objective(path, levels)) for _ in range(rounds)]
        their_seconds = statistics.median(one["seconds"] for one in theirs)
        our_seconds = statistics.median(seconds for _, seconds in ours)
        row = {
            "profile": name,
            "machines": machines,
            "official_cpu_seconds": their_seconds,
            "telltale_cpu_seconds": our_seconds,
            "times_faster": their_seconds / our_seconds,
            "official_objective_ms": 1e3 * theirs[0]["objective"],
            "telltale_objective_ms": 1e3 * ours[0][0][0],
            "telltale_plan": ours[0][0][1],
        }
        print(row)
        results.append(row)
    if "gnmt_large" in paths:
        levels = (Level(4, 10e9), Level(4, TEN_GIGABIT))
        for model in ("ring", "official-code"):
            found, seconds = timed(
                lambda model=model: plan(Profile.load(paths["gnmt_large"]), Topology(levels), cost_model=model)
            )
            row = {"profile": "gnmt_large", "machines": [4, 4], "cost_model": model, "telltale_cpu_seconds": seconds}
            row["telltale_plan"] = found.describe()
            print(row)
            results.append(row)
    return results


def official_objective(path: Path, levels: tuple[Level, ...]) -> tuple[float, str]:
    """From a profile's text to stages and their bottleneck, free cuts, the official cost model."""
    profile = Profile.load(path)
    problem = reordered_for(profile, Problem(profile.chain(), levels, COST_MODELS["official-code"], directions=0))
    parts = solve(problem) or []
    bounds, replicas = [0, *(part.stop for part in parts)], [part.replicas for part in parts]
    found = cost_of_stages(problem.profile, bounds, replicas, levels, problem.cost_model, directions=0)
    return found.bottleneck, "-".join(map(str, replicas))


def run_official(checkout: Path, machines: list[int], bandwidths: list[float], path: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(OFFICIAL_RUN)
        finished = subprocess.run(
            [sys.executable, str(script), json.dumps([machines, bandwidths, str(path.resolve())])],
            cwd=checkout / "optimizer",
            capture_output=True,
            text=True,
        )
    if finished.returncode:
        raise RuntimeError(f"the official optimizer failed on {path.name}: {finished.stderr[-2000:]}")
    return json.loads(finished.stdout.strip().split("\n")[-1])


def thousand_layers(rounds: int) -> list[dict[str, Any]]:
    """1,000 random layers (seed 0) on 64 machines of 8 workers: the partition alone, and a whole plan with its reasons."""
    generator = np.random.default_rng(0)
    draws = zip(
        generator.gamma(2, 1e-3, 1000),
        generator.gamma(2, 2e-3, 1000),
        generator.gamma(1, 4e6, 1000),
        generator.gamma(1, 4e6, 1000),
        strict=True,
    )
    layers = tuple(LayerProfile(f"layer{index}", *map(float, figures)) for index, figures in enumerate(draws))
    profile, topology = Profile(layers), Topology((Level(8, 50e9), Level(64, 3e9)))
    rows = []
    for model in COST_MODELS.values():
        times = []
        for _ in range(rounds if model.overlapped else 1):
            _, seconds = timed(lambda model=model: solve(Problem(profile, topology.levels, model)))
            times.append(seconds)
        row: dict[str, Any] = {"cost_model": model.name, "partition_cpu_seconds": statistics.median(times)}
        if model.name == "ring":
            found, row["plan_cpu_seconds"] = timed(lambda: plan(profile, topology))
            assert isinstance(found, Plan)
            row |= {"stages": len(found.stages), "speedup_over_one_worker": profile.compute / found.bottleneck}
        print(row)
        rows.append(row)
    return rows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


if __name__ == "__main__":
    main()
