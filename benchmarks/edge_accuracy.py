"""Accuracy of what was sent, on digit scenes and CIFAR-10: SAGE, its rivals, fusion, the audit, thumbnails and whole images.

Models come from ``edge_models.py``. Each pair of an edge and a server is measured once and kept beside the models, so that an
interrupted run goes on; the JSON is written after each. A server that was trained on random subsets of patches is told of apart:
the paper's is not. Pixels are sent as they are in the tables by patches, and through real codecs in those by bytes. Images on
which the audit chooses and fusion weights are fitted are told of nowhere. Differences are paired over images; errors of
means over pairs and budgets are clustered by image, because the same image stands in many cells.
"""

from __future__ import annotations

import argparse
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_models import cifar, configs
from measurement import write_result
from telltale.edge.arbitration import Arbiter, fit_weight
from telltale.edge.audit import audit_importances
from telltale.edge.evaluation import PAPER, Choice, answers, budgets_of, view_of
from telltale.edge.gate import Gate
from telltale.edge.images import Images
from telltale.edge.importance import available
from telltale.edge.sweep import swap_test, sweep_budgets
from telltale.models.vision import load_vision
from telltale.tasks import scenes

SHARES = (0.09, 0.20, 0.30, 0.41, 0.50)
TOLD = 0.41
"""Largest share of the patches in the pooled comparisons."""
FIXED = Choice("facility", "rollout", "patch")
CONTESTANTS = (
    PAPER,
    Choice("topk", "cls_last", "last"),
    Choice("facility", "cls_last", "patch"),
    Choice("topk", "rollout", "patch"),
    Choice("topk", "gradient", "patch"),
    Choice("sage", "rollout", "patch"),
    Choice("mmr", "gradient", "patch"),
    FIXED,
    Choice("facility", "gradient", "patch"),
    Choice("uniform", "cls_last", "patch"),
)
DRAWS = 3


@dataclass(frozen=True)
class Size:
    """How many images audit and fit, are told of, and go through codecs."""

    calibration: int
    told: int
    coded: int


def images_of(data: str, size: Size, folder: Path) -> Images:
    """Test images, the calibration's first."""
    count = size.calibration + size.told
    if data == "scenes":
        pixels, labels = scenes.scenes(count, split="test", seed=2024)
    else:
        pixels, labels = cifar(folder, "test")
        order = np.random.default_rng(2024).permutation(len(pixels))[:count]
        pixels, labels = pixels[order], labels[order]
    return Images(pixels, labels, tuple(Path(str(number)) for number in range(count)))


