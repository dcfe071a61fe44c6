"""The pre-registered digits sweep: Sharpness Dimension beside every control, for both gaps, at every filter.

``sharpness_protocol.md`` fixes everything and was written first; this script stores its hash. Each seed has its own folder under
``runs/benchmarks/sharpness_sweep`` with one JSON line per net, so an interrupted sweep goes on where it stopped and seeds can
run side by side (``--seeds 10 11``). ``--report`` alone makes the result from what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from measurement import write_result
from telltale.errors import NumericalError
from telltale.runs.run_dir import RunDir
from telltale.signals.hessian import HessianOperator
from telltale.signals.sharpness_dimension import log_moduli, sharpness_dimension
from telltale.signals.statistics import kendall_tau, mean_over_seeds
from telltale.train.sharpness.compare import Point, compare
from telltale.train.sharpness.measure import weight_norm
from telltale.train.sharpness.persistence import lifetime_sum, pairwise, persistence_dimension

PROTOCOL = Path(__file__).with_name("sharpness_protocol.md")
FOLDER = Path("runs/benchmarks/sharpness_sweep")
SEEDS = tuple(range(10, 20))
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
BATCHES = (16, 32, 64, 128, 256)
EPOCHS = 80
WIDTHS = (64, 16, 16, 10)
TRAIN = 1000
HESSIANS, COMMON_BATCH = 6, 64
NULL = 1e-10
FURTHER_STEPS, EVERY = 1000, 2
FILTERS = {"all": 0.0, ">= .5": 0.5, ">= .9": 0.9, ">= .97": 0.97, ">= .99": 0.99}
FEWEST_NETS = 5
TOPOLOGY = ("ph_dimension", "ph_dimension_loss", "lifetime_sum", "lifetime_sum_loss")
GIVEN = ("minus_batch_size", "null_space", "train_loss")
RIVALS = ("trace", "lambda_max", "minus_batch_size", "sd_mixture")
UNSIGNED_RIVALS = ("train_loss", "weight_norm")
BLOCK = 96
"""Columns of a dense Hessian per batched backward pass."""

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(seed: int) -> Data:
    """Train and test images (samples, 64) and labels, split by the seed."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def initial_weights(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.nn.Linear(i, o, bias=False).weight for i, o in itertools.pairwise(WIDTHS)]


def logits(weights: Sequence[Tensor], images: Tensor) -> Tensor:
    hidden = images
    for weight in weights[:-1]:
        hidden = torch.relu(hidden @ weight.T)
    return hidden @ weights[-1].T


def loss(weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits(weights, images), labels)


