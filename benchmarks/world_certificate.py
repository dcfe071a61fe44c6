"""What a level-2 certificate of Pendulum costs, and what it says: 30 paired starts, one horizon, 16 environments batched.

The ensembles are those that ``benchmarks/world_pendulum.py`` learned from 1,200 environment steps, kept under ``runs``;
beside seed 0 its copy that is deaf to actions. CPU-seconds are process time of one thread; the part that planning and
stepping in the model and in the oracle takes is given apart.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.failures import failures
from world_pendulum import experienced

RECORDS = "runs/world_certificate.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = world.make("physical/Pendulum-v1")
    records = JsonLines(RECORDS)
    done = {(r["arm"], r["seed"]) for r in records}
    wanted = [("ensemble", 0), ("deaf to actions", 0), *(("ensemble", seed) for seed in range(1, arguments.seeds))]
    for arm, seed in wanted:
        if (arm, seed) not in done:
            record = {"arm": arm, "seed": seed, **certified(place, arm, seed)}
            records.append(record)
            print(record, flush=True)
    found = list(records)
    write_result("world_certificate", starts=30, horizon=20, batch=16, runs=found)


def certified(place: Any, arm: str, seed: int) -> dict[str, Any]:
    """The certificate's summary, and where its time went."""
    model, data = experienced(place, seed)
    if arm != "ensemble":
        model = world.fit("ensemble", data, world=place, seed=seed, hears_actions=False)
    found = world.certify(model, place, 2, episodes=30, horizon=20, fitted_on=data, seed=seed)
    assert found.evaluation is not None
    assert found.oracle is not None
    return {
        **found.summary(),
        "model_cpu_seconds": found.evaluation.cpu_seconds,
        "oracle_cpu_seconds": found.oracle.cpu_seconds,
        "failures": [failure.label for failure in failures(found, model, place)],
    }


if __name__ == "__main__":
    main()