def measure(edge_path: Path, server_path: Path, images: Images, size: Size) -> dict[str, Any]:
    """Everything of one pair: right answers by contestant and budget over the offloaded images that are told of."""
    edge, server = load_vision(edge_path), load_vision(server_path)
    gate = Gate()
    names, spaces = tuple(available(edge)), ("patch", "last")
    view = view_of(edge, images.pixels, importances=names, spaces=spaces)
    away = gate.offloads(np.exp(view.logs.astype(np.float64)))
    first = np.arange(len(images)) < size.calibration
    fitting, told = np.flatnonzero(away & first), np.flatnonzero(away & ~first)
    if len(fitting) < 50 or len(told) < 50:
        # A sure edge offloads little: take what it is least sure of.
        unsure = np.argsort(-gate.uncertainty(np.exp(view.logs.astype(np.float64))))
        fitting = np.array([row for row in unsure if first[row]][:300])
        told = np.array([row for row in unsure if not first[row]][:1000])
    calibration = images.take(fitting[: min(len(fitting), 400)])
    audit = audit_importances(edge, calibration, server=server)
    budgets = budgets_of(SHARES, edge.patches)
    by_edge = view.logs.argmax(axis=1) == images.labels
    right: dict[tuple[str, int], np.ndarray] = {}
    fused: dict[tuple[str, int], np.ndarray] = {}
    weights: dict[tuple[str, int], float] = {}
    rows = np.concatenate([fitting, told])
    inside = view.take(rows)
    labels = images.labels[rows]
    for choice in dict.fromkeys([*CONTESTANTS, audit.choice]):
        for budget in budgets:
            logs = answers(server, images.pixels[rows], choice.indices(inside, budget))
            right[choice.name, budget] = (logs.argmax(axis=1) == labels)[len(fitting) :]
            weight = fit_weight(inside.logs[: len(fitting)], logs[: len(fitting)], labels[: len(fitting)])
            mixed, _ = Arbiter("fused", {0: weight}).decide(inside.logs, logs, 0)
            fused[choice.name, budget] = (mixed.argmax(axis=1) == labels)[len(fitting) :]
            weights[choice.name, budget] = weight
    for budget in budgets:
        draws = []
        for draw in range(DRAWS):
            indices = Choice("random", names[0]).indices(inside, budget, seed=draw)
            draws.append((answers(server, images.pixels[rows], indices).argmax(axis=1) == labels)[len(fitting) :])
        right["random", budget] = np.mean(draws, axis=0)
    whole = answers(server, images.pixels[rows])
    coded = images.take(np.arange(len(images))[~first][: size.coded])
    swept = sweep_budgets(
        *(edge, server, coded),
        choices=list(dict.fromkeys([audit.choice, PAPER, FIXED])),
        budgets=budgets[:4],
        gate=gate if away[~first][: size.coded].sum() >= 40 else Gate(threshold=0.1),
    )
    return {
        "told": told,
        "edge": by_edge[told],
        "kept": by_edge[~away & ~first],
        "ceiling": (whole.argmax(axis=1) == labels)[len(fitting) :],
        "offloaded_share": float(away.mean()),
        "budgets": budgets,
        "right": right,
        "fused": fused,
        "weights": weights,
        "audit": audit.document(),
        "choice": audit.choice.name,
        "swap": swap_test(server, images.take(told), view.take(told), budgets),
        "swept": swept.document(),
    }


