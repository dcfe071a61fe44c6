"""The estimator against exact spectra on trained networks whose Hessians are mostly null, at 750 products or fewer.

Networks: digits (scikit-learn's real data), ReLU MLP 64-16-16-10 without bias (N = 1440), SGD, 4 rates by 4 batch sizes;
kept are those with more than half null mass, whatever their accuracy. Truth: dense spectra in float64 of the same 6
minibatches. Error: the worst of several seeds, real products in float32. What intervals cover is in sharpness_coverage.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from sharpness_paper_forms import smoothed_dimension
from telltale.signals.hessian import HessianOperator
from telltale.signals.sharpness_dimension import dimension_of, gradient_descent
from telltale.signals.spectrum import Spectrum, dense, joined, slq

DESIGN = {"runs": 30, "steps": 25}
MINIBATCHES, EPOCHS = 6, 80
RATES, BATCH_SIZES = (0.05, 0.1, 0.2, 0.4), (16, 24, 32, 64)
Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    """1000 shuffled images (1000, 64) in [0, 1], and their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:1000]
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def trained(rate: float, batch_size: int, data: Batch, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10, bias=False))
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(1000, generator=generator).split(batch_size):
            loss = functional.cross_entropy(model(data[0][rows]), data[1][rows])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-rate)
    return model


def hessians(model: nn.Module, data: Batch, batch_size: int, count: int) -> list[HessianOperator]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        rows = torch.randperm(1000, generator=generator)[:batch_size]
        loss = functional.cross_entropy(model(data[0][rows]), data[1][rows])
        found.append(HessianOperator(loss, list(model.parameters())))
    return found


def studied(rate: float, batch_size: int, data: Batch, seeds: int) -> dict[str, Any]:
    """Truth, errors of every form, and what the paper's histogram and KDE make of the same atoms."""
    model = trained(rate, batch_size, data)
    operators = hessians(model, data, batch_size, MINIBATCHES)
    exact = joined([dense(operator) for operator in operators])
    exponents = gradient_descent(rate)
    truth = {aggregate: dimension_of(exact, exponents, aggregate=aggregate) for aggregate in ("mixture", "rank")}
    nodes, mass = exact.atoms()
    row: dict[str, Any] = {
        "rate": rate,
        "batch_size": batch_size,
        "parameters": exact.size,
        "train_accuracy": float((model(data[0]).argmax(-1) == data[1]).float().mean()),
        "null_share": float(mass[nodes.abs() < 1e-6].sum()) / exact.size,
        "exact": truth,
        "errors": {},
    }
    spectra = [slq(operators, seed=seed, **DESIGN) for seed in range(seeds)]
    row["products"] = spectra[0].matvecs
    for aggregate in truth:
        errors = [dimension_of(s, exponents, aggregate=aggregate) - truth[aggregate] for s in spectra]
        row["errors"][f"atoms, {aggregate}"] = errors
    row["errors"] |= forms(spectra, rate, truth["mixture"])
    return row


def forms(spectra: Sequence[Spectrum], rate: float, truth: float) -> dict[str, list[float]]:
    settings: dict[str, dict[str, Any]] = {
        f"histogram, {bins} bins": {"form": "histogram", "bins": bins} for bins in (100, 1000, 10_000)
    }
    settings |= {f"kde, h={h}": {"form": "kde", "bandwidth": h} for h in (0.001, 0.01, 0.05)}
    settings |= {f"ps, h={h}": {"form": "ps", "bandwidth": h} for h in (0.001, 0.01, 0.05)}
    return {
        name: [smoothed_dimension(spectrum, rate=rate, **setting) - truth for spectrum in spectra[:1]]
        for name, setting in settings.items()
    }


def worst(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in rows[0]["errors"]:
        errors = torch.tensor([error / row["parameters"] for row in rows for error in row["errors"][name]])
        found[name] = {
            "worst_percent_of_N": 100 * float(errors.abs().max()),
            "mean_percent_of_N": 100 * float(errors.mean()),
            "root_mean_square_percent_of_N": 100 * float(errors.square().mean().sqrt()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, data = time.process_time(), digits()
    rows = [studied(*grid, data, arguments.seeds) for grid in itertools.product(RATES, BATCH_SIZES)]
    kept = [row for row in rows if row["null_share"] > 0.5]
    summary = worst(kept)
    for name, figures in summary.items():
        print(f"{name}: worst {figures['worst_percent_of_N']:.3f}%, mean {figures['mean_percent_of_N']:+.3f}% of N")
    write_result(
        "sharpness_estimator",
        design=DESIGN,
        networks=len(kept),
        left_out=[row for row in rows if row["null_share"] <= 0.5],
        summary=summary,
        rows=kept,
        cpu_seconds=time.process_time() - started,
    )


if __name__ == "__main__":
    main()
