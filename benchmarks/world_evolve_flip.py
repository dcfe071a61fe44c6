"""A pendulum whose actuator changes polarity (E5), and one that is given drag that no hypothesis of the structural arm holds.

Per model seed an ensemble is fitted on 1,200 random steps and calibrated on 2,000 planned ones. Then, four runs a seed: 1,200
in-law planned steps (false alarms), and planned steps after the flip (delay); with the blocks in the order of time, and in random
order within the episodes of a round (six in law, one after the flip), which is how a life takes them. Recovery after the flip:
parameters identified on 2 to 10 transitions; the network refitted from scratch while it plans, 1,000 transitions. Drag: the same
structural arm and structural growth on 400 transitions, the network on 1,000. Success is judged on starts 9000 and on, with 48
samples a plan.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from measurement import machine, write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.evolve.monitor import (
    Monitor,
    block_means,
    column_scale,
    false_alarm_rate,
    residuals,
    shuffled,
    step_scores,
)
from telltale.world.evolve.structure import error_of, grow, identify
from telltale.world.transitions import Transitions

SAMPLES = 48
ORDERS = ("random", "time")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines("runs/world_evolve_flip.jsonl")
    done = {(r["part"], r["seed"]) for r in records}
    for seed in range(arguments.seeds):
        for name in arguments.parts:
            if (name, seed) not in done:
                began = time.process_time()
                found = PARTS[name](seed, arguments)
                cost = {"cpu_seconds": time.process_time() - began, "commit": machine()["commit"]}
                records.append({"part": name, "seed": seed, **found, **cost})
                print(name, seed, found, flush=True)
    runs = list(records)
    watched = [r for r in runs if r["part"] == "monitored"]
    write_result(
        "world_evolve_flip", settings=vars(arguments), summary=summary(watched, runs), runs=runs,
        simulated={str(t): false_alarm_rate(120, threshold=t, runs=4000) for t in (100, 1000, 10000)}, alike=alike(),
    )  # fmt: skip


def planned(model: Any, place: Any, first: int, count: int, seed: int) -> Transitions:
    """Transitions of planned episodes."""
    found = world.evaluate(
        model, place, seeds=range(first, first + count), mode="project", samples=SAMPLES, seed=seed, batch=16
    )
    return Transitions.from_episodes(place, [record.episode for record in found.records])


def monitored(seed: int, arguments: Any) -> dict[str, Any]:
    """False alarms in 1,200 in-law steps, and the delay after the flip."""
    place, flipped = world.make("physical/Pendulum-v1"), world.make("physical/Pendulum-v1", gain=-1.0)
    model = world.fit("ensemble", world.collect(place, steps=1200, seed=seed), world=place, seed=seed)
    reference = planned(model, place, 100_000, 10, seed)
    scale = column_scale(reference, residuals(model, reference))
    calibration = block_means(step_scores(residuals(model, reference), scale), 10)
    in_law = planned(model, place, 200_000, 6 * arguments.runs, seed)
    after = planned(model, flipped, 300_000, arguments.runs, seed)
    usual, changed = (step_scores(residuals(model, data), scale) for data in (in_law, after))
    found: dict[str, Any] = {}
    for order in ORDERS:
        alarms, delays = [], []
        for run in range(arguments.runs):
            sides = usual[run * 1200 : (run + 1) * 1200], changed[run * 200 : (run + 1) * 200]
            if order == "random":
                sides = tuple(shuffled(side, 10, seed=[seed, run, n]) for n, side in enumerate(sides))
            watch = Monitor(calibration, seed=seed * 100 + run)
            alarms.append(watch.update(sides[0]))
            if alarms[-1] is None:  # a change meets a watch that has been running
                delay = watch.update(sides[1])
                delays.append(None if delay is None else delay - 1200)
        found[order] = {"false_alarms": alarms, "delays": delays}
    return found


def alike(runs: int = 2000) -> list[dict[str, float]]:
    """Share of watches of 120 blocks that alarm without a change where blocks of an episode are alike: six episodes of twenty, the
    reference ten of them; ``spread``: how much episodes differ, over how much the blocks of one do."""
    rows = []
    for spread in (0.0, 0.5, 1.0):
        row = {"spread": spread}
        for order in ORDERS:
            rng, found = np.random.default_rng(0), 0
            for run in range(runs):
                reference, blocks = (
                    (spread * rng.standard_normal((n, 1)) + rng.standard_normal((n, 20))).ravel() for n in (10, 6)
                )
                watched = rng.permutation(blocks) if order == "random" else blocks
                found += Monitor(reference.tolist(), block=1, seed=run).update(watched.tolist()) is not None
            row[order] = found / runs
        rows.append(row)
    return rows


def structural(seed: int, arguments: Any) -> dict[str, Any]:
    """Parameters identified on few transitions after the flip."""
    place, flipped = world.make("physical/Pendulum-v1"), world.make("physical/Pendulum-v1", gain=-1.0)
    model = world.fit("motion", world.collect(place, steps=300, seed=seed), world=place)
    test = world.collect(flipped, steps=1000, seed=900 + seed)
    errors = {}
    for count in (2, 3, 5, 10):
        found = identify(model, world.collect(flipped, steps=count, seed=50 + seed))
        errors[str(count)] = error_of(found, test)
    return {
        "errors": errors, "stale_error": error_of(model, test), "coefficients": found.coefficients[2].tolist(),
        "asr": asr(found, flipped, arguments), "stale_asr": asr(model, flipped, arguments),
        "oracle_asr": asr(flipped.oracle(), flipped, arguments),
    }  # fmt: skip


def network(seed: int, arguments: Any) -> dict[str, Any]:
    """The network from scratch: a fifth of the transitions by chance, the rest by planning with each refit."""
    flipped = world.make("physical/Pendulum-v1", gain=-1.0)
    model, data = world.learn(flipped, "ensemble", steps=arguments.steps, first_steps=200, seed=seed, planner="cem")
    return {"transitions": len(data), "asr": asr(model, flipped, arguments)}


def drag(seed: int, arguments: Any) -> dict[str, Any]:
    """Drag below the pivot: outside of the structural arm's terms."""
    place, thick = world.make("physical/Pendulum-v1"), world.make("physical/Pendulum-v1", drag=0.18)
    model = world.fit("motion", world.collect(place, steps=300, seed=seed), world=place)
    data = world.collect(thick, steps=400, seed=50 + seed)
    test = world.collect(thick, steps=1000, seed=900 + seed)
    arms = {
        "stale": model, "parameters": identify(model, data), "growth, degree 2": grow(model, data),
        "growth, degree 3": grow(model, data, degree=3), "oracle": thick.oracle(),
    }  # fmt: skip
    arms["network"] = world.learn(thick, "ensemble", steps=arguments.steps, first_steps=200, seed=seed)[0]
    return {
        "errors": {name: error_of(arm, test) for name, arm in arms.items()},
        "asr": {name: asr(arm, thick, arguments) for name, arm in arms.items()},
    }


