"""What a gate lets through: poisoned candidates (three regimes), and candidates that are equal in truth but not in bits.

Poison: evidence of a changed world with a share of its actions recorded falsely. A structural candidate of each seed is judged
against the stale incumbent by gain, interventions, laws and robustness on the gate's own probes; and, made of one half of its
own stream, by the same test of the gain on the half that a hash left out. ``harmful``: let through although the true error (on
fresh evidence) is not at least the gate's margin below the incumbent's. The success check is not played here: what it would stop
is more. Quorum: two sources, one poisoned. Type I: incumbent and 20 candidates are networks fitted on one data set with different
seeds; each of 2,000 simulated registries draws its own incumbent, candidates and gate evidence. Networks of different seeds are not
equal in truth, so this is done three times: as they are (an error is a promotion of one that is not truly better by the margin);
with every candidate's errors scaled so that its true error is the incumbent's; and scaled to the edge of what counts as no gain.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measurement import machine, write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.gates import Gate, GateConfig, errors, gain_of, spent
from telltale.world.evolve.poison import poisoned
from telltale.world.evolve.receipts import PASS
from telltale.world.evolve.revision import candidates
from telltale.world.metrics import agresti_caffo, mean_at_least, paired_difference

CONFIG = GateConfig()
WORLDS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "physical": ("physical/Pendulum-v1", {"gain": -1.0}, "motion", 300),
    "digital": ("digital/orders", {"migrated": True}, "program", 600),
    "scientific": ("scientific/lotka_volterra", {"harvested": "both"}, "sindy", 120),
}
"""World, change, kind of model, transitions of evidence."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--pool", type=int, default=42)
    parser.add_argument("--regimes", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines("runs/world_evolve_gates.jsonl")
    done = {r["part"] for r in records}
    parts: list[tuple[str, Any]] = [
        ("type I", lambda: type_one(arguments)),
        ("success", success_check),
        ("bound", bound),
    ]
    for regime in arguments.regimes:
        few = max(2, arguments.candidates // (4 if regime == "scientific" else 2))
        for share in (0.5, 0.0, 0.05, 0.1, 0.25):
            count = arguments.candidates if share == 0.5 else few
            parts.append(
                (f"{regime}, changed, {share}", lambda r=regime, s=share, n=count: attacked(r, s, n, changed=True))
            )
        parts.append((f"{regime}, unchanged, 0.5", lambda r=regime, n=few: attacked(r, 0.5, n, changed=False)))
        parts.append((f"{regime}, quorum", lambda r=regime, n=few: quorum(r, n)))
    parts.append(("physical, network", lambda: network_attacked("physical")))
    for name, part in parts:
        if name not in done:
            began = time.process_time()
            found = part()
            cost = {"cpu_seconds": time.process_time() - began, "commit": machine()["commit"]}
            records.append({"part": name, **found, **cost})
            print(name, found, flush=True)
        write_result("world_evolve_gates", settings=vars(arguments), runs=list(records))


class Bench:
    """A changed world, the stale incumbent, and a gate that plays no episodes to the end (its success check is left out)."""

    def __init__(self, regime: str, folder: Path, *, changed: bool = True) -> None:
        name, change, kind, self.count = WORLDS[regime]
        before = world.make(name)
        self.place = world.make(name, **(change if changed else {}))
        hold = {"hold": 30} if kind == "sindy" else {}
        self.incumbent = world.fit(kind, world.collect(before, steps=600, seed=1, **hold), world=before)
        self.evidence = Evidence(folder)
        self.gate = Gate(self.place, self.evidence, CONFIG)
        self.test = world.collect(self.place, steps=2000, seed=4321)
        self.stale = float(errors(self.incumbent, self.test).mean())

    def candidate(self, share: float, seed: int) -> tuple[Any, Any]:
        """A candidate made of poisoned evidence, by the structural operator, and that evidence."""
        data = world.collect(self.place, steps=self.count, seed=1000 + seed)
        data = poisoned(data, self.place, share=share, seed=seed)
        made, _ = candidates(self.incumbent, self.place, data, seed=seed, only=["structure"])
        return made[0].model, data

    def good(self, model: Any) -> bool:
        """Whether it is truly better by the gate's margin."""
        return float(errors(model, self.test).mean()) < (1 - CONFIG.margin) * self.stale - CONFIG.floor


def checked(bench: Bench, model: Any, trial: int, batches: Any = None) -> list[str]:
    """Names of the checks that a candidate fails, the success rate apart."""
    own: Any = []
    if batches is None:
        kept, own = bench.gate.probes(trial)
        batches = [kept]
    data = bench.evidence.transitions(batches)
    alpha = spent(1, CONFIG.alpha)
    steps = {
        "gain": lambda: bench.gate._gain(model, bench.incumbent, batches, alpha),
        "interventions": lambda: bench.gate._interventions(model, own, trial),
        "laws": lambda: bench.gate._laws(model, bench.incumbent, data, own),
        "robustness": lambda: bench.gate._robust(model, bench.incumbent, data, trial),
    }
    failed = []
    for name, step in steps.items():
        try:
            if step().status != PASS:
                failed.append(name)
        except ArithmeticError:
            failed.append(name)
        if failed:
            break
    return failed


def attacked(regime: str, share: float, count: int, *, changed: bool) -> dict[str, Any]:
    """Candidates of poisoned evidence: the gate against their own evidence split by hash."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(regime, Path(folder), changed=changed)
        passed, own, harmful, own_harmful, by, good = 0, 0, 0, 0, {}, 0
        for seed in range(count):
            model, data = bench.candidate(share, seed)
            failed = checked(bench, model, seed + 1)
            truly = bench.good(model)
            good += truly
            passed += not failed
            harmful += not failed and not truly
            for name in failed:
                by[name] = by.get(name, 0) + 1
            side = own_verdict(bench, data, seed)
            own += side
            own_harmful += side and not truly
        return {
            "regime": regime, "changed": changed, "share": share, "candidates": count, "truly_better": good, "gate_passes": passed,
            "gate_harmful": harmful, "rejected_by": by, "split_by_hash_passes": own, "split_by_hash_harmful": own_harmful,
        }  # fmt: skip


def own_verdict(bench: Bench, data: Any, seed: int) -> bool:
    """The same operator and the same test of the gain, judged on the half of its own stream that a hash left out."""
    data = replace(data, episodes=torch.arange(len(data)) // 5)
    fit_side, gate_side = data.split(0.5, seed=seed)
    made, _ = candidates(bench.incumbent, bench.place, fit_side, seed=seed, only=["structure"])
    if not made:
        return False
    sides = [errors(model, gate_side) for model in (bench.incumbent, made[0].model)]
    found = gain_of(*sides, gate_side.episodes, alpha=spent(1, CONFIG.alpha), margin=CONFIG.margin, floor=CONFIG.floor)
    return found.low > 0


def quorum(regime: str, count: int) -> dict[str, Any]:
    """Two sources of gate evidence, one of them poisoned like the candidate's evidence."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(regime, Path(folder))
        found: dict[str, int] = {}
        for seed in range(count):
            clean = world.collect(bench.place, steps=400, seed=7000 + seed)
            false = poisoned(world.collect(bench.place, steps=400, seed=9000 + seed), bench.place, seed=seed)
            clean, false = (replace(d, episodes=torch.arange(len(d)) // 10) for d in (clean, false))
            honest = bench.evidence.add(clean, source="one", role="gate", note=str(seed))
            liar = bench.evidence.add(false, source="two", role="gate", note=str(seed))
            for name, share in (("poisoned", 0.5), ("good", 0.0)):
                model, _ = bench.candidate(share, seed)
                passes = not checked(bench, model, seed + 1, [honest, liar])
                found[f"{name} candidate passes, one of two poisoned"] = (
                    found.get(f"{name} candidate passes, one of two poisoned", 0) + passes
                )
                lied = bench.gate._gain(model, bench.incumbent, [liar], spent(1, 0.05)).status == PASS
                found[f"{name} candidate gains on the poisoned source"] = (
                    found.get(f"{name} candidate gains on the poisoned source", 0) + lied
                )
        return {"regime": regime, "candidates": count, **found}


def network_attacked(regime: str) -> dict[str, Any]:
    """Networks in the unchanged world: 20 of poisoned evidence, and 5 of clean evidence, against a network of little data."""
    with tempfile.TemporaryDirectory() as folder:
        place = world.make("physical/Pendulum-v1")
        quick = {"epochs": 25, "members": 2, "hidden": 32}
        incumbent = world.fit("ensemble", world.collect(place, steps=300, seed=1), world=place, **quick)
        bench = Bench(regime, Path(folder))
        bench.place, bench.incumbent = place, incumbent
        bench.gate = Gate(place, bench.evidence, CONFIG)
        passed = {"poisoned": 0, "clean": 0}
        for seed in range(20):
            for name, share, count in (("poisoned", 0.5, 20), ("clean", 0.0, 5)):
                if seed < count:
                    data = world.collect(place, steps=1200, seed=100 + seed)
                    data = poisoned(data, place, share=share, seed=seed)
                    model = world.fit("ensemble", data, world=place, seed=seed, **quick)
                    passed[name] += not checked(bench, model, seed + 1)
        return {"regime": regime, "passed": passed, "of": {"poisoned": 20, "clean": 5}}


def type_one(arguments: Any) -> dict[str, Any]:
    """Familywise error over 20 candidates of one registry."""
    place = world.make("physical/Pendulum-v1")
    data = world.collect(place, steps=600, seed=1)
    pool = [
        world.fit("ensemble", data, world=place, seed=seed, epochs=25, members=2, hidden=32)
        for seed in range(arguments.pool)
    ]
    fresh = world.collect(place, steps=40_000, seed=2)
    table = torch.stack([errors(model, fresh) for model in pool]).reshape(len(pool), -1, 10)
    truth = table.mean((1, 2))
    spread = (float(truth.min()), float(truth.mean()), float(truth.max()))
    edge = (1 - CONFIG.margin) * truth.unsqueeze(1) - CONFIG.floor
    return {
        "simulations": arguments.simulations, "candidates": 20, "pool": len(pool), "true_errors_min_mean_max": spread,
        "as_fitted": family(table, truth, arguments.simulations, None),
        "equal_in_truth": family(table, truth, arguments.simulations, truth),
        "edge_of_no_gain": family(table, truth, arguments.simulations, edge[:, 0]),
        "equal_within_margin": float((truth.unsqueeze(0) >= edge).float().mean()),
    }  # fmt: skip


def success_check(simulations: int = 20_000) -> dict[str, Any]:
    """How often the success check lets a candidate pass that is as good as the incumbent, and one that is worse by the margin, with
    the interval of paired starts and with that of independent ones. ``discordant``: share of starts that only one masters."""
    rng, n, rows = np.random.default_rng(0), CONFIG.asr_episodes, []
    for rate in (0.5, 0.8, 0.95):
        for difference, discordant in (
            (0.0, 0.02),
            (0.0, 0.1),
            (0.0, 0.2),
            (-CONFIG.asr_margin, 0.1),
            (-CONFIG.asr_margin, 0.2),
        ):
            gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
            both = rate - lost
            if min(both, 1 - both - gained - lost) < 0:
                continue
            counts = Counter(
                map(tuple, rng.multinomial(n, [both, gained, lost, 1 - both - gained - lost], simulations).tolist())
            )
            passes = [
                sum(c for cell, c in counts.items() if low(*cell) >= -CONFIG.asr_margin) for low in (_paired, _unpaired)
            ]
            rows.append({
                "incumbent": rate, "difference": difference, "discordant": discordant, "paired": passes[0] / simulations,
                "unpaired": passes[1] / simulations,
            })  # fmt: skip
    return {"starts": n, "simulations": simulations, "rows": rows}


def bound(simulations: int = 4000) -> dict[str, Any]:
    """How often the lower bound of the gain lies above a true mean of 0, by the shape of what episodes say; asked for is what the
    first candidate may spend."""
    rng, n = np.random.default_rng(0), CONFIG.clusters
    shapes: dict[str, Callable[[], Any]] = {
        "normal": lambda: rng.normal(size=n),
        "exponential losses": lambda: 1 - rng.exponential(size=n),
        "log-normal losses": lambda: math.exp(0.5) - np.exp(rng.normal(size=n)),
        "a loss in one episode of twenty": lambda: np.where(rng.random(n) < 0.05, -0.95, 0.05),
    }
    asked = spent(1, CONFIG.alpha)
    rows = {
        name: sum(mean_at_least(draw(), alpha=asked) > 0 for _ in range(simulations)) / simulations
        for name, draw in shapes.items()
    }
    return {"episodes": n, "asked": asked, "simulations": simulations, "rows": rows}


def _paired(both: int, gained: int, lost: int, neither: int) -> float:
    sides = (
        [True] * (both + gained) + [False] * (lost + neither),
        [True] * both + [False] * gained + [True] * lost + [False] * neither,
    )
    return paired_difference(*sides, confidence=0.9).low


def _unpaired(both: int, gained: int, lost: int, neither: int) -> float:
    n = both + gained + lost + neither
    return agresti_caffo(both + gained, n, both + lost, n, confidence=0.9).low


def family(table: Any, truth: Any, simulations: int, target: Any) -> dict[str, float]:
    """Shares of registries with a promotion that gains nothing, and with one that truly gains.

    ``table`` (models, episodes, steps): errors; the episodes are all there is, so that ``truth``, its means, is exact. ``target``
    (models,): the true error to which a candidate's errors are scaled, given the incumbent; None leaves them.
    """
    generator = torch.Generator().manual_seed(0)
    wrongs, rights = 0, 0
    rows = torch.arange(CONFIG.clusters).repeat_interleave(table.shape[2])
    for _ in range(simulations):
        chosen = torch.randperm(len(table), generator=generator)[:21].tolist()
        first, wrong, right = chosen[0], False, False
        for trial, candidate in enumerate(chosen[1:], start=1):
            episodes = torch.randint(table.shape[1], (CONFIG.clusters,), generator=generator)
            factor = 1.0 if target is None else float(target[first] / truth[candidate])
            sides = table[first, episodes].flatten(), factor * table[candidate, episodes].flatten()
            found = gain_of(*sides, rows, alpha=spent(trial, CONFIG.alpha), margin=CONFIG.margin, floor=CONFIG.floor)
            # scaled to the edge, rounding must not make a gain of it
            better = target is None and bool(truth[candidate] < (1 - CONFIG.margin) * truth[first] - CONFIG.floor)
            wrong |= found.low > 0 and not better
            right |= found.low > 0 and better
        wrongs += wrong
        rights += right
    return {"familywise_error": wrongs / simulations, "true_promotions": rights / simulations}


if __name__ == "__main__":
    main()
