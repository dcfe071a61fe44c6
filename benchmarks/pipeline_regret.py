"""How much slower the default plan is than the best other plan that can be found, priced by the simulator.

    python benchmarks/pipeline_regret.py --profiles FOLDER [--random 2000] [--resume]

``--profiles`` holds profiles in the official text format. Rivals of the default plan on each of four topologies: every plan that a
cost model makes with any of stash, 2bw and flush, on the machines as they are and on flat ones; ``--random`` random cuts and
replicas under the default plan's policy and 2bw; and the best two of those, improved cut by cut. A random plan whose busiest worker
alone takes 1% longer than the best plan known is not simulated: it cannot be faster. The figures are written after every case;
``--resume`` goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from measurement import RESULTS, write_result
from telltale.errors import TelltaleError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.candidates import microbatches_for
from telltale.train.pipeline.planning.costs import COST_MODELS
from telltale.train.pipeline.planning.planner import plan
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.simulation.simulator import simulated_seconds
from telltale.train.pipeline.topology import Level, Topology

TOPOLOGIES = {
    "flat 4": Topology.flat(4, bandwidth=1.25e9),
    "flat 16": Topology.flat(16, bandwidth=1.25e9),
    "4 x 4": Topology((Level(4, 12e9), Level(4, 1.25e9))),
    "2 x 8": Topology((Level(8, 30e9), Level(2, 3.125e9))),
}
"""Bytes/s: 10 Gbit/s between machines in the first three, 25 in the last; NVLink or PCIe within."""
POLICIES = ("stash", "2bw", "flush")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--random", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    rows = done(options) if options.resume else []
    for path in sorted(options.profiles.glob("*.txt")):
        profile = Profile.load(path)
        for name, topology in TOPOLOGIES.items():
            if any((row["profile"], row["topology"]) == (path.stem, name) for row in rows):
                continue
            rows.append({"profile": path.stem, "topology": name, **measured(profile, topology, options)})
            print(rows[-1], flush=True)
            write_result(
                "pipeline_regret",
                random_plans=options.random,
                seed=options.seed,
                rows=rows,
                worst_regret=max(row["regret"] for row in rows),
                worst_planning_cpu_seconds=max(row["planning_cpu_seconds"] for row in rows),
            )


def done(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an earlier start with the same settings."""
    file = RESULTS / "pipeline_regret.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    same = (found.get("random_plans"), found.get("seed")) == (options.random, options.seed)
    return found["rows"] if same else []


def measured(profile: Profile, topology: Topology, options: argparse.Namespace) -> dict[str, object]:
    """The default plan and the fastest rival."""
    began = time.process_time()
    chosen = plan(profile, topology)
    spent = time.process_time() - began
    order = {name: place for place, name in enumerate(name for stage in chosen.stages for name in stage.names)}
    chain = profile.chain(list(order)) if profile.edges is not None else profile
    own = seconds(chosen, profile, topology)
    rivals = [*by_cost_models(profile, topology)]
    shapes = sorted(
        random_shapes(options.random, len(chain.layers), topology.workers, options.seed),
        key=lambda shape: least(shape, chain),
    )
    random_ones: list[tuple[float, Plan]] = []
    for place, shape in enumerate(shapes):
        if place < 2 or least(shape, chain) < 1.01 * min(own, *(pair[0] for pair in random_ones)):
            random_ones += [(seconds(made, chain, topology), made) for made in plans_of(shape, chosen)]
    fastest = sorted(random_ones, key=lambda pair: pair[0])[:2]
    improved = [improve(made, chain, topology) for _, made in fastest]
    found = [(seconds(rival, profile, topology), rival) for rival in rivals] + fastest + improved
    best, rival = min([*found, (own, chosen)], key=lambda pair: pair[0])
    return {
        "plan": f"{chosen.policy} {chosen.describe()}",
        "milliseconds": 1e3 * own,
        "said": 1e3 * chosen.bottleneck,
        "best": f"{rival.policy} {rival.describe()}",
        "best_milliseconds": 1e3 * best,
        "regret": own / best,
        "random_plans_simulated": len(random_ones),
        "planning_cpu_seconds": spent,
    }


def seconds(candidate: Plan, profile: Profile, topology: Topology) -> float:
    return simulated_seconds(candidate, profile, topology)


def least(shape: tuple[list[int], list[int]], profile: Profile) -> float:
    """Seconds per minibatch that the busiest worker computes."""
    bounds, replicas = shape
    return max(
        sum(layer.compute for layer in profile.layers[low:high]) / count
        for (low, high), count in zip(pairwise(bounds), replicas, strict=True)
    )


def by_cost_models(profile: Profile, topology: Topology) -> list[Plan]:
    flat = Topology.flat(topology.workers, bandwidth=topology.levels[-1].bandwidth)
    found = []
    for model in COST_MODELS:
        for machines in (topology, flat):
            for policy in (None, *POLICIES):
                try:
                    found.append(plan(profile, machines, cost_model=model, policy=policy))
                except TelltaleError:
                    continue
    return found


def random_shapes(count: int, layers: int, workers: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(bounds, replicas), all workers in use."""
    generator, shapes = random.Random(seed), []
    for _ in range(count):
        stages = min(generator.choice((1, 2, 2, 3, 3, 4, 5, 6, 8, workers)), layers, workers)
        bounds = [0, *sorted(generator.sample(range(1, layers), stages - 1)), layers]
        replicas = [1] * stages
        for _ in range(workers - stages):
            replicas[generator.randrange(stages)] += 1
        shapes.append((bounds, replicas))
    return shapes


def plans_of(shape: tuple[list[int], list[int]], chosen: Plan) -> list[Plan]:
    return [_plan(*shape, policy) for policy in dict.fromkeys((chosen.policy, "2bw"))]


def improve(start: Plan, profile: Profile, topology: Topology) -> tuple[float, Plan]:
    """Cuts moved by one layer and replicas moved between stages, as long as that is faster."""
    best = (seconds(start, profile, topology), start)
    while True:
        bounds = [0, *(stage.layers[-1] + 1 for stage in best[1].stages)]
        replicas = list(best[1].replicas)
        steps = []
        for number in range(1, len(bounds) - 1):
            for move in (-1, 1):
                moved = [*bounds[:number], bounds[number] + move, *bounds[number + 1 :]]
                if all(a < b for a, b in pairwise(moved)):
                    steps.append(_plan(moved, replicas, start.policy))
        for giver, count in enumerate(replicas):
            for taker in range(len(replicas)):
                if count > 1 and giver != taker:
                    changed = [r - (i == giver) + (i == taker) for i, r in enumerate(replicas)]
                    steps.append(_plan(bounds, changed, start.policy))
        found = min(
            ((seconds(step, profile, topology), step) for step in steps), key=lambda pair: pair[0], default=best
        )
        if found[0] >= best[0] * (1 - 1e-9):
            return best
        best = found


def _plan(bounds: list[int], replicas: list[int], policy: str) -> Plan:
    m = microbatches_for(policy, tuple(replicas), None, sum(replicas))
    return Plan.manual([range(a, b) for a, b in pairwise(bounds)], replicas=replicas, policy=policy, microbatches=m)


if __name__ == "__main__":
    main()
