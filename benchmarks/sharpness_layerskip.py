"""Sharpness Dimension and distance to the edge along a LayerSkip training run, beside plain training of the same model.

Both arms of the recipe comparison (``checkpoints.py``) on the same batches; fixed probe batches from the training text; the last
layer's loss in evaluation mode, so that the layers which the recipe drops at random are all there. Preset and steps can be
chosen; each arm is kept once whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from typing import Any

import torch

from checkpoints import FOLDER, TINY, corpus, recipe
from measurement import write_result
from telltale.models.presets import PRESETS, build
from telltale.runs.files import write_atomically
from telltale.train.loop import Callback, StepState, TrainResult, train
from telltale.train.sharpness.measure import measure
from telltale.train.sharpness.monitor import SharpnessMonitor
from telltale.train.sharpness.probe import language_model_loss

ARMS = ("both", "none")
PROBE_BATCHES, PROBE_ROWS, PROBE_LENGTH = 4, 4, 64
RUNS, STEPS = 8, 20
CHECKS = 25
"""Steps between two readings of the edge."""


class Along(Callback):
    """Reads the edge every 25 steps and the dimension, through both Jacobians, at a few steps."""

    def __init__(self, probe: list[torch.Tensor], at: set[int]) -> None:
        self.probe, self.at = probe, at
        self.monitor: SharpnessMonitor | None = None
        self.dimensions: list[dict[str, Any]] = []

    def on_step_end(self, state: StepState) -> None:
        if self.monitor is None:
            self.monitor = SharpnessMonitor(
                state.model,
                language_model_loss,
                self.probe[:1],
                optimizer=state.optimizer,
                every=CHECKS,
                budget=1.0,
                start=state.step - 1,
            )
        self.monitor.step()
        if state.step not in self.at:
            return
        point: dict[str, Any] = {"step": state.step, "loss": state.loss, "rate": state.learning_rate}
        for jacobian in ("gd", "optimizer"):
            given = {"rate": state.learning_rate} if jacobian == "gd" else {"optimizer": state.optimizer}
            found = measure(
                state.model,
                language_model_loss,
                self.probe,
                runs=RUNS,
                steps=STEPS,
                jacobian=jacobian,
                mode="eval",
                **given,
            )
            point[jacobian] = {
                "sd": found.sd,
                "interval": list(found.interval),
                "parameters": found.spectrum.size,
                "breakdown": vars(found.breakdown),
                "controls": dict(found.controls),
            }
        self.dimensions.append(point)
        told = {
            jacobian: (round(point[jacobian]["sd"]), point[jacobian]["interval"]) for jacobian in ("gd", "optimizer")
        }
        print(f"step {state.step} loss {state.loss:.3f} {told}", flush=True)

    def on_end(self, result: TrainResult) -> None:
        if self.monitor is not None:
            self.monitor.close()


def arm_along(arm: str, preset: str, steps: int, points: int) -> dict[str, Any]:
    """Train one arm and watch it; the record is kept, so that a second call only reads it."""
    folder = FOLDER / f"sharpness-{preset}-{arm}-{steps}"
    kept = folder / "along.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    text = corpus(PRESETS[preset].vocabulary_size)
    config = dataclasses.replace(TINY, steps=steps, learning_rate=PRESETS[preset].learning_rate, precision="float32")
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(text.train.numel() - PROBE_LENGTH, (PROBE_BATCHES, PROBE_ROWS, 1), generator=generator)
    probe = list(text.train[starts + torch.arange(PROBE_LENGTH)].long())
    along = Along(probe, {1} | {round(steps * (index + 1) / points) for index in range(points)})
    model = build(preset, vocabulary_size=len(text.tokenizer), seed=0)
    result = train(model, text, config, run_dir=folder, layerskip=recipe(arm), callbacks=[along])
    if not result.finished:
        raise SystemExit(f"arm {arm} was interrupted at step {result.step}; it starts anew next time.")
    assert result.quality is not None
    assert along.monitor is not None
    record = {
        "dimensions": along.dimensions,
        "edge": [dataclasses.asdict(reading) for reading in along.monitor.readings],
        "held_out_losses": result.quality.losses,
    }
    write_atomically(kept, json.dumps(record, default=float))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=TINY.steps)
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms = {arm: arm_along(arm, arguments.preset, arguments.steps, arguments.points) for arm in ARMS}
    if not arguments.trial:
        write_result(
            "sharpness_layerskip",
            preset=arguments.preset,
            steps=arguments.steps,
            probe={"batches": PROBE_BATCHES, "rows": PROBE_ROWS, "length": PROBE_LENGTH, "runs": RUNS, "steps": STEPS},
            arms=arms,
        )


if __name__ == "__main__":
    main()
