"""One page of a comparison: the table, learning curves, entropy, routes and teacher share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telltale.align.oger.comparison import summarise
from telltale.runs.html_report import Report, plotly_module

_CURVES = (
    ("hard", "hard problems solved", "Held-out problems that the base policy cannot solve: share of samples."),
    ("easy", "easy problems solved", "Held-out problems that it can."),
    ("routes", "routes", "Different correct routes per hard problem in 16 samples."),
    ("entropy", "nats per token", "Entropy of the policy on held-out problems."),
)


def save_page(records: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the page of ``records`` (of :func:`telltale.align.oger.comparison.compare`), whole or not at all."""
    report = Report(
        "OGER on multi-route arithmetic", subtitle="Each run through OGERTrainer; means over seeds, 95% t intervals."
    )
    rows = summarise(records)
    report.table(
        ["arm", "seeds", "hard", "easy", "pass@n hard", "routes", "entropy", "unfaithful", "teacher advantage < 0"],
        [
            [
                row["arm"],
                len(row["seeds"]),
                *(
                    _with_interval(row, name)
                    for name in ("hard", "easy", "hard_pass_at_n", "routes", "entropy", "unfaithful")
                ),
                "" if row["teacher_adv_neg_frac"] is None else f"{row['teacher_adv_neg_frac']:.2f}",
            ]
            for row in rows
        ],
        caption="At the last step. Unfaithful: of the right answers, the share with a wrong step.",
    )
    for name, axis, caption in _CURVES:
        report.heading(axis)
        report.figure(_figure(records, name, axis), caption=caption)
    report.heading("teachers in the batch")
    report.figure(
        _history(records, "oger/teacher_share", "teacher share"), caption="Share of rows that are teacher traces."
    )
    return report.save(path)


def _with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def _figure(records: Sequence[dict[str, Any]], name: str, axis: str) -> Any:
    curves: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for evaluation in record["evaluations"]:
            curves.setdefault(record["arm"], {}).setdefault(evaluation["step"], []).append(evaluation[name])
    return _lines(curves, axis)


def _history(records: Sequence[dict[str, Any]], name: str, axis: str) -> Any:
    curves: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for entry in record["history"]:
            if entry.get(name) is not None:
                curves.setdefault(record["arm"], {}).setdefault(entry["step"], []).append(entry[name])
    return _lines(curves, axis)


def _lines(curves: dict[str, dict[int, list[float]]], axis: str) -> Any:
    graphs = plotly_module()
    figure = graphs.Figure()
    for arm, points in curves.items():
        steps = sorted(points)
        means = [sum(points[step]) / len(points[step]) for step in steps]
        figure.add_trace(graphs.Scatter(x=steps, y=means, mode="lines+markers", name=arm))
    figure.update_layout(template="simple_white", xaxis_title="step", yaxis_title=axis, height=380)
    return figure