def asr(model: Any, place: Any, arguments: Any) -> float:
    """Success over starts 9000 and on."""
    return world.evaluate(model, place, episodes=arguments.episodes, mode="project", samples=SAMPLES).asr


def summary(watched: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the issue."""
    alarms = {order: [a for r in watched if order in r for a in r[order]["false_alarms"]] for order in ORDERS}
    delays = {order: [d for r in watched if order in r for d in r[order]["delays"]] for order in ORDERS}

    def of(part: str) -> list[dict[str, Any]]:
        return [r for r in runs if r["part"] == part]

    return {
        "watches": {order: len(side) for order, side in alarms.items()},
        "quiet": {order: sum(a is None for a in side) for order, side in alarms.items()},
        "detected": {order: sum(d is not None for d in side) for order, side in delays.items()}, "delays": delays,
        "structural_asr": [r["asr"] for r in of("structural")], "stale_asr": [r["stale_asr"] for r in of("structural")],
        "oracle_asr": [r["oracle_asr"] for r in of("structural")],
        "structural_error_at_10": [r["errors"]["10"] for r in of("structural")],
        "network_asr": [r["asr"] for r in of("network")],
        "drag_asr": [r["asr"] for r in of("drag")], "drag_errors": [r["errors"] for r in of("drag")],
    }  # fmt: skip


PARTS = {"monitored": monitored, "structural": structural, "network": network, "drag": drag}


if __name__ == "__main__":
    main()
