"""How often the jackknife interval holds the Sharpness Dimension of the population, on three trained networks.

Population: 200 minibatches of the training batch size, their exact spectra pooled (dense, float64). Each of 500 repeats
measures as ``telltale sharpness measure`` does by default, 30 probes of 25 products over 4, 6 or 10 minibatches of the
population. A probe's run depends on its minibatch alone, so each minibatch has 30 of them, from which the repeats draw.
Networks: digits, ReLU MLP 64-8-8-10 without bias (N = 656), SGD at three rates and batch sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from sharpness_estimator import Batch, digits, trained
from telltale.signals.sharpness_dimension import dimension_of, gradient_descent, interval
from telltale.signals.spectrum import Spectrum, dense, joined, slq
from telltale.train.sharpness.probe import Probe

WIDTH, POPULATION, PROBES, STEPS = 8, 200, 30, 25
NETWORKS = ((0.1, 64), (0.2, 32), (0.4, 16))
COUNTS = (4, 6, 10)
NOMINAL, TARGET = 0.95, 0.90


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def population(model: nn.Module, data: Batch, batch_size: int, size: int) -> tuple[Spectrum, list[Spectrum]]:
    """The pooled exact spectrum, and the runs of every minibatch."""
    generator = torch.Generator().manual_seed(2)
    exact, runs = [], []
    for index in range(size):
        rows = torch.randperm(len(data[1]), generator=generator)[:batch_size]
        operator = Probe(model, loss_of, [(data[0][rows], data[1][rows])]).operator(check=index == 0)
        exact.append(dense(operator))
        runs.append(slq([operator], runs=PROBES, steps=STEPS, seed=index))
    return joined(exact), runs


def drawn(runs: list[Spectrum], count: int, generator: torch.Generator) -> Spectrum:
    """30 runs over ``count`` minibatches, as :func:`slq` shares them out."""
    picked = torch.randperm(len(runs), generator=generator)[:count].tolist()
    orders = [torch.randperm(PROBES, generator=generator).tolist() for _ in picked]
    chosen = [(position, orders[position][run // count]) for run in range(PROBES) for position in (run % count,)]
    return Spectrum(
        size=runs[0].size,
        nodes=[runs[picked[position]].nodes[run] for position, run in chosen],
        weights=[runs[picked[position]].weights[run] for position, run in chosen],
        batch=[position for position, _ in chosen],
        matvecs=PROBES * STEPS,
        exact=False,
        residuals=[runs[picked[position]].residuals[run] for position, run in chosen],
    )


def measured(
    model: nn.Module, data: Batch, rate: float, batch_size: int, size: int, keep: Path | None
) -> tuple[Spectrum, list[Spectrum]]:
    """:func:`population`, read from the folder ``keep`` where an earlier call left it: the products take the time."""
    file = None if keep is None else keep / f"coverage-{rate:g}-{batch_size}-{size}.pt"
    if file is not None and file.exists():
        whole, runs = torch.load(file, weights_only=False)
        return whole, runs
    found = population(model, data, batch_size, size)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
    return found


def studied(
    rate: float, batch_size: int, data: Batch, size: int, repeats: int, keep: Path | None = None
) -> dict[str, Any]:
    model = trained(rate, batch_size, data, width=WIDTH)
    whole, runs = measured(model, data, rate, batch_size, size, keep)
    exponents, found = gradient_descent(rate), {}
    truth = dimension_of(whole, exponents)
    for count in COUNTS:
        generator, hits, widths = torch.Generator().manual_seed(count), 0, []
        for _ in range(repeats):
            low, high = interval(drawn(runs, count, generator), exponents, level=NOMINAL)
            hits += low <= truth <= high
            widths.append(high - low)
        found[str(count)] = {"coverage": hits / repeats, "median_width": statistics.median(widths)}
    return {
        "rate": rate,
        "batch_size": batch_size,
        "parameters": whole.size,
        "train_accuracy": float((model(data[0]).argmax(-1) == data[1]).float().mean()),
        "truth": truth,
        "by_minibatches": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int, default=POPULATION)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="folder for the products' results, so that a second call is quick")
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, data, rows = time.process_time(), digits(), []
    for rate, batch_size in NETWORKS:
        rows.append(studied(rate, batch_size, data, arguments.population, arguments.repeats, arguments.keep))
        print(rows[-1], flush=True)
    if not arguments.trial:
        write_result(
            "sharpness_coverage",
            nominal=NOMINAL,
            target=TARGET,
            population=arguments.population,
            repeats=arguments.repeats,
            probes=PROBES,
            steps=STEPS,
            networks=rows,
            kept=all(row["by_minibatches"]["4"]["coverage"] >= TARGET for row in rows),
            cpu_seconds=time.process_time() - started,
        )


if __name__ == "__main__":
    main()