def clustered(cells: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Mean over cells of (image numbers, differences), in points, and its error clustered by image."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for numbers, values in cells:
        for number, value in zip(numbers.tolist(), values.tolist(), strict=True):
            sums[number] = sums.get(number, 0.0) + 100 * value
            counts[number] = counts.get(number, 0) + 1
    total = sum(counts.values())
    mean = sum(sums.values()) / total
    residual = np.array([sums[number] - counts[number] * mean for number in sums])
    error = float(np.sqrt((residual**2).sum())) / total
    return {"points": mean, "error": error, "z": mean / error if error else 0.0}


def compared(pairs: dict[str, dict[str, Any]], first: Any, second: Any, budgets: tuple[int, ...]) -> dict[str, Any]:
    """``first - second`` of functions (pair, budget) -> right answers: pooled, by budget and by pair."""

    def cells(chosen: Any, wanted: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (pair["told"], np.asarray(first(pair, budget), dtype=float) - np.asarray(second(pair, budget), dtype=float))
            for pair in chosen
            for budget in wanted
        ]

    return {
        "pooled": clustered(cells(pairs.values(), budgets)),
        "by_budget": {budget: clustered(cells(pairs.values(), (budget,))) for budget in budgets},
        "by_pair": {name: clustered(cells([pair], budgets)) for name, pair in pairs.items()},
    }


CLAIMS = {
    "sage_minus_topk_same_importance": "SAGE is above top-k with the same importance",
    "sage_minus_random": "SAGE is above random patches",
    "sage_minus_uniform": "SAGE is above an even grid",
    "server_alone_minus_edge": "the server alone, from the audit's choice, is above the edge",
    "fused_minus_edge": "edge and server fused are above the edge",
    "audits_choice_minus_sage": "the audit's choice is above SAGE's preset",
    "fixed_default_minus_sage": "facility(rollout, patch) is above SAGE's preset",
}


def claims_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with its pooled difference and what this data set says: two standard errors decide.

    ``below_at``: budgets at which the difference is below zero by more than two standard errors.
    """
    rows = []
    for key, claim in CLAIMS.items():
        pooled = table[key]["pooled"]
        verdict = "holds" if pooled["z"] >= 2 else "does not hold" if pooled["z"] <= -2 else "undecided"
        below = [budget for budget, entry in table[key]["by_budget"].items() if entry["z"] < -2]
        rows.append({"claim": claim, **pooled, "verdict": verdict, "below_at": below})
    return rows


def byte_axis(pairs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over pairs of every contestant that all of them have, through real codecs, the cheapest first."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for pair in pairs.values():
        for row in pair["swept"]["rows"]:
            chosen = row["name"] == pair["choice"]
            fixed = row["name"] in (PAPER.name, FIXED.name) or row["name"].startswith("whole")
            for name in ["audit's choice"] * chosen + [row["name"]] * fixed:
                found.setdefault((name, row["budget"]), []).append(row)
    rows = [
        {
            "name": name,
            "budget": budget,
            "pairs": len(cells),
            **{key: float(np.mean([cell[key] for cell in cells])) for key in ("bytes", "server", "fused")},
            "largest": max(cell["largest"] for cell in cells),
            "server_minus_edge": float(np.mean([cell["versus_edge"][0] for cell in cells])),
            "fused_minus_edge": float(np.mean([cell["fused_versus_edge"][0] for cell in cells])),
        }
        for (name, budget), cells in found.items()
    ]
    return sorted(rows, key=lambda row: row["bytes"])


def told_of(pairs: dict[str, dict[str, Any]], patches: int) -> dict[str, Any]:
    """The tables of one data set."""
    all_budgets = budgets_of(SHARES, patches)
    budgets = budgets_of(tuple(share for share in SHARES if share <= TOLD), patches)
    names = list(dict.fromkeys(name for pair in pairs.values() for name, _ in pair["right"]))
    shared = [name for name in names if all((name, budgets[0]) in pair["right"] for pair in pairs.values())]
    accuracy = {
        name: {
            budget: 100 * float(np.mean([np.mean(pair["right"][name, budget]) for pair in pairs.values()]))
            for budget in all_budgets
        }
        for name in shared
    }
    accuracy["audit's choice"] = {
        budget: 100 * float(np.mean([np.mean(pair["right"][pair["choice"], budget]) for pair in pairs.values()]))
        for budget in all_budgets
    }

    def of(name: str) -> Any:
        return lambda pair, budget: pair["right"][name, budget]

    def chosen(pair: dict[str, Any], budget: int) -> np.ndarray:
        return pair["right"][pair["choice"], budget]

    def fused(pair: dict[str, Any], budget: int) -> np.ndarray:
        return pair["fused"][pair["choice"], budget]

    def at_edge(pair: dict[str, Any], budget: int) -> np.ndarray:
        return pair["edge"]

    fusion = compared(pairs, fused, at_edge, all_budgets)
    cells = [
        {
            "pair": name,
            "contestant": key[0],
            "budget": key[1],
            **clustered([(pair["told"], right.astype(float) - pair["edge"])]),
        }
        for name, pair in pairs.items()
        for key, right in pair["fused"].items()
    ]
    worst = min(cells, key=lambda cell: cell["points"])
    table: dict[str, Any] = {
        "pairs": {
            name: {
                "offloaded_images_told_of": len(pair["told"]),
                "offloaded_share": pair["offloaded_share"],
                "edge_on_offloaded": 100 * float(pair["edge"].mean()),
                "edge_on_kept": 100 * float(pair["kept"].mean()) if len(pair["kept"]) else None,
                "server_whole_image": 100 * float(pair["ceiling"].mean()),
                "audit": [
                    {key: row[key] for key in ("importance", "top", "random", "bottom", "gain", "error", "verdict")}
                    for row in pair["audit"]["deletions"]
                ],
                "warning": pair["audit"]["warning"],
                "choice": pair["choice"],
                "swap": pair["swap"],
            }
            for name, pair in pairs.items()
        },
        "accuracy_on_offloaded": accuracy,
        "sage_minus_topk_same_importance": compared(pairs, of(PAPER.name), of("topk(cls_last)"), budgets),
        "sage_minus_random": compared(pairs, of(PAPER.name), of("random"), budgets),
        "sage_minus_uniform": compared(pairs, of(PAPER.name), of("uniform"), budgets),
        "audits_choice_minus_sage": compared(pairs, chosen, of(PAPER.name), budgets),
        "fixed_default_minus_sage": compared(pairs, of(FIXED.name), of(PAPER.name), budgets),
        "server_alone_minus_edge": compared(pairs, chosen, at_edge, all_budgets),
        "fused_minus_edge": fusion,
        "fused_worst_cell": worst,
        "fused_cells_below_minus_one": [cell for cell in cells if cell["points"] < -1.0],
        "fused_cells": len(cells),
        "bytes": byte_axis(pairs),
        "images_on_the_byte_axis": {
            name: {"offloaded": pair["swept"]["offloaded"], "told_of": pair["swept"]["offloaded"] // 2}
            for name, pair in pairs.items()
        },
    }
    return {"claims": claims_of(table), **table}


def pairs_of(data: str, models: Path) -> list[tuple[str, Path, Path]]:
    """Table, edge and server of every pair that is trained."""
    edges = [found.parent for found in sorted(models.glob(f"{data}-edge-*/config.json"))]
    servers = [found.parent for found in sorted(models.glob(f"{data}-server-*/config.json"))]
    return [
        (f"{data}, server trained on subsets" if server.name.endswith("subsets") else data, edge, server)
        for server in servers
        for edge in edges
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="the cache of edge_models.py")
    parser.add_argument("--cifar", type=Path, required=True, help="local folder of CIFAR-10 images")
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--told", type=int, default=2000)
    parser.add_argument("--coded", type=int, default=300)
    parser.add_argument(
        "--only", default="", help="measure only scenes or cifar; what was measured before is told of all the same"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(arguments.calibration, arguments.told, arguments.coded)
    pairs: dict[str, dict[str, dict[str, Any]]] = {}

    def write() -> None:
        tables = {name: told_of(measured, 64) for name, measured in pairs.items()}
        models = {name: asdict(config) for name, config in configs().items()}
        write_result(
            "edge_accuracy", size=asdict(size), shares=SHARES, largest_share_compared=TOLD, models=models, data=tables
        )

    for data in ("scenes", "cifar"):
        images = None
        for table, edge, server in pairs_of(data, arguments.models):
            name = f"{edge.name} with {server.name}"
            kept = arguments.models / f"{edge.name}+{server.name}+{'+'.join(map(str, asdict(size).values()))}.pickle"
            measure_now = not kept.exists()
            if measure_now:
                if arguments.only and arguments.only != data:
                    continue
                images = images or images_of(data, size, arguments.cifar)
                found = measure(edge, server, images, size)
                aside = kept.with_suffix(".partial")
                aside.write_bytes(pickle.dumps(found))
                aside.replace(kept)
                print(f"{name}: edge {100 * found['edge'].mean():.1f}%, choice {found['choice']}", flush=True)
            pairs.setdefault(table, {})[name] = pickle.loads(kept.read_bytes())
            if measure_now:
                write()
    write()
    for name, measured in pairs.items():
        for row in told_of(measured, 64)["claims"]:
            print(f"{name}: {row['claim']}: {row['points']:+.2f} ± {row['error']:.2f}, {row['verdict']}")


if __name__ == "__main__":
    main()
