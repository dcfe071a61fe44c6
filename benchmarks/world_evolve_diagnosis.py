"""Diagnosis of injected faults: in dynamics, observation, reward and termination of CartPole, and in none; and of a pendulum.

The fault is drawn by seed (which column, how much), the evidence is 400 random steps of the real engine under it, the operators are
an ensemble (CartPole) or identified motion (pendulum), the known reward, and the known termination. What may be swapped in:
dynamics refitted on half of the evidence, and corrections. ``confident errors`` name another component than the one at fault.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.evolve.diagnosis import CANNOT_TELL, Operators, diagnose
from telltale.world.evolve.structure import identify
from telltale.world.transitions import Transitions

FAULTS = ("dynamics", "observation", "reward", "termination", "none")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=10, help="per fault, seed and world")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines("runs/world_evolve_diagnosis.jsonl")
    done = {(r["world"], r["seed"]) for r in records}
    for seed in range(arguments.seeds):
        for name, part in (("physical/Pendulum-v1", pendulum), ("physical/CartPole-v1", cartpole)):
            if (name, seed) not in done:
                began = time.process_time()
                rows = part(seed, arguments.trials)
                cost = time.process_time() - began
                records.append({"world": name, "seed": seed, "rows": rows, "cpu_seconds": cost})
                print(name, seed, Counter((r["fault"], r["said"]) for r in rows), flush=True)
            runs = list(records)
            write_result("world_evolve_diagnosis", settings=vars(arguments), summary=summary(runs), runs=runs)


def pendulum(seed: int, trials: int) -> list[dict[str, Any]]:
    """Three faults of a pendulum: it has no termination."""
    place = world.make("physical/Pendulum-v1")
    model = world.fit("motion", world.collect(place, steps=300, seed=seed), world=place)
    reference = world.collect(place, steps=400, seed=100 + seed)
    operators = Operators(model, None, place.reward, None)
    rows = []
    for fault in FAULTS:
        for trial in range(trials if fault != "termination" else 0):
            rng = random.Random(f"{seed} {fault} {trial}")
            gain = rng.choice([-1.0, rng.uniform(0.3, 0.7), rng.uniform(1.3, 2.0)]) if fault == "dynamics" else 1.0
            engine = world.make("physical/Pendulum-v1", gain=gain)
            data = world.collect(engine, steps=400, seed=1000 + 100 * seed + trial)
            data = disturbed(data, fault, rng)
            said = diagnose(operators, reference, data, refit=lambda half: [identify(model, half)])
            rows.append({"fault": fault, "said": said.component, "explained": said.explained})
    return rows


def cartpole(seed: int, trials: int) -> list[dict[str, Any]]:
    """All four faults of CartPole."""
    place = world.make("physical/CartPole-v1")
    quick = {"members": 2, "hidden": 32, "epochs": 60}
    model = world.fit("ensemble", world.collect(place, steps=1500, seed=seed), world=place, seed=seed, **quick)
    reference = world.collect(place, steps=400, seed=100 + seed)
    reference = replace(reference, rewards=paid(reference))

    def reward(before: Any, action: Any, after: Any) -> Any:
        return 1.0 - 0.1 * (after[..., 0] / 2.4) ** 2 - 0.1 * (after[..., 2] / 0.2095) ** 2

    operators = Operators(model, None, reward, place.terminated)
    rows = []
    for fault in FAULTS:
        for trial in range(trials):
            rng = random.Random(f"{seed} {fault} {trial}")
            data = played(rng, fault, 1000 + 100 * seed + trial)
            data = replace(data, rewards=paid(data))
            data = disturbed(data, fault, rng)
            said = diagnose(
                operators, reference, data,
                refit=lambda half: [world.fit("ensemble", half, world=place, seed=seed, **{**quick, "epochs": 200})],
            )  # fmt: skip
            rows.append({"fault": fault, "said": said.component, "explained": said.explained})
    return rows


def played(rng: random.Random, fault: str, seed: int) -> Transitions:
    """600 random steps of Gymnasium's CartPole, its force or its limits changed."""
    import gymnasium

    environment = gymnasium.make("CartPole-v1")
    if fault == "dynamics":
        environment.unwrapped.force_mag *= rng.choice([-1.0, rng.uniform(0.3, 0.6), rng.uniform(1.5, 2.5)])
    if fault == "termination":
        environment.unwrapped.theta_threshold_radians = rng.uniform(4, 8) * 2 * math.pi / 360
    place = world.make(environment, success_return=450, columns=("position", "velocity", "angle", "angular velocity"))
    data = world.collect(place, steps=600, seed=seed)
    return replace(data, world="physical/CartPole-v1")


def paid(data: Transitions) -> Any:
    """A reward that depends on the state, in the place of CartPole's constant one."""
    return 1.0 - 0.1 * (data.after[:, 0] / 2.4) ** 2 - 0.1 * (data.after[:, 2] / 0.2095) ** 2


def disturbed(data: Transitions, fault: str, rng: random.Random) -> Transitions:
    """Observation: one column scaled or shifted in every reading. Reward: scaled or shifted."""
    if fault == "observation":
        column, shifted = rng.randrange(data.before.shape[1]), rng.random() < 0.5
        spread = float(data.before[:, column].std())
        factor = 1.0 if shifted else rng.choice([-1.0, rng.uniform(0.4, 0.7), rng.uniform(1.4, 2.0)])
        shift = rng.choice([-1, 1]) * rng.uniform(0.5, 1.5) * spread if shifted else 0.0
        sides = {}
        for name in ("before", "after"):
            rows = getattr(data, name).clone()
            rows[:, column] = factor * rows[:, column] + shift
            sides[name] = rows
        return replace(data, **sides)
    if fault == "reward":
        changed = data.rewards * rng.uniform(1.3, 2.0) if rng.random() < 0.5 else data.rewards + rng.uniform(0.3, 1.0)
        return replace(data, rewards=changed)
    return data


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Right, cannot tell, confidently wrong, by fault."""
    rows = [row for run in runs for row in run["rows"]]
    table: dict[str, Any] = {}
    for fault in FAULTS:
        said = Counter(row["said"] for row in rows if row["fault"] == fault)
        total = sum(said.values())
        right = said[CANNOT_TELL if fault == "none" else fault]
        table[fault] = {"trials": total, "right": right, "cannot_tell": said[CANNOT_TELL], "said": dict(said)}
    wrong = sum(row["said"] not in (row["fault"], CANNOT_TELL) for row in rows)
    right = sum(row["said"] == (CANNOT_TELL if row["fault"] == "none" else row["fault"]) for row in rows)
    return {
        "trials": len(rows), "right": right / len(rows), "right_or_cannot_tell": 1 - wrong / len(rows),
        "confident_errors": wrong / len(rows), "by_fault": table,
    }  # fmt: skip


if __name__ == "__main__":
    main()
