"""Exact decorrelation of 122,000 responses with 18 objectives: CPU time, what is left, and the released grid beside it.

Rewards follow verbosity to different degrees, some of them within prompts only; a third of the columns has ties, at which a rank
correlation jumps over 0: those are reported apart. Fitted on the rows of four fifths of the prompts, reported on the others. The
released grid leaves negative correlations alone. The target is 15 CPU seconds for all objectives.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from measurement import quartiles, write_result
from telltale.align.judge.decorrelation import METHODS, correlation, decorrelate
from telltale.align.judge.gate_fit import held_out_rows

PROMPTS, RESPONSES, OBJECTIVES = 61_000, 2, 18
TARGET = 15.0


def rewards() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (n, 18), verbosity (n,), prompts (n,); float64."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    base = torch.randn(PROMPTS, generator=generator).double().repeat_interleave(RESPONSES)
    own = torch.randn(len(groups), generator=generator).double()
    nuisance = base + own
    columns = []
    for index in range(OBJECTIVES):
        noise = torch.randn(len(groups), generator=generator).double()
        column = (index - 6) * 0.1 * base + index * 0.08 * own + noise
        columns.append((4 * column).round() / 4 if has_ties(index) else column)
    return torch.stack(columns, 1), nuisance, groups


def has_ties(index: int) -> bool:
    """Whether a column's rewards are rounded to quarters."""
    return index % 3 == 0


def measured(form: str, values: Tensor, nuisance: Tensor, groups: Tensor, rounds: int) -> dict[str, Any]:
    """One form of the root: CPU seconds and the largest |rho| that is left on fitted and on held-out rows."""
    outside = held_out_rows(groups, 0.2, seed=0)
    method, _, scope = form.partition(", ")
    options: dict[str, Any] = {"grid": "official"} if method == "released grid" else {"method": method}
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        whole = decorrelate(values, nuisance, groups=groups if scope == "within prompts" else None, **options)
        seconds.append(time.process_time() - began)
    inside = decorrelate(
        values[~outside], nuisance[~outside], groups=groups[~outside] if scope == "within prompts" else None, **options
    )
    kind = options.get("method", "spearman")

    def left(lambdas: Tensor, rows: Tensor) -> dict[str, float]:
        owners = groups[rows] if scope == "within prompts" else None
        found = [
            abs(correlation(values[rows, i] - lambdas[i] * nuisance[rows], nuisance[rows], method=kind, groups=owners))
            for i in range(OBJECTIVES)
        ]
        tied = [has_ties(index) for index in range(OBJECTIVES)]
        return {
            "continuous": max(rho for rho, ties in zip(found, tied, strict=True) if not ties),
            "tied": max(rho for rho, ties in zip(found, tied, strict=True) if ties),
        }

    everywhere = torch.ones(len(values), dtype=torch.bool)
    low, middle, high = quartiles(seconds)
    return {
        "cpu_seconds": {"median": middle, "q1": low, "q3": high, "rounds": seconds},
        "largest_rho_left_where_fitted": left(whole, everywhere),
        "largest_rho_left_held_out": left(inside, outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values, nuisance, groups = rewards()
    forms = [
        f"{method}, {scope}" for method in METHODS if method != "kendall" for scope in ("pooled", "within prompts")
    ]
    found = {}
    for form in [*forms, "released grid, pooled"]:
        found[form] = measured(form, values, nuisance, groups, 1 if "grid" in form else arguments.rounds)
        print(form, found[form], flush=True)
    kept = found["spearman, pooled"]["cpu_seconds"]["median"] <= TARGET
    write_result(
        "judge_decorrelation",
        rows=len(values),
        objectives=OBJECTIVES,
        target_cpu_seconds=TARGET,
        kept=kept,
        forms=found,
    )


if __name__ == "__main__":
    main()
