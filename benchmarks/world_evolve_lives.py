"""Whole lives in three regimes, unattended: a change, a revision through the gates, the change undone, a rollback.

Each life is offered poisoned evidence (half of the actions false) before the change. After it: the promoted version, the one before
it and the oracle play the changed world from the same starts; levels 1 and 2 of the promoted version, level 3 of the life;
the founding version's bytes and predictions after the rollback against those before; the bundle is written and verified.
The physical regime has two changes: the actuator's polarity, and drag that no hypothesis of the structural arm holds.
``--part kill``: a life is killed at random moments (SIGKILL) and taken up again until it ends, beside one that nobody disturbs.
Probes against random steps at equal budget, which a certificate asks for, are made by ``world_evolve_probes.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from measurement import machine, write_result
from telltale import world
from telltale.runs.files import JsonLines
from telltale.world.evolve.evolver import Evolver
from telltale.world.evolve.gates import Gate, GateConfig
from telltale.world.evolve.level_three import certify_life, recover
from telltale.world.evolve.life import EvolveConfig, contiguous
from telltale.world.evolve.life_bundle import verify_life, write_life
from telltale.world.evolve.life_page import line
from telltale.world.evolve.monitor import residuals
from telltale.world.evolve.poison import poisoned
from telltale.world.worlds.changing import Changing
from world_evolve_probes import probed

ROOT = Path("runs/world_evolve_lives")
PLANS: dict[str, dict[str, Any]] = {
    "physical": {
        "world": "physical/Pendulum-v1", "change": {"gain": -1.0}, "kind": "motion", "fit": {}, "at": (3000, 7000), "budget": 9000,
        "config": {"episodes": 5, "probe_steps": 30, "canary_rounds": 1}, "planner": {"samples": 32}, "offered": 300,
        "starts": 100,
    },
    "drag": {
        "world": "physical/Pendulum-v1", "change": {"drag": 0.18}, "kind": "motion", "fit": {}, "at": (3000, 9000), "budget": 12000,
        "config": {"episodes": 5, "probe_steps": 300, "canary_rounds": 1}, "planner": {"samples": 32}, "offered": 300,
        "starts": 100,
    },
    "digital": {
        "world": "digital/orders", "change": {"migrated": True}, "kind": "program", "fit": {}, "at": (2500, 5500), "budget": 8500,
        "config": {"episodes": 64, "probe_steps": 1000, "attempts": 3}, "planner": {}, "offered": 600, "starts": 200,
    },
    "scientific": {
        "world": "scientific/lotka_volterra", "change": {"harvested": "both"}, "kind": "sindy", "fit": {"hold": 30},
        "at": (3600, 7200), "budget": 9900, "config": {"episodes": 6, "probe_steps": 40, "canary_rounds": 1},
        "planner": {"samples": 32, "iterations": 2, "horizon": 15}, "offered": 120, "starts": 100,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=[*PLANS, "kill"], required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "kill":
        killed(arguments.kills)
        return
    records = JsonLines(ROOT / f"{arguments.part}.jsonl")
    done = {r["seed"] for r in records}
    for seed in range(arguments.seeds):
        if seed not in done:
            began = time.process_time()
            found = lived(arguments.part, seed)
            cost = {"cpu_seconds": time.process_time() - began, "commit": machine()["commit"]}
            records.append({"seed": seed, **found, **cost})
            print(seed, {k: v for k, v in found.items() if k != "events"}, flush=True)
        runs = sorted(records, key=lambda r: r["seed"])
        write_result(
            f"world_evolve_{arguments.part}",
            seeds_wanted=arguments.seeds,
            seeds_done=[r["seed"] for r in runs],
            runs=runs,
        )


def told(done: Any) -> None:
    """A line a round, and one an event."""
    print(line(done), f"cpu {time.process_time():.0f}", flush=True)
    for event in done.events:
        print("   ", event["what"], event["words"], event.get("checks", ""), flush=True)


def made(regime: str, seed: int) -> tuple[Any, Any, Any]:
    """The founding model, the changing world, and the feed."""
    plan = PLANS[regime]
    before, after = world.make(plan["world"]), world.make(plan["world"], **plan["change"])
    count = 600 if regime == "digital" else 300
    model = world.fit(plan["kind"], world.collect(before, steps=count, seed=500 + seed, **plan["fit"]), world=before)
    first, second = plan["at"]
    place = Changing([(0, before), (first, after), (second, world.make(plan["world"]))])

    def feed(now: Any, number: int) -> Any:
        if number != 2:
            return None
        return "partner", poisoned(world.collect(now, steps=plan["offered"], seed=7000 + seed), now, seed=seed)

    return model, place, feed


def evolver(regime: str, seed: int, folder: Path, **changed: Any) -> Evolver:
    """The life of a regime and seed."""
    plan = PLANS[regime]
    model, place, feed = made(regime, seed)
    config = EvolveConfig(**{**plan["config"], **changed})
    return Evolver(model, place, folder, config=config, planner=plan["planner"], feed=feed, seed=seed)


def lived(regime: str, seed: int) -> dict[str, Any]:
    """One life and all that is measured of it."""
    plan, folder = PLANS[regime], ROOT / regime / str(seed)
    one = evolver(regime, seed, folder)
    founding = one.registry.versions()[0]
    state = one.run(plan["budget"], on_round=told)
    rounds = one.life.rounds()
    events = [(r.number, r.state.steps, e) for r in rounds for e in r.events]
    promoted = [e["version"] for _, _, e in events if e["what"] == "promotion"]
    offered = [e["passed"] for _, s, e in events if e["what"] == "gate" and s < plan["at"][0]]
    found: dict[str, Any] = {
        "rounds": state.round, "steps": state.steps, "probe_steps": state.probe_steps, "gate_steps": state.gate_steps,
        "trials": one.registry.trials(), "active_is_founding": one.registry.active().id == founding,
        "events": [[n, s, e["what"], e["words"]] for n, s, e in events],
        "alarms": [[e["step"], e["quiet"], e["step"] - e["quiet"]] for _, _, e in events if e["what"] == "alarm"],
        "false_alarms": sum(e["what"] == "alarm" and e["step"] < plan["at"][0] for _, _, e in events),
        "offered_candidates_rejected": sum(not passed for passed in offered), "offered_candidates": len(offered),
        "promoted": len(promoted), "rollbacks": sum(e["what"] == "rollback" for _, _, e in events),
    }  # fmt: skip
    changed = world.make(plan["world"], **plan["change"])
    recovery, levels = None, None
    if promoted:
        gate = Gate(changed, one.evidence)
        gate.suspended = tuple(next((e["suspended"] for _, _, e in events if e["what"] == "laws"), ()))
        old_laws = Changing([(0, world.make(plan["world"]))]).laws
        laws = [law for law in old_laws if law.name not in gate.suspended]
        recovery = recover(
            one.registry, changed, promoted[0], episodes=plan["starts"], laws=laws, mode="project", **plan["planner"]
        )
        levels = world.certify(
            one.registry.version(promoted[0]).load(), changed, 2, episodes=30, seed=seed,
            held_out=world.collect(changed, steps=600, seed=90_000 + seed), **plan["planner"],
        )  # fmt: skip
        found["asr"] = {name: sum(side) / len(side) for name, side in asdict(recovery).items()}
    found |= rolled_back(one, regime, seed, founding)
    certificate = certify_life(folder, one.world, levels=levels, recovery=recovery, probing=probed(regime, seed))
    found["certificate"] = certificate.summary()
    bundle = write_life(folder, folder.with_name(f"{seed}-bundle"), world=one.world, certificate=certificate)
    found["bundle"] = verify_life(bundle, world=one.world).summary()
    return found


def rolled_back(one: Evolver, regime: str, seed: int, founding: str) -> dict[str, Any]:
    """The founding version's bytes and predictions as they are on disk now, against the model that was given."""
    model, place, _ = made(regime, seed)
    again = one.registry.version(founding)
    data = world.collect(place.phases[0][1], steps=300, seed=1234)
    shutil.rmtree(one.registry.path / "again", ignore_errors=True)
    same = torch.equal(residuals(model, data), residuals(again.load(), data))
    fresh = world.save_model(model, one.registry.path / "again", about=again.document["about"])
    bytes_of = [(p / "model.safetensors").read_bytes() for p in (again.path, one.registry.path / "again")]
    shutil.rmtree(one.registry.path / "again")
    return {
        "rollback_bytes_equal": bytes_of[0] == bytes_of[1] and fresh == founding,
        "rollback_predictions_equal": bool(same),
    }


