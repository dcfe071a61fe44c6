"""CartPole-v1 and Reacher-v5: an ensemble learned from few steps, beside oracle dynamics under the same planner.

CartPole: 1,200 environment steps (random ones, then planned episodes), mean length of ten episodes from the starts
9000-9009. Reacher: random steps alone, 30 starts, success by the world's predicate (the tip within .05 of the target on
average over the last ten steps); the oracle is MuJoCo itself, and where the model falls short of it by more than ten
points, the failure taxonomy says of what kind each failed episode is. One record per arm and seed in
``runs/world_control.jsonl``; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.coherence import coherence
from telltale.world.failures import failures
from telltale.world.metrics import bootstrap
from telltale.world.prediction import predict_held_out

RECORDS = Path("runs/world_control.jsonl")
CARTPOLE, REACHER = "physical/CartPole-v1", "physical/Reacher-v5"
STEPS = {CARTPOLE: 1200, REACHER: 4000}
STARTS = {CARTPOLE: 10, REACHER: 30}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--world", choices=[CARTPOLE, REACHER], action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines(RECORDS)
    done = {(r["world"], r["arm"], r["seed"]) for r in records}
    for name in arguments.world or [CARTPOLE, REACHER]:
        place = world.make(name)
        # oracle dynamics do not depend on the seed of learning, so one run of the planner shows what it can do
        wanted = [("oracle", 0), *(("ensemble", seed) for seed in range(arguments.seeds))]
        for arm, seed in wanted:
            if (name, arm, seed) not in done:
                record = {"world": name, "arm": arm, "seed": seed, **measured(place, name, arm, seed)}
                records.append(record)
                print({k: v for k, v in record.items() if k != "returns"}, flush=True)
    found = list(records)
    write_result("world_control", steps=STEPS, starts=STARTS, summary=summary(found), runs=found)


def measured(place: Any, name: str, arm: str, seed: int) -> dict[str, Any]:
    """Returns, ASR, length of episodes, what learning cost, and why episodes failed."""
    start = time.process_time()
    learning: dict[str, Any] = {}
    if arm == "oracle":
        model = place.oracle()
    elif name == CARTPOLE:
        model, data = world.learn(place, "ensemble", steps=STEPS[name], mode="report", seed=seed)
        learning["learning_returns"] = [float((data.episodes == n).sum()) for n in data.episodes.unique()]
    else:
        model = world.fit("ensemble", world.collect(place, steps=STEPS[name], seed=seed), world=place, seed=seed)
    if arm != "oracle":
        learning["learning_cpu_seconds"] = time.process_time() - start
        held_out = world.collect(place, steps=1000, seed=900 + seed)
        predicted = predict_held_out(model, place, held_out)
        learning |= {"r_squared_of_change": predicted.r_squared, "coverage": predicted.coverage}
    mode = "project" if name == REACHER and arm != "oracle" else "report"
    found = world.evaluate(model, place, episodes=STARTS[name], mode=mode, seed=seed)
    if name == REACHER and arm != "oracle" and found.asr < 0.9:
        certificate = world.certify(model, place, 2, episodes=STARTS[name], mode=mode, seed=seed)
        labels = [failure.label for failure in failures(certificate, model, place)]
        learning |= {"failures": dict(Counter(labels)), "certificate": certificate.summary()}
    if arm != "oracle":
        horizon = int(found.planner["horizon"])
        ahead = coherence(model, place, [r.episode for r in found.records], length=horizon, mode=mode, seed=seed)
        learning |= {"error_at_horizon": ahead.errors[horizon - 1], "raw_violations": ahead.raw}
    return {
        "asr": found.asr,
        "successes": found.successes,
        "returns": found.returns,
        "length": sum(len(r.episode) for r in found.records) / len(found.records),
        "evaluation_cpu_seconds": found.cpu_seconds,
        **learning,
    }


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per world and arm: ASR and mean return by seed, and the interquartile mean over seeds with its interval."""
    out: dict[str, Any] = {}
    for name, arm in dict.fromkeys((r["world"], r["arm"]) for r in records):
        rows = [r for r in records if (r["world"], r["arm"]) == (name, arm)]
        entry: dict[str, Any] = {"asr": [r["asr"] for r in rows], "length": [r["length"] for r in rows]}
        for key, values in (
            ("asr_iqm", entry["asr"]),
            ("return_iqm", [sum(r["returns"]) / len(r["returns"]) for r in rows]),
        ):
            spread = bootstrap(values)
            entry[key] = [spread.estimate, spread.low, spread.high]
        out[f"{name} {arm}"] = entry
    return out


if __name__ == "__main__":
    main()
