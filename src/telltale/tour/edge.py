"""The tour's chapter on SAGE: a small edge and server model, one image, and what is sent of it at three budgets."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from telltale.edge.audit import Audit, audit_importances
from telltale.edge.evaluation import answers
from telltale.edge.gate import Gate
from telltale.edge.images import Images
from telltale.edge.page import pictures_of
from telltale.edge.sweep import Sweep, sweep_budgets
from telltale.edge.training import SMALL_EDGE, SMALL_SERVER, train_pair
from telltale.models.vision import load_vision
from telltale.runs.html_report import Report
from telltale.tasks.scenes import scenes

BUDGETS = (6, 13, 26)
"""Patches of 64."""
QUICK_STEPS = 5


@dataclass(frozen=True)
class EdgeChapter:
    """What the chapter found. pictures: PNG and a line for each, the image first and then what was sent at each budget."""

    audit: Audit
    sweep: Sweep
    pictures: list[tuple[bytes, str]]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Plain figures for ``summary.json``."""
        chosen = self.audit.choice.name
        return {
            "choice": chosen,
            "edge_accuracy_on_offloaded": self.sweep.edge,
            "budgets": [
                {"patches": row.budget, "bytes": row.bytes, "server": row.server, "fused": row.fused}
                for row in self.sweep.rows
                if row.name == chosen
            ],
            "pictures": [words for _, words in self.pictures],
            "seconds": self.seconds,
        }

    def write(self, report: Report) -> None:
        """Add the chapter to a report."""
        report.heading("What fits into the uplink")
        report.text(
            f"An edge model asks a server about images that it is unsure of and sends the patches that `{self.audit.choice.name}` "
            f"chooses. On those images the edge alone is right in {self.sweep.edge:.0f}%."
        )
        report.pictures(self.pictures, caption="Blue patches were not sent.")
        rows = [row for row in self.sweep.rows if row.name == self.audit.choice.name]
        report.table(
            ("patches of 64", "bytes", "server alone %", "edge and server %"),
            [(row.budget, f"{row.bytes:.0f}", f"{row.server:.0f}", f"{row.fused:.0f}") for row in rows],
        )


def edge_chapter(folder: str | Path, *, seed: int = 0, quick: bool = False) -> EdgeChapter:
    """Train the small pair in ``folder`` (models that are there are kept), audit, sweep three budgets, and show one image.

    At most 60 seconds on 2 cores. ``quick`` trains a few steps only; its figures mean nothing.
    """
    began = time.perf_counter()
    small, large = (
        replace(config, seed=config.seed + seed, steps=QUICK_STEPS if quick else config.steps)
        for config in (SMALL_EDGE, SMALL_SERVER)
    )
    edge, server = (load_vision(path) for path in train_pair(folder, edge=small, server=large))
    pixels, labels = scenes(80 if quick else 300, split="test", seed=seed)
    images = Images(pixels, labels, tuple(Path(f"scene-{number}") for number in range(len(pixels))))
    calibration, rest = images.split(0.4, seed=seed)
    gate = Gate(threshold=0.0 if quick else 1.0)
    audit = audit_importances(edge, calibration, server=server, selectors=("sage", "facility"), seed=seed)
    unsure = np.flatnonzero(gate.offloads(np.exp(answers(edge, rest.pixels))))
    if len(unsure) < 20:
        gate = Gate(threshold=0.0)
        unsure = np.arange(len(rest))
    sweep = sweep_budgets(edge, server, rest, choices=[audit.choice], budgets=BUDGETS, gate=gate, whole=(), seed=seed)
    pictures = pictures_of(
        edge, server, rest.take(unsure[:1]), audit.choice, BUDGETS, arbiter=sweep.arbiter(audit.choice.name)
    )
    return EdgeChapter(audit, sweep, pictures, time.perf_counter() - began)
