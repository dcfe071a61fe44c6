"""Ridge of many objectives with missing ratings: CPU time against the released script's loop, same split, same alphas.

The released loop fits scikit-learn's ``Ridge(fit_intercept=False)`` for every objective and every alpha on 80% of the rows, takes
the alpha with the smallest error on the other 20%, and fits once more. Its features are float32; the loop is timed in float64
as well, which is what ours computes in. Four patterns of missing ratings, ten objectives, nine alphas; every library on one
thread. Beside the times: weights against scikit-learn's in both precisions, shards merged in other orders, and memory above the
inputs' own for several numbers of rows.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits
from torch import Tensor

from measurement import interleave, quartiles, write_result
from telltale.align.judge.gram import GramStatistics
from telltale.align.judge.ridge import ALPHAS, fit_from_statistics, fit_ridge, official_split

SIZES = ((8_000, 512, 8.0), (40_000, 1024, 12.0))
"""Rows, features, target."""
PATTERNS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9,))
OBJECTIVES = 10
MEMORY_AT = ((10_000, 512), (40_000, 512), (160_000, 512))


def problem(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Features (n, d) float32 and labels (n, K) float64: each row rates the objectives of one pattern."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, size, generator=generator)
    weights = torch.randn(OBJECTIVES, size, generator=generator) / size**0.5
    labels = (features @ weights.T + torch.randn(rows, OBJECTIVES, generator=generator)).double()
    which = torch.randint(len(PATTERNS), (rows,), generator=generator)
    rated = torch.zeros(len(PATTERNS), OBJECTIVES, dtype=torch.bool)
    for index, members in enumerate(PATTERNS):
        rated[index, list(members)] = True
    return features, labels.masked_fill(~rated[which], torch.nan)


def released_loop(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Weights (K, d) and alphas, as the released script finds them."""
    weights, chosen = [], []
    for objective in range(labels.shape[1]):
        rated = ~np.isnan(labels[:, objective])
        train, test = rated & ~held_out, rated & held_out
        x, y, x_test, y_test = features[train], labels[train, objective], features[test], labels[test, objective]
        errors = []
        for alpha in ALPHAS:
            model = Ridge(alpha=alpha, fit_intercept=False).fit(x, y)
            errors.append(float(((model.predict(x_test) - y_test) ** 2).mean()))
        chosen.append(ALPHAS[int(np.argmin(errors))])
        weights.append(Ridge(alpha=chosen[-1], fit_intercept=False).fit(x, y).coef_)
    return np.stack(weights), chosen


def merged_in_any_order(features: Tensor, labels: Tensor) -> float:
    """Largest relative difference of weights between one pass and seven shards merged backwards."""
    groups = torch.arange(len(features)) // 4
    whole = GramStatistics(features.shape[1], OBJECTIVES, 5)
    whole.add(features, labels, groups=groups)
    shards = []
    for part in torch.arange(len(features)).chunk(7):
        shard = GramStatistics(features.shape[1], OBJECTIVES, 5)
        shard.add(features[part], labels[part], groups=groups[part])
        shards.append(shard)
    merged = shards[-1]
    for shard in reversed(shards[:-1]):
        merged = merged.merge(shard)
    one, other = fit_from_statistics(whole).weights, fit_from_statistics(merged).weights
    return float((one - other).abs().max() / one.abs().max())


def memory_above_inputs(rows: int, size: int) -> float:
    """Megabytes at the peak of a fit beyond those that the process held before it; Linux. To be called in a fresh process."""
    torch.set_num_threads(1)
    fit_ridge(*problem(500, size), validation="official")  # what the libraries themselves allocate on first use
    features, labels = problem(rows, size)
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    fit_ridge(features, labels, groups=torch.arange(rows) // 4)
    return (_status("VmHWM") - held) / 1024


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1])


def measured(rows: int, size: int, target: float, rounds: int) -> dict[str, Any]:
    """Times and agreement at one size."""
    features, labels = problem(rows, size)
    held_out = official_split(rows).bool().numpy()
    single = (features.numpy(), labels.numpy().astype(np.float32), held_out)
    double = (features.double().numpy(), labels.numpy(), held_out)
    kept: dict[str, Any] = {}

    def ours() -> int:
        kept["ours"] = fit_ridge(features, labels, validation="official")
        return 1

    def grouped() -> int:
        fit_ridge(features, labels, groups=torch.arange(rows) // 4)
        return 1

    def loop(name: str, data: tuple[Any, ...]) -> int:
        kept[name] = released_loop(*data)
        return 1

    contestants = {
        "telltale, the same split": ours,
        "telltale, five folds of prompts, all rows": grouped,
        "released loop, float32": lambda: loop("single", single),
        "released loop, float64": lambda: loop("double", double),
    }
    timings = interleave(contestants, rounds=rounds, warm_up=0)
    fit, (weights, alphas) = kept["ours"], kept["double"]
    apart = {
        name: float(np.max(np.abs(fit.weights.numpy() - found).max(1) / np.abs(weights).max(1)))
        for name, (found, _) in (("float64", kept["double"]), ("float32", kept["single"]))
    }
    ratios = {}
    for name in ("released loop, float32", "released loop, float64"):
        values = [a / b for a, b in zip(timings[name].cpu, timings["telltale, the same split"].cpu, strict=True)]
        low, middle, high = quartiles(values)
        ratios[name] = {"times ours": middle, "q1": low, "q3": high, "target": target}
    return {
        "rows": rows,
        "features": size,
        "cpu_seconds": {name: timing.cpu for name, timing in timings.items()},
        "ratios": ratios,
        "same_alphas": fit.alpha.tolist() == alphas == kept["single"][1],
        "largest_relative_difference_of_weights": apart,
        "shards_merged_backwards": merged_in_any_order(features[:8000], labels[:8000]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="the first size alone, and write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    found = []
    for rows, size, target in SIZES[: 1 if arguments.small else None]:
        found.append(measured(rows, size, target, arguments.rounds))
        print({key: found[-1][key] for key in found[-1] if key != "cpu_seconds"}, flush=True)
    if arguments.small:
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = [
            {"rows": rows, "features": size, "megabytes": pool.submit(memory_above_inputs, rows, size).result()}
            for rows, size in MEMORY_AT
        ]
    print(memory)
    write_result("judge_ridge", versions={"scikit-learn": version("scikit-learn")}, sizes=found, memory=memory)


if __name__ == "__main__":
    main()
