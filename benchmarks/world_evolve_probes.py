"""Do designed probes teach more than chance? Three arms get the same steps in a changed world, on top of the same evidence.

What is compared is the error of the structural candidate that each arm's evidence gives. It was declared before any arm was run
with it, one measure for all regimes: the error where decisions are made. States are those that the oracle's planner visits
after the change, each with every action (a grid of five for a continuous one), and the oracle says what follows. That is what the
evidence is for: a revised model plans, and a planner asks it about all actions in the states on the way to the goal. The error on
2,000 random steps, the measure of before, favours random evidence (it is drawn from the same distribution) and stands beside it.

``random``: uniform actions in whole episodes. ``restarted``: uniform actions in episodes as short as those of the probes, so
that what probes gain by beginning anew shows apart from what they gain by choosing actions. ``corners``: the same episodes, but
a random corner of the space of actions, held for five steps, which is what an engineer tries without any hypothesis. Numeric
measurements get noise of 2% of the changes, so that where one measures matters; hypotheses about equations take it for that before
there is evidence, and in rows of their own for .5% and 10%. Trials of one seed share a founding model: intervals are over seeds.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from measurement import write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.signals.statistics import clustered_mean
from telltale.world.collection import episodes as play_randomly
from telltale.world.evolve import hypotheses
from telltale.world.evolve.exploration import explore
from telltale.world.evolve.gates import errors
from telltale.world.evolve.revision import candidates
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import run_episode

MUCH = "digital, much evidence"
"""A program after 200 transitions and 300 steps, when random evidence leaves next to no error."""
REGIMES: dict[str, dict[str, Any]] = {
    "physical": {
        "world": "physical/Pendulum-v1", "change": {"gain": -1.0}, "kind": "motion", "count": 300, "fit": {}, "probing": (3, 4),
        "planner": {"samples": 32},
    },
    "drag": {
        "world": "physical/Pendulum-v1", "change": {"drag": 0.18}, "kind": "motion", "count": 300, "fit": {}, "probing": (20, 60),
        "planner": {"samples": 32},
    },
    "digital": {
        "world": "digital/orders", "change": {"migrated": True}, "kind": "program", "count": 600, "fit": {}, "probing": (50, 150),
        "planner": {},
    },
    MUCH: {
        "world": "digital/orders", "change": {"migrated": True}, "kind": "program", "count": 600, "fit": {}, "probing": (200, 300),
        "planner": {},
    },
    "scientific": {
        "world": "scientific/lotka_volterra", "change": {"harvested": "both"}, "kind": "sindy", "count": 300, "fit": {"hold": 30},
        "probing": (3, 4), "planner": {"samples": 24, "horizon": 20},
    },
}  # fmt: skip
"""World, change, founding model, and (transitions known before the probes, steps of probes)."""
NOISE = 0.02
"""Standard deviation of a measurement, as a share of the changes on random steps."""
ASSUMED = {
    f"{regime}, noise taken for {share:.1%}": (regime, share)
    for regime in ("physical", "drag", "scientific") for share in (0.005, 0.1)
}  # fmt: skip
"""Rows in which hypotheses assume another noise than that of the measurements."""
HELD = 5
"""Steps for which a corner is held."""
ARMS = ("probes", "random", "restarted", "corners")
MEASURES = ("decisions", "random steps")
"""The first one decides."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--regimes", nargs="+", choices=[*REGIMES, *ASSUMED], default=[*REGIMES, *ASSUMED])
    parser.add_argument("--records", default="runs/world_evolve_probes.jsonl")
    parser.add_argument("--no-result", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines(arguments.records)
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for regime in arguments.regimes:
            if not any((r["regime"], r["seed"]) == (regime, seed) for r in records):
                began = time.process_time()
                trials = probing(regime, seed, arguments.trials)
                cost = time.process_time() - began
                records.append({"regime": regime, "seed": seed, "trials": trials, "cpu_seconds": cost})
                print(regime, seed, f"{cost:.0f} s", flush=True)
        if not arguments.no_result:
            runs = list(records)
            seeds = sorted({r["seed"] for r in runs})
            write_result("world_evolve_probes", measure=MEASURES[0], seeds=seeds, summary=summary(runs), runs=runs)
    found = summary(list(records))
    for regime, row in found.items():
        for measure in MEASURES:
            print(regime, row["trials"], measure, row[measure], flush=True)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """By regime and measure: mean errors of the arms, and the gain over random steps with its lower 95% bound over seeds."""
    found: dict[str, Any] = {}
    for regime in [*REGIMES, *ASSUMED]:
        mine = [(r["seed"], trial) for r in records if r["regime"] == regime for trial in r["trials"]]
        if not mine:
            continue
        found[regime] = {"trials": len(mine), "evidence_and_steps": _plan(regime)["probing"]}
        for measure in MEASURES:
            arms = [arm for arm in ARMS if arm in mine[0][1]]
            table = {arm: [trial[arm][measure] for _, trial in mine] for arm in arms}
            row: dict[str, Any] = {arm: sum(side) / len(side) for arm, side in table.items()}
            for arm in arms[1:]:
                gains = [b - a for a, b in zip(table["probes"], table[arm], strict=True)]
                bound = clustered_mean(gains, [seed for seed, _ in mine], level=0.9)
                row[f"over {arm}"] = {
                    "gain": bound.value, "low": bound.low, "wins": sum(g > 0 for g in gains), "losses": sum(g < 0 for g in gains),
                }  # fmt: skip
            found[regime][measure] = row
    return found


def probed(regime: str, seed: int) -> list[tuple[float, float]]:
    """(error after probes, error after random steps) where decisions are made, in trials of a life's seed, made once and kept."""
    records = JsonLines("runs/world_evolve_probes.jsonl")
    if not any((r["regime"], r["seed"]) == (regime, seed) for r in records):
        began = time.process_time()
        trials = probing(regime, seed)
        records.append({
            "regime": regime, "seed": seed, "trials": trials, "cpu_seconds": time.process_time() - began,
        })  # fmt: skip
    kept = next(r["trials"] for r in records if (r["regime"], r["seed"]) == (regime, seed))
    return [tuple(trial[arm][MEASURES[0]] for arm in ARMS[:2]) for trial in kept]


def probing(regime: str, seed: int, trials: int = 10) -> list[dict[str, dict[str, float]]]:
    """Errors of the structural candidate after each arm's steps, by measure, trial by trial."""
    plan = _plan(regime)
    regime, hypotheses.NOISE = ASSUMED.get(regime, (regime, NOISE))
    before, after = world.make(plan["world"]), world.make(plan["world"], **plan["change"])
    evidence = world.collect(before, steps=plan["count"], seed=500 + seed, **plan["fit"])
    model = world.fit(plan["kind"], evidence, world=before)
    tests = dict(zip(MEASURES, (decisions(regime), world.collect(after, steps=2000, seed=4000 + seed)), strict=True))
    change = tests["random steps"]
    scale = None if change.plain else NOISE * (change.after - change.before).pow(2).mean(0).sqrt()
    known, budget = plan["probing"]
    found = []
    for trial in range(trials):
        number = 100 * seed + 50 + trial
        meter = Meter(scale, number)
        start = meter(after, play_randomly(after, steps=known, seed=10_000 + number))
        found_out = explore(model, after, start, budget=budget, laws=[], read=meter, seed=number)
        short = [
            play_randomly(after, steps=len(episode), seed=50_000 + 1000 * number + i)[0]
            for i, episode in enumerate(found_out.episodes)
        ]
        sides = [
            found_out.data,
            meter(after, play_randomly(after, steps=budget, seed=20_000 + number)),
            meter(after, short),
        ]
        if not after.discrete:
            sides.append(
                meter(after, cornered(after, [len(e) for e in found_out.episodes], seed=60_000 + 1000 * number))
            )
        row = {}
        for arm, side in zip(ARMS, sides, strict=False):
            made = candidates(model, after, start.joined(side), seed=seed, only=["structure"])[0]
            revised = made[0].model if made else model
            row[arm] = {name: float(errors(revised, test).mean()) for name, test in tests.items()}
        found.append(row)
    return found


def _plan(row: str) -> dict[str, Any]:
    return REGIMES[ASSUMED.get(row, (row,))[0]]


def cornered(place: Any, lengths: list[int], seed: int) -> list[Any]:
    """Episodes of these lengths; every :data:`HELD` steps a corner of the space of actions is drawn, and held."""
    low, high = place.action_space.low, place.action_space.high
    found = []
    for number, length in enumerate(lengths):
        draw = np.random.default_rng([seed, number])
        held = [np.where(draw.random(low.shape) < 0.5, low, high).astype(low.dtype) for _ in range(0, length, HELD)]
        steps = iter([corner for corner in held for _ in range(HELD)])
        engine = place.spawn()
        found.append(run_episode(engine, seed + number, lambda _, steps=steps: next(steps), max_steps=length))
        engine.close()
    return found


@functools.cache
def decisions(regime: str, episodes: int = 6, most: int = 300) -> Transitions:
    """States of planned episodes under oracle dynamics after the change, at most ``most`` spread evenly, each with every action."""
    plan = REGIMES[regime]
    after = world.make(plan["world"], **plan["change"])
    oracle = after.oracle()
    starts = range(600_000, 600_000 + (100 if after.plain else episodes))
    played = world.evaluate(oracle, after, seeds=starts, mode="project", **plan["planner"]).records
    states = [after.belief(o) for record in played for o in record.episode.observations[:-1]]
    if after.plain:
        states = list(dict.fromkeys(states))
    states = states[:: max(1, len(states) // most)][:most]
    if after.plain:
        pairs = [(state, action) for state in states for action in range(after.action_width)]
        before: Any = [state for state, _ in pairs]
        actions = torch.tensor([action for _, action in pairs])
        ahead: Any = [oracle.step(state, action).belief for state, action in pairs]
    else:
        low, high = float(after.action_space.low.min()), float(after.action_space.high.max())
        grid = torch.linspace(low, high, 5).unsqueeze(1)
        before = torch.stack(states).repeat_interleave(len(grid), 0)
        actions = grid.repeat(len(states), 1)
        ahead = oracle.step(before, actions).belief
    count = len(actions)
    return Transitions(
        after.id, before, actions, torch.zeros(count), ahead, torch.zeros(count, dtype=torch.bool), torch.arange(count)
    )


class Meter:
    """Measures transitions: the next state with noise of standard deviation ``scale`` (D,); plain states as they are."""

    def __init__(self, scale: Any, seed: int) -> None:
        self.scale, self.generator = scale, torch.Generator().manual_seed(seed)

    def __call__(self, place: Any, episodes: Any) -> Transitions:
        data = Transitions.from_episodes(place, episodes)
        if self.scale is None:
            return data
        return replace(data, after=data.after + self.scale * torch.randn(data.after.shape, generator=self.generator))


if __name__ == "__main__":
    main()