def killed(kills: int) -> None:
    """Kill lives at random moments until ``kills`` kills were survived. Lives that are done are not repeated.

    A moment is drawn on the killed process's own CPU clock, uniform over what a whole life takes, so that the load of the
    machine does not decide which rounds are hit.
    """
    folder = ROOT / "kill"
    records = JsonLines(ROOT / "kill.jsonl")
    kept = folder / "seconds.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        wall, cpu = time.monotonic(), time.process_time()
        short(folder / "whole").run(BUDGET)
        kept.write_text(json.dumps({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}))
    duration = json.loads(kept.read_text())
    undisturbed = short(folder / "whole")
    head, files = undisturbed.life.head(), contents(folder / "whole")
    while sum(len(r["kills"]) for r in records) < kills:
        number = len(list(records))
        left = kills - sum(len(r["kills"]) for r in records)
        found = disturbed(folder / f"life-{number}", number, duration["cpu"], left)
        one = short(folder / f"life-{number}")
        same = contents(folder / f"life-{number}") == files
        records.append({
            **found, "same_head": one.life.head() == head, "same_files": same, "contiguous": contiguous(one.life.rounds()),
            "registry_ok": one.registry.verify().ok, "evidence_ok": one.evidence.verify().ok,
            "evidence_doubled": doubled(one),
        })  # fmt: skip
        lives = list(records)
        print(lives[-1], flush=True)
        shutil.rmtree(folder / f"life-{number}")
        write_result(
            "world_evolve_kill", kills=sum(len(r["kills"]) for r in lives), life_seconds=duration, budget=BUDGET,
            rounds=undisturbed.state.round, phases=dict(Counter(k["phase"] for r in lives for k in r["kills"])),
            lives_equal_to_the_undisturbed=sum(r["same_head"] and r["same_files"] for r in lives), lives=lives,
            promotions=sum(e["kind"] == "promote" for e in undisturbed.registry.log()),
            rollbacks=sum(e["kind"] == "rollback" for e in undisturbed.registry.log()),
        )  # fmt: skip


