"""Pendulum-v1 from 1,200 environment steps: an ensemble that plans, and the same network deaf to its actions beside it.

Per seed: one random and five planned episodes, the ensemble fitted on them, and a copy fitted on the same data without the
action among its inputs. Both act from the ten starts 9000-9009. Seed 0 adds arms that tell the causes apart: no law
projection, random data, oracle dynamics, and oracle dynamics with a horizon of 5. One record per arm and seed in
``runs/world_pendulum.jsonl``; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines, write_json
from telltale.world.coherence import coherence
from telltale.world.counterfactuals import sensitivity
from telltale.world.metrics import bootstrap
from telltale.world.prediction import predict_held_out
from telltale.world.worlds.base import Episode

RECORDS = Path("runs/world_pendulum.jsonl")
FOLDER = Path("runs/world_pendulum")
STEPS = 1200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines(RECORDS)
    done = {(r["arm"], r["seed"]) for r in records}
    place = world.make("physical/Pendulum-v1")
    for seed in range(arguments.seeds):
        names = ["ensemble, projected", "deaf to actions, projected"]
        if seed == 0:
            names += ["oracle", "oracle, horizon 5", "ensemble, no projection", "random data, projected"]
        if all((name, seed) in done for name in names):
            continue
        model, data = experienced(place, seed)
        for name in names:
            if (name, seed) not in done:
                record = {"arm": name, "seed": seed, **measured(place, name, model, data, seed)}
                records.append(record)
                print({k: v for k, v in record.items() if k != "returns"}, flush=True)
    found = list(records)
    learning = {seed: json.loads((FOLDER / str(seed) / "cost.json").read_text()) for seed in range(arguments.seeds)}
    write_result("world_pendulum", steps=STEPS, summary=summary(found), learning=learning, runs=found)


def experienced(place: Any, seed: int) -> tuple[Any, Any]:
    """The ensemble of a seed and its transitions, learned once and kept under ``runs/world_pendulum``."""
    folder = FOLDER / str(seed)
    if not (folder / "cost.json").exists():
        start = time.process_time()
        model, data = world.learn(place, "ensemble", steps=STEPS, seed=seed)
        cost = {"learning_cpu_seconds": time.process_time() - start, "learning_returns": returns_of(data)}
        world.save_model(model, folder / "model")
        data.save(folder / "data")
        write_json(folder / "cost.json", cost)
    return world.load_model(folder / "model"), world.Transitions.load(folder / "data")


def returns_of(data: Any) -> list[float]:
    """Total reward of each episode of the experience: one random, then the planned ones."""
    return [float(data.rewards[data.episodes == number].sum()) for number in data.episodes.unique()]


def measured(place: Any, name: str, model: Any, data: Any, seed: int) -> dict[str, Any]:
    """One arm: returns, ASR, one-step R2, divergence against the oracle, errors by horizon, violations."""
    horizon, mode = 20, "project"
    if name.startswith("deaf"):
        model = world.fit("ensemble", data, world=place, seed=seed, hears_actions=False)
    elif name.startswith("random"):
        model = world.fit("ensemble", world.collect(place, steps=STEPS, seed=seed + 500), world=place, seed=seed)
    elif name.startswith("oracle"):
        model, mode, horizon = place.oracle(), "report", 5 if "5" in name else 20
    elif "no projection" in name:
        mode = "report"
    found = world.evaluate(model, place, episodes=10, mode=mode, horizon=horizon, seed=seed)
    held_out = world.collect(place, steps=1000, seed=900 + seed)
    predicted = predict_held_out(model, place, held_out)
    generator = torch.Generator().manual_seed(seed)
    starts = held_out.before[torch.randint(len(held_out), (40,), generator=generator)]
    sequences = [torch.rand(20, 1, generator=generator) * 4 - 2 for _ in range(40)]
    probes = sensitivity(
        model,
        place.oracle(),
        list(starts),
        sequences,
        [torch.tensor([2.0]), torch.tensor([-2.0])],
        embed=place.embed,
        steps=[1],
    )
    played: list[Episode] = [record.episode for record in found.records]
    ahead = coherence(model, place, played, length=50, mode=mode)
    return {
        "asr": found.asr,
        "return_mean": sum(found.returns) / len(found.returns),
        "returns": found.returns,
        "one_step_r_squared": of_next_state(model, held_out),
        "r_squared_of_change": predicted.r_squared,
        "coverage": predicted.coverage,
        "divergence": sum(probes.divergence) / 40,
        "oracle_divergence": sum(probes.oracle) / 40,
        "direction": sum(probes.direction) / max(1, len(probes.direction)),
        "null": probes.null,
        "error_5_20_50": [ahead.errors[h - 1] for h in (5, 20, 50)],
        "raw_violations": ahead.raw,
        "enforced_violations": ahead.enforced,
        "evaluation_cpu_seconds": found.cpu_seconds,
    }


def of_next_state(model: Any, held_out: Any) -> float:
    """R2 of the next state, mean over columns: the flattering figure, since most of a next state is the state before."""
    after = model.step(held_out.before, held_out.actions).belief
    return float(1 - ((held_out.after - after).pow(2).mean(0) / held_out.after.var(0, unbiased=False)).mean())


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: ASR by seed, and the interquartile mean of the seeds' mean returns with its interval."""
    out = {}
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        spread = bootstrap([r["return_mean"] for r in rows])
        out[arm] = {
            "seeds": len(rows),
            "asr": [r["asr"] for r in rows],
            "return_iqm": spread.estimate,
            "return_interval": [spread.low, spread.high] if len(rows) > 1 else None,
            "one_step_r_squared": [r["one_step_r_squared"] for r in rows],
            "divergence": [r["divergence"] for r in rows],
            "direction": [r["direction"] for r in rows],
        }
    return out


if __name__ == "__main__":
    main()
