"""Grokking in the paper's setting: does the Sharpness Dimension follow generalisation, and does the decay in the Jacobian matter?

a + b mod 97, 40% to train, two-layer GELU MLP of width 32, full-batch SGD with momentum and weight decay, 20,000 steps. The
protocol is in ``sharpness_protocol.md``: rate and decay come from ``--select`` (accuracies alone), then three seeds are
measured at 100 checkpoints each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from measurement import write_result
from telltale.runs.files import write_atomically
from telltale.signals.hessian import HessianOperator
from telltale.signals.sharpness_dimension import dimension_of, gradient_descent
from telltale.signals.spectrum import slq
from telltale.signals.statistics import kendall_tau
from telltale.train.sharpness.edges import edge_of
from telltale.train.sharpness.measure import weight_norm

FOLDER = Path("runs/benchmarks/sharpness_grokking")
MODULUS, WIDTH, TRAIN_PART = 97, 32, 0.4
STEPS, CHECKPOINTS = 20_000, 100
SEEDS, SELECTION_SEED = (0, 1, 2), 100
PROBES, LANCZOS_STEPS = 8, 30
MOMENTUM = 0.9
CANDIDATES = [(rate, decay) for rate in (0.5, 1.0, 2.0) for decay in (1e-4, 3e-4)]
"""Rate and weight decay; fixed before any was tried."""
FITTED, MEMORISED, GENERALISED = 0.99, 0.5, 0.8
MEASURES = ("sd_gd", "sd_gd_decay", "sd_optimizer", "lambda_max", "trace", "weight_norm", "train_loss", "minus_step")


class Task:
    """All pairs as two one-hot vectors, split by the seed, and a network of two weight matrices."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.arange(MODULUS).repeat_interleave(MODULUS), torch.arange(MODULUS).repeat(MODULUS)
        order = torch.randperm(MODULUS**2, generator=generator)
        inputs = torch.cat([functional.one_hot(first, MODULUS), functional.one_hot(second, MODULUS)], 1).float()[order]
        targets = ((first + second) % MODULUS)[order]
        count = round(TRAIN_PART * MODULUS**2)
        self.train, self.test = (inputs[:count], targets[:count]), (inputs[count:], targets[count:])
        self.weights = [self._layer(2 * MODULUS, WIDTH, generator), self._layer(WIDTH, MODULUS, generator)]

    @staticmethod
    def _layer(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
        bound = 1.0 / math.sqrt(inputs)
        return ((2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound).requires_grad_()

    def logits(self, inputs: Tensor) -> Tensor:
        return functional.gelu(inputs @ self.weights[0].T) @ self.weights[1].T

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.logits(self.train[0]), self.train[1])

    def scores(self) -> dict[str, float]:
        found = {}
        with torch.no_grad():
            for name, (inputs, targets) in (("train", self.train), ("test", self.test)):
                outputs = self.logits(inputs)
                found[f"{name}_loss"] = float(functional.cross_entropy(outputs, targets))
                found[f"{name}_accuracy"] = float((outputs.argmax(1) == targets).double().mean())
        return found


def descend(task: Task, rate: float, decay: float, at_checkpoint: Callable[[int], None]) -> None:
    """20,000 full-batch steps; ``at_checkpoint`` sees the weights after every 200th."""
    optimizer = torch.optim.SGD(task.weights, lr=rate, momentum=MOMENTUM, weight_decay=decay, foreach=True)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
        if step % (STEPS // CHECKPOINTS) == 0:
            at_checkpoint(step)


def select() -> list[dict[str, float]]:
    """Accuracies of every candidate and how long it generalised late; no curvature is computed."""
    path = FOLDER / "selection.json"
    table: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
    for rate, decay in CANDIDATES[len(table) :]:
        task = Task(SELECTION_SEED)
        curve: list[dict[str, float]] = []
        descend(task, rate, decay, lambda step, task=task, curve=curve: curve.append(task.scores()))
        fitted = sum(1 for scores in curve if scores["train_accuracy"] >= FITTED)
        late = sum(
            1 for scores in curve if scores["train_accuracy"] >= FITTED and scores["test_accuracy"] < GENERALISED
        )
        table.append({"rate": rate, "decay": decay, "fitted": fitted, "delay": late, **curve[-1]})
        write_atomically(path, json.dumps(table, indent=1))
        print(table[-1], flush=True)
    return table


def chosen(table: list[dict[str, float]]) -> tuple[float, float]:
    """The protocol's rule: the longest delay among those that generalise, else the best final test accuracy."""
    generalised = [row for row in table if row["test_accuracy"] >= GENERALISED]
    best = max(generalised, key=lambda r: r["delay"]) if generalised else max(table, key=lambda r: r["test_accuracy"])
    return best["rate"], best["decay"]


def measure(task: Task, step: int, rate: float, decay: float) -> dict[str, float]:
    """Spectrum of the full-batch Hessian at one checkpoint, read through three Jacobians, and the controls."""
    operator = HessianOperator(task.loss, task.weights)
    spectrum = slq([operator], runs=PROBES, steps=LANCZOS_STEPS, seed=step)
    map_of_step = edge_of("sgd", lr=rate, momentum=MOMENTUM, weight_decay=decay)
    plain = gradient_descent(rate)
    return {
        "step": step,
        **task.scores(),
        "sd_gd": dimension_of(spectrum, plain),
        "sd_gd_decay": dimension_of(spectrum, lambda nodes: plain(nodes + decay)),
        "sd_optimizer": dimension_of(spectrum, lambda nodes: map_of_step.moduli(nodes).clamp_min(1e-12).log()),
        "lambda_max": spectrum.extremes()[1][0],
        "trace": spectrum.trace()[0],
        "weight_norm": weight_norm(task.weights),
        "minus_step": float(-step),
    }


def measured_seed(seed: int, rate: float, decay: float) -> list[dict[str, float]]:
    """The checkpoints of one seed, kept once the seed is whole."""
    path = FOLDER / f"seed-{seed}-{rate}-{decay}.json"
    if path.exists():
        return json.loads(path.read_text())
    task, records = Task(seed), []
    began = time.process_time()

    def at_checkpoint(step: int) -> None:
        records.append(measure(task, step, rate, decay))
        if len(records) % 10 == 0:
            last = {name: round(records[-1][name], 3) for name in ("train_accuracy", "test_accuracy", *MEASURES[:4])}
            print(f"seed {seed} step {step}: {last} {time.process_time() - began:.0f} CPU s", flush=True)

    descend(task, rate, decay, at_checkpoint)
    write_atomically(path, json.dumps(records))
    return records


def agreement(records: list[dict[str, float]]) -> dict[str, Any]:
    """tau of every measure with both gaps, over all checkpoints and over the fitted ones."""
    phases = {"all": records, "fitted": [r for r in records if r["train_accuracy"] >= FITTED]}
    found: dict[str, Any] = {}
    for phase, chosen in phases.items():
        accuracy = [r["train_accuracy"] - r["test_accuracy"] for r in chosen]
        losses = [r["test_loss"] - r["train_loss"] for r in chosen]
        found[phase] = {"checkpoints": len(chosen)}
        for name in MEASURES:
            values = [r[name] for r in chosen]
            found[phase][name] = {
                "accuracy": _or_none(kendall_tau(values, accuracy)),
                "loss": _or_none(kendall_tau(values, losses)),
            }
    return found


def falls_at_the_transition(records: list[dict[str, float]]) -> dict[str, Any]:
    """SD at the last checkpoint that only memorises and at the first that generalises after it."""
    before = [r for r in records if r["train_accuracy"] >= FITTED and r["test_accuracy"] < MEMORISED]
    after = [r for r in records if before and r["step"] > before[-1]["step"] and r["test_accuracy"] >= GENERALISED]
    if not after:
        return {"transition": False, "best_test_accuracy": max(r["test_accuracy"] for r in records)}
    steps = {"from_step": before[-1]["step"], "to_step": after[0]["step"]}
    return {"transition": True} | steps | {name: [before[-1][name], after[0][name]] for name in MEASURES[:3]}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def mean_agreement(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for phase in seeds[0]:
        for name in MEASURES:
            for gap in ("accuracy", "loss"):
                taus = [seed[phase][name][gap] for seed in seeds if seed[phase][name][gap] is not None]
                means.setdefault(phase, {}).setdefault(name, {})[gap] = statistics.mean(taus) if taus else None
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", action="store_true", help="only choose rate and decay, by test accuracy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = select()
    if arguments.select:
        return
    rate, decay = chosen(table)
    runs = [measured_seed(seed, rate, decay) for seed in SEEDS]
    agreements = [agreement(records) for records in runs]
    write_result(
        "sharpness_grokking",
        settings={"modulus": MODULUS, "width": WIDTH, "train_part": TRAIN_PART, "steps": STEPS, "momentum": MOMENTUM},
        chosen={"rate": rate, "decay": decay},
        selection=table,
        seeds=list(SEEDS),
        tau=agreements,
        mean_tau=mean_agreement(agreements),
        transition=[falls_at_the_transition(records) for records in runs],
        records=runs,
    )


if __name__ == "__main__":
    main()
