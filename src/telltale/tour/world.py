"""The tour's chapter on world models: learn Pendulum, earn a certificate, and a copy that is deaf to its actions beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.runs.html_report import Report
from telltale.world import certify, fit, learn, make, save_model
from telltale.world.certificate import Certificate

STEPS = 1000
PLANNING = {"samples": 64}
QUICK = {"samples": 12, "iterations": 1, "horizon": 5}


@dataclass(frozen=True)
class WorldChapter:
    """What the chapter found: the certificates of the model and of its deaf copy, and the folder of the bundle."""

    model: Certificate
    deaf: Certificate
    bundle: Path
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Plain figures for ``summary.json``."""
        return {
            "world": self.model.world,
            "steps": STEPS,
            "arms": {
                name: {
                    "level": found.level,
                    "asr": found.evaluation.asr if found.evaluation is not None else None,
                    "one_step_r_squared": found.prediction.r_squared if found.prediction is not None else None,
                    "conditions": {condition: c.status for condition, c in found.conditions.items()},
                }
                for name, found in (("model", self.model), ("deaf to its actions", self.deaf))
            },
            "bundle": str(self.bundle),
            "seconds": self.seconds,
        }

    def write(self, report: Report) -> None:
        """Add the chapter to a report."""
        report.heading("A model of a world, and what it earned")
        report.text(
            f"An ensemble learned `{self.model.world}` from {STEPS} environment steps, planning with itself as it learned. A "
            f"copy was fitted on the same data without the action among its inputs. Both predict one step well; only one can "
            f"be planned in."
        )
        arms = self.summary()["arms"]
        report.table(
            ("", "one-step R2", "share of starts solved", "level earned"),
            [(name, f"{a['one_step_r_squared']:.3f}", f"{a['asr']:.2f}", a["level"]) for name, a in arms.items()],
        )
        report.table(
            ("condition", "model", "deaf to its actions"),
            [(name, c.reason, self.deaf.conditions[name].reason) for name, c in self.model.conditions.items()],
        )
        report.text(f"The evidence is a bundle that anyone can replay: `telltale world verify {self.bundle}`")


def world_chapter(folder: str | Path, *, seed: int = 0, quick: bool = False) -> WorldChapter:
    """Learn, certify, bundle. At most two minutes on one free core; ``quick`` is a rehearsal whose figures mean nothing.

    Raises :class:`~telltale.errors.MissingExtraError` if Gymnasium is not installed.
    """
    began = time.perf_counter()
    place = make("physical/Pendulum-v1")
    options: dict[str, Any] = {"epochs": 2, "hidden": 8} if quick else {}
    planning: dict[str, Any] = QUICK if quick else PLANNING
    if quick:
        from telltale.world.planners.sampling import CEM

        model, data = learn(place, steps=220, first_steps=200, seed=seed, planner=CEM(**QUICK), **options)
    else:
        model, data = learn(place, steps=STEPS, seed=seed, **options)
    copy = fit("ensemble", data, world=place, seed=seed, hears_actions=False, **options)
    root = Path(folder)
    save_model(model, root / "model", about={"world": place.id, "transitions": len(data), "seed": seed})
    earned = certify(model, place, 2, episodes=2 if quick else 30, seed=seed, **planning)
    deaf = certify(copy, place, 2, episodes=1 if quick else 5, seed=seed, **planning)
    bundle = earned.save(root / "bundle", model=model)
    return WorldChapter(earned, deaf, bundle, time.perf_counter() - began)