def disturbed(place: Path, number: int, duration: float, most: int) -> dict[str, Any]:
    """One life, killed again and again (at most ``most`` times) at a random moment, and taken up again until it ends."""
    rng, kills, unfinished = random.Random(number), [], 0
    shutil.rmtree(place, ignore_errors=True)
    while True:
        child = os.fork()
        if child == 0:
            try:
                short(place).run(BUDGET)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        moment = rng.uniform(0.0, duration) if len(kills) < most else float("inf")
        while not (ended := os.waitpid(child, os.WNOHANG)[0] != 0) and cpu_seconds(child) < moment:
            time.sleep(0.003)
        if ended and short(place).life.state().steps >= BUDGET:
            return {"kills": kills, "unfinished_writes_seen": unfinished}
        if ended:
            raise RuntimeError(f"life {number} ended by itself before its budget")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = short(place).life.state()  # it opens, or this raises
        kills.append({"cpu_seconds": moment, "round": state.round + 1, "phase": state.phase})
        unfinished += sum(1 for f in place.rglob("*") if f.name.startswith(".partial-"))


def cpu_seconds(process: int) -> float:
    """What a child has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def doubled(one: Evolver) -> int:
    """Transitions that the evidence holds more than once."""
    names = [n for b in one.evidence.batches() for n in one.evidence.read(b.key).ids()]
    return len(names) - len(set(names))


BUDGET = 1600
"""Steps of the life that is killed."""


def short(folder: Path) -> Evolver:
    """A digital life of ten CPU-seconds: poison is offered, the schema changes, a revision is promoted, the change is undone, and
    the founding version comes back."""
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    model = world.fit("program", world.collect(before, steps=600, seed=1), world=before)
    place = Changing([(0, before), (600, after), (1300, world.make("digital/orders"))])

    def feed(now: Any, number: int) -> Any:
        return ("partner", poisoned(world.collect(now, steps=100, seed=7), now, seed=1)) if number == 2 else None

    config = EvolveConfig(episodes=32, block=2, probe_steps=1000, canary_rounds=1, attempts=3)
    gate = GateConfig(asr_episodes=20, asr_margin=0.15)
    return Evolver(model, place, folder, config=config, gate=gate, feed=feed, seed=3)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that is no leftover of an unfinished write."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*")) if f.is_file() and ".partial-" not in str(f)
    }  # fmt: skip


if __name__ == "__main__":
    main()
