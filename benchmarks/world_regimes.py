"""Digital, social and scientific worlds: what a model predicts, against what can be done with it.

Digital (SQLite order system, 25 starts): network and induced program by number of transitions. Social (Leduc poker, an
opponent that does not adapt): value of the best response to a model of n observed hands, against the true opponent, and
the same response after the opponent changed. Scientific (Lotka-Volterra with harvest): equations (SINDy) and a network,
rolled out from x = 9, outside the data. Five seeds each; one record per seed in ``runs/``, which is not repeated.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.metrics import bootstrap
from telltale.world.models.opponent import observe
from telltale.world.worlds.equations import lotka_volterra_invariant
from telltale.world.worlds.games import BiasedOpponent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["digital", "social", "scientific"], required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part = {"digital": digital, "social": social, "scientific": scientific}[arguments.part]
    records = JsonLines(f"runs/world_{arguments.part}.jsonl")
    done = {record["seed"] for record in records}
    for seed in range(arguments.seeds):
        if seed not in done:
            start = time.process_time()
            rows = part(seed)
            records.append({"seed": seed, "cpu_seconds": time.process_time() - start, "rows": rows})
    found = list(records)
    rows = [row for record in found for row in record["rows"]]
    write_result(
        f"world_{arguments.part}",
        seeds=arguments.seeds,
        cpu_seconds=sum(record["cpu_seconds"] for record in found),
        summary=summary(rows),
        runs=rows,
    )


def digital(seed: int) -> list[dict[str, Any]]:
    """One-step and twelve-step accuracy, raw violations, ASR of plans executed as they are."""
    place = world.make("digital/orders")
    test = world.collect(place, steps=2000, seed=1000 + seed)
    rows = []
    for kind, counts in (("mlp", (300, 700, 1000, 4000)), ("program", (100, 300, 1000))):
        for count in counts:
            rows.append(planned_in(place, test, kind, count, seed))
            print(rows[-1], flush=True)
    return rows


def planned_in(place: Any, test: Any, kind: str, count: int, seed: int) -> dict[str, Any]:
    """One model of the order system, judged on ``test`` and by its plans from 25 starts."""
    model = world.fit(kind, world.collect(place, steps=count, seed=seed), world=place, seed=seed)
    steps = list(zip(test.before, test.actions.tolist(), test.after, strict=True))
    predicted = [model.step(before, action).belief for before, action, _ in steps]
    broken = [
        any(not bool(law.holds(before, action, after)) for law in place.laws)
        for (before, action, _), after in zip(steps[:1000], predicted, strict=False)
    ]
    return {
        "arm": f"{kind}, {count} transitions",
        "seed": seed,
        "asr": world.evaluate(model, place, seeds=range(9000, 9025), nodes=3000).asr,
        "one_step_exact": sum(mine == after for mine, (_, _, after) in zip(predicted, steps, strict=True)) / len(steps),
        "twelve_step_exact": _runs(place, model, test, 12),
        "violations": sum(broken) / len(broken),
    }


def _runs(place: Any, model: Any, test: Any, length: int) -> float:
    """Share of stretches of ``length`` steps whose end is predicted exactly."""
    hits, total = 0, 0
    for start in range(0, len(test) - length, length):
        if test.episodes[start] != test.episodes[start + length - 1]:
            continue
        state = test.before[start]
        for action in test.actions[start : start + length].tolist():
            state = model.step(state, action).belief
        hits, total = hits + (state == test.after[start + length - 1]), total + 1
    return hits / max(1, total)


def social(seed: int) -> list[dict[str, Any]]:
    """Chips per hand, exact, against the true opponent and against another one after a shift."""
    place = world.make("social/leduc_poker", bias=seed, adapts=0.0, hands=60)
    true, shifted = place.oracle().opponent, BiasedOpponent(bias=seed + 100)
    data = world.collect(place, steps=8000, seed=seed)
    hands = [hand["history"] for receipt in data.receipts for hand in receipt.get("hands", ())]
    arms = {"uniform play": None, "best response, oracle": place.best_response(true)}
    arms |= {
        f"best response, {n} hands": place.best_response(observe(place.game_name, hands[:n]))
        for n in (0, 30, 100, 300, 1000, 3000)
    }
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "value": place.value_of(policy, true),
            "value_after_shift": place.value_of(policy, shifted),
        }
        for arm, policy in arms.items()
    ]
    answer = place.best_response(shifted)
    rows.append(
        {
            "arm": "best response to the shifted opponent",
            "seed": seed,
            "value": place.value_of(answer, true),
            "value_after_shift": place.value_of(answer, shifted),
        }
    )
    print(rows, len(hands), flush=True)
    return rows


def scientific(seed: int) -> list[dict[str, Any]]:
    """Relative error over 299 steps from x = 9 with a switched control, and drift of the invariant without one."""
    place = world.make("scientific/lotka_volterra", dt=0.05)
    data = world.collect(place, steps=900, hold=30, seed=seed)
    noisy_place = world.make("scientific/lotka_volterra", dt=0.05, noise=0.05)
    models = {
        "sindy": world.fit("sindy", data, world=place),
        "mlp": world.fit("mlp", data, world=place, seed=seed, epochs=300, patience=40),
        "sindy, 5% noise": world.fit(
            "sindy", world.collect(noisy_place, steps=900, hold=30, seed=seed), world=noisy_place
        ),
    }
    engine = place.spawn()
    rows = []
    for arm, model in models.items():
        engine.reset(0, state=(9.0, 2.0))
        mine, errors = torch.tensor([[9.0, 2.0]]), []
        for t in range(299):
            control = 0.3 if (t // 30) % 2 else 0.0
            real = torch.as_tensor(engine.step([control]).observation, dtype=torch.float32)
            mine = model.step(mine, torch.tensor([[control]])).belief
            errors.append(float((mine[0] - real).norm() / real.norm()))
        free, values = torch.tensor([[9.0, 2.0]]), []
        for _ in range(299):
            free = model.step(free, torch.zeros(1, 1)).belief.clamp(min=1e-3)
            values.append(float(lotka_volterra_invariant(free)))
        predicted = model.step(data.before, data.actions).belief
        nmse = float((predicted - data.after).pow(2).mean() / (data.after - data.before).pow(2).mean())
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "error_outside": sum(errors) / len(errors),
                "worst_error": max(errors),
                "invariant_drift": max(values) - min(values),
                "one_step_nmse": nmse,
            }
        )
        if hasattr(model, "explain"):
            rows[-1]["equations"] = model.explain()
        print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Interquartile mean over seeds, with interval, of every number of every arm."""
    out: dict[str, Any] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        out[arm] = {}
        for name, value in mine[0].items():
            if isinstance(value, float):
                spread = bootstrap([row[name] for row in mine])
                out[arm][name] = {"iqm": spread.estimate, "low": spread.low, "high": spread.high}
    return out


if __name__ == "__main__":
    main()