def descend(weights: list[Tensor], data: Data, rate: float, batch: Tensor) -> None:
    gradients = torch.autograd.grad(loss(weights, data[0][batch], data[1][batch]), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(gradient, alpha=rate)


def batches(size: int, steps: int | None, generator: torch.Generator) -> Any:
    """Minibatches of shuffled epochs: ``steps`` of them, or 80 epochs."""
    made = 0
    for _ in itertools.count() if steps is not None else range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(size):
            if made == steps:
                return
            made += 1
            yield batch


def hessian(weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The dense Hessian (N, N) in float64, many columns per backward pass."""
    doubles = [weight.detach().double().requires_grad_() for weight in weights]
    parts = torch.autograd.grad(loss(doubles, images.double(), labels), doubles, create_graph=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    rows = []
    for block in torch.eye(gradient.numel(), dtype=torch.float64).split(BLOCK):
        columns = torch.autograd.grad(gradient, doubles, block, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([column.reshape(len(block), -1) for column in columns], dim=1))
    return torch.cat(rows)


def check_hessian(weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> None:
    """The batched columns are the library's products."""
    doubles = [weight.detach().double().requires_grad_() for weight in weights]
    operator = HessianOperator(loss(doubles, images.double(), labels), doubles)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worst = float((hessian(weights, images, labels) @ vector - operator.matvec(vector)).abs().max())
    if worst > 1e-10:
        raise SystemExit(f"the dense Hessian differs from the operator's products by {worst}")


def eigenvalues(weights: Sequence[Tensor], data: Data, rows: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(hessian(weights, data[0][rows], data[1][rows]))


def both_aggregates(spectra: Sequence[Tensor], rate: float) -> tuple[float, float]:
    """SD with exponents averaged per rank, and of the pooled atoms; rounded, so that ties are ties."""
    exponents = [log_moduli(nodes, rate=rate) for nodes in spectra]
    by_rank, mixture = (sharpness_dimension(exponents, aggregate=aggregate) for aggregate in ("rank", "mixture"))
    return round(by_rank, 6), round(mixture, 6)


def curvature(weights: Sequence[Tensor], data: Data, seed: int, rate: float, size: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    orders = [torch.randperm(TRAIN, generator=generator) for _ in range(HESSIANS)]
    own = [eigenvalues(weights, data, order[:size]) for order in orders]
    common = own if size == COMMON_BATCH else [eigenvalues(weights, data, order[:COMMON_BATCH]) for order in orders]
    full = eigenvalues(weights, data, torch.arange(TRAIN))
    sd_rank, sd_mixture = both_aggregates(own, rate)
    sd_rank_common, sd_mixture_common = both_aggregates(common, rate)
    return {
        "sd_rank": sd_rank,
        "sd_mixture": sd_mixture,
        "sd_rank_common": sd_rank_common,
        "sd_mixture_common": sd_mixture_common,
        "sd_full": round(sharpness_dimension(log_moduli(full, rate=rate)), 6),
        "lambda_max": float(full.max()),
        "trace": float(full.sum()),
        "lambda_1": sum(float(log_moduli(nodes, rate=rate).max()) for nodes in own) / HESSIANS,
        "null_space": sum(float((nodes.abs() <= NULL).sum()) for nodes in own) / HESSIANS,
    }


def topology(weights: list[Tensor], data: Data, rate: float, size: int, generator: torch.Generator) -> dict[str, Any]:
    """The trajectory's persistence over further steps; empty where it stands still or diverges."""
    walkers = [weight.detach().clone().requires_grad_() for weight in weights]
    places, losses = [], []
    for step, batch in enumerate(batches(size, FURTHER_STEPS, generator)):
        descend(walkers, data, rate, batch)
        if step % EVERY == EVERY - 1:
            with torch.no_grad():
                places.append(torch.cat([weight.reshape(-1) for weight in walkers]))
                losses.append(functional.cross_entropy(logits(walkers, data[0]), data[1], reduction="none"))
    try:
        euclidean, seen = pairwise(torch.stack(places)), pairwise(torch.stack(losses), metric="loss")
        found = {
            "ph_dimension": persistence_dimension(euclidean).dimension,
            "ph_dimension_loss": persistence_dimension(seen).dimension,
            "lifetime_sum": lifetime_sum(euclidean),
            "lifetime_sum_loss": lifetime_sum(seen),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}
    except NumericalError:
        return {}


def scores(weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        outputs = logits(weights, images)
        return float(functional.cross_entropy(outputs, labels)), float((outputs.argmax(1) == labels).double().mean())


def measure_net(seed: int, rate: float, size: int, epochs: int) -> dict[str, Any]:
    """Train one net and measure everything on it."""
    began = time.process_time()
    data, weights = digits(seed), initial_weights(seed)
    generator = torch.Generator().manual_seed(2_000_000 + seed)
    steps = None if epochs == EPOCHS else epochs * math.ceil(TRAIN / size)
    for batch in batches(size, steps, generator):
        descend(weights, data, rate, batch)
    train_loss, train_accuracy = scores(weights, data[0], data[1])
    test_loss, test_accuracy = scores(weights, data[2], data[3])
    record: dict[str, Any] = {"seed": seed, "learning_rate": rate, "batch_size": size, "train_accuracy": train_accuracy}
    if not math.isfinite(train_loss) or not math.isfinite(test_loss):
        return record | {"diverged": True}
    check_hessian(weights, data[0][:COMMON_BATCH], data[1][:COMMON_BATCH])
    record["gaps"] = {"loss": test_loss - train_loss, "accuracy": train_accuracy - test_accuracy}
    record["measures"] = curvature(weights, data, seed, rate, size) | {
        "minus_batch_size": -float(size),
        "rate_over_batch": rate / size,
        "weight_norm": weight_norm(weights),
        "train_loss": train_loss,
        **topology(weights, data, rate, size, generator),
    }
    return record | {"diverged": False, "cpu_seconds": round(time.process_time() - began, 2)}


def sweep_seed(folder: Path, seed: int, grid: Sequence[tuple[float, int]], epochs: int) -> None:
    """Measure what is missing of one seed."""
    settings = {"protocol": protocol_hash(), "epochs": epochs, "seed": seed}
    path = folder / f"seed-{seed}"
    run = RunDir.open(path) if path.exists() else RunDir.create(path, settings)
    if run.config() != settings:
        raise SystemExit(f"{run.path} was measured under another protocol or epochs; move it aside to start anew.")
    known = {(record["learning_rate"], record["batch_size"]) for record in run.metrics()}
    for rate, size in grid:
        if (rate, size) not in known:
            record = measure_net(seed, rate, size, epochs)
            run.log(record)
            told = {
                name: round(value, 3) for name, value in record.get("measures", {}).items() if name.startswith("sd")
            }
            print(f"seed {seed} rate {rate} batch {size}: train {record['train_accuracy']:.3f} {told}", flush=True)


def protocol_hash() -> str:
    """Of all that was fixed before the run; the last section, written after it, is left out."""
    fixed, _, _ = PROTOCOL.read_text().partition("## Departures")
    return hashlib.sha256(fixed.encode()).hexdigest()


def rows_at(points: Sequence[Point]) -> dict[str, Any]:
    """Every coefficient of every measure, for the nets that a filter lets through."""
    everywhere = [name for name in points[0].measures if name not in TOPOLOGY]
    parts = [(points, everywhere)]
    for name in TOPOLOGY:
        moving = [point for point in points if name in point.measures]
        if len(moving) > 1:
            parts.append((moving, [name]))
    rows = []
    for nets, measures in parts:
        result = compare(nets, measures=measures, given=GIVEN)
        rows += [row | {"seeds": result.seeds, "intervals": result.intervals} for row in result.to_dict()["rows"]]
    return {"nets": len(points), "seeds": len({point.seed for point in points}), "rows": rows}


def differences(points: Sequence[Point]) -> dict[str, Any]:
    """tau of ``sd_rank`` minus that of its rivals, paired within a seed."""
    found: dict[str, Any] = {}
    for gap in ("loss", "accuracy"):
        column: dict[str, list[float]] = {}
        for seed in sorted({point.seed for point in points if point.seed is not None}):
            nets = [point for point in points if point.seed == seed]
            taus = {
                name: kendall_tau([net.measures[name] for net in nets], [net.gaps[gap] for net in nets])
                for name in ("sd_rank", *RIVALS, *UNSIGNED_RIVALS)
            }
            for name in RIVALS:
                column.setdefault(f"tau - tau({name})", []).append(taus["sd_rank"] - taus[name])
            for name in UNSIGNED_RIVALS:
                column.setdefault(f"|tau| - |tau({name})|", []).append(abs(taus["sd_rank"]) - abs(taus[name]))
        found[gap] = {
            name: {key: value if math.isfinite(value) else None for key, value in vars(mean_over_seeds(values)).items()}
            for name, values in column.items()
        }
    return found


def report(folder: Path, *, epochs: int, name: str = "sharpness_sweep") -> None:
    """All that the protocol promises, from the records that are there."""
    runs = [RunDir.open(path) for path in sorted(folder.glob("seed-*"))]
    if {run.config()["protocol"] for run in runs} != {protocol_hash()}:
        raise SystemExit(f"{folder} holds no nets, or nets of another protocol than {PROTOCOL.name}.")
    records = [record for run in runs for record in run.metrics()]
    alive = [record for record in records if not record["diverged"]]
    size = sum(i * o for i, o in itertools.pairwise(WIDTHS))
    filters = {}
    for label, least in FILTERS.items():
        passed = [record for record in alive if record["train_accuracy"] >= least]
        per_seed = {r["seed"]: sum(q["seed"] == r["seed"] for q in passed) for r in passed}
        kept = [_point(record) for record in passed if per_seed[record["seed"]] >= FEWEST_NETS]
        left_out = sorted(seed for seed, count in per_seed.items() if count < FEWEST_NETS)
        filters[label] = {"passed": len(passed), "seeds_left_out": left_out}
        if kept:
            filters[label] |= rows_at(kept) | {"differences": differences(kept)}
    sharpness = [record["measures"]["lambda_max"] * record["learning_rate"] for record in alive]
    write_result(
        name,
        protocol_sha256=protocol_hash(),
        settings={"seeds": sorted({r["seed"] for r in records}), "rates": RATES, "batches": BATCHES, "epochs": epochs},
        nets=len(records),
        complete=len(records) == len(SEEDS) * len(RATES) * len(BATCHES),
        diverged=len(records) - len(alive),
        dead=sum(record["measures"]["null_space"] == size for record in alive),
        sd_over_n=[f(r["measures"]["sd_rank"] / size for r in alive) for f in (min, max)],
        full_batch_past_edge=sum(value > 2 for value in sharpness),
        full_batch_below_one=sum(value < 1 for value in sharpness),
        mixture_at_least_rank=sum(r["measures"]["sd_mixture"] >= r["measures"]["sd_rank"] - 1e-9 for r in alive),
        filters=filters,
        records=records,
    )


def _point(record: dict[str, Any]) -> Point:
    settings = {name: record[name] for name in ("learning_rate", "batch_size")}
    return Point(f"{record['seed']}", record["measures"], record["gaps"], settings, record["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="only make the result from the nets that are there")
    parser.add_argument("--trial", type=Path, help="a 2 x 2 grid with 3 epochs into this folder; no result is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.trial:
        for seed in arguments.seeds:
            sweep_seed(arguments.trial, seed, list(itertools.product(RATES[1:3], BATCHES[:2])), 3)
        return
    if not arguments.report:
        for seed in arguments.seeds:
            sweep_seed(FOLDER, seed, list(itertools.product(RATES, BATCHES)), EPOCHS)
    if arguments.report or len(arguments.seeds) == len(SEEDS):
        report(FOLDER, epochs=EPOCHS)


if __name__ == "__main__":
    main()
