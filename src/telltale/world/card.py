"""What people read of a bundle: the card (Markdown) and one page with curves, the worst episodes and what was not tested.

An evaluation, a certificate and failures come in as they are (``Any``): those files write bundles and so import this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from telltale.runs.html_report import Report, plotly_module

_WORST = 3


def card(evaluation: Any, certificate: Any, failed: Sequence[Any], missing_page: str | None = None) -> str:
    """The card as Markdown."""
    spread = evaluation.interval()
    lines = [
        f"# {evaluation.model} in {evaluation.world.id}",
        "",
        _claim(certificate),
        "",
        "| figure | value |",
        "|---|---|",
        f"| ASR, {len(evaluation.records)} starts | {evaluation.asr:.3f} |",
        f"| return, interquartile mean (95%) | {spread.estimate:.4g} ({spread.low:.4g} to {spread.high:.4g}) |",
        f"| predictions that break a law, before enforcement | {evaluation.violation_rate():.2%} |",
        f"| planner | {evaluation.planner['name']}, horizon {evaluation.planner['horizon']} |",
        f"| reward | {evaluation.reward} |",
        f"| laws inside the plans | {evaluation.law_mode} |",
        f"| engine steps, model steps | {evaluation.env_steps:,}, {evaluation.model_steps:,} |",
        f"| CPU-seconds | {evaluation.cpu_seconds:.1f} |",
    ]
    if certificate is not None:
        lines += ["", "## Conditions", "", "| level | condition | status | why |", "|---|---|---|---|"]
        lines += [f"| {c.level} | {name} | {c.status} | {c.reason} |" for name, c in certificate.conditions.items()]
    if failed:
        lines += ["", "## Failures", ""]
        lines += [
            f"* {count} of {len(failed)}: {label}" for label, count in Counter(f.label for f in failed).most_common()
        ]
    lines += ["", "## Not tested", "", *[f"* {item}" for item in untested(evaluation, certificate)]]
    if missing_page is not None:
        lines += ["", f"There is no page.html: {missing_page}"]
    return "\n".join(lines) + "\n"


def claim(level: int | None, requested: int | None) -> str:
    """The sentence with which a card leads; None for an evaluation that nobody certified."""
    if level is None or requested is None:
        return "Evaluated, not certified: no level is claimed."
    if level >= requested:
        return f"**Level {level}, earned.**"
    return f"**Level {level}**; level {requested} was asked for and not earned."


def _claim(certificate: Any) -> str:
    return claim(*((certificate.level, certificate.requested) if certificate is not None else (None, None)))


def untested(evaluation: Any, certificate: Any) -> list[str]:
    """What this bundle says nothing about."""
    found = [
        f"{name}: {c.reason}"
        for name, c in (certificate.conditions if certificate else {}).items()
        if c.status == "untested"
    ]
    if certificate is None:
        found.append("coherence, sensitivity, consistency: no certificate was asked for")
    others = [r for r in ("physical", "digital", "social", "scientific") if r != evaluation.world.regime]
    found.append(
        f"the {', '.join(others[:-1])} and {others[-1]} regimes, other worlds, other planners, other start distributions"
    )
    if evaluation.planner["name"] != "breadth_first":
        found.append("the planner without warm starts, and horizons other than the one above")
    return found


def page(evaluation: Any, certificate: Any, failed: Sequence[Any]) -> Report:
    """The page. Raises :class:`~telltale.errors.MissingExtraError` without Plotly."""
    draw = plotly_module()
    report = Report(f"{evaluation.model} in {evaluation.world.id}", subtitle=_claim(certificate).replace("*", ""))
    spread = evaluation.interval()
    report.cards(
        [
            (f"{evaluation.asr:.2f}", f"ASR over {len(evaluation.records)} starts"),
            (f"{spread.estimate:.4g}", f"return, interquartile mean ({spread.low:.4g} to {spread.high:.4g})"),
            (f"{evaluation.violation_rate():.2%}", "raw predictions that break a law"),
            (f"{evaluation.env_steps:,}", "engine steps"),
        ]
    )
    if certificate is not None:
        report.heading("Conditions")
        report.table(
            ["condition", "level", "status", "why"],
            [[n, c.level, c.status, c.reason] for n, c in certificate.conditions.items()],
        )
        if certificate.coherence is not None and certificate.coherence.errors:
            report.heading("Error by horizon")
            figure = draw.Figure()
            steps = list(range(1, len(certificate.coherence.errors) + 1))
            figure.add_scatter(x=steps, y=certificate.coherence.errors, name="model")
            if certificate.coherence.floor:
                figure.add_scatter(x=steps, y=certificate.coherence.floor, name="oracle (noise floor)")
            figure.add_hline(y=0.5, line_dash="dot")
            figure.update_layout(xaxis_title="steps ahead", yaxis_title="error / spread of states", height=340)
            report.figure(figure, caption="H* is the last horizon up to which the error stays below the dotted line.")
        if certificate.sensitivity is not None:
            report.heading("Interventions")
            figure = draw.Figure()
            figure.add_scatter(
                x=certificate.sensitivity.oracle, y=certificate.sensitivity.divergence, mode="markers", name="probes"
            )
            top = max([*certificate.sensitivity.oracle, 1e-9])
            figure.add_scatter(x=[0, top], y=[0, top], mode="lines", name="equal")
            figure.update_layout(
                xaxis_title="divergence in the engine", yaxis_title="divergence in the model", height=340
            )
            report.figure(figure, caption="Each point: one action changed, all else and all random numbers equal.")
    report.heading("Returns by start")
    figure = draw.Figure()
    ordered = sorted(evaluation.returns)
    figure.add_scatter(x=list(range(1, len(ordered) + 1)), y=ordered, mode="lines+markers", name="return")
    figure.update_layout(xaxis_title="starts, worst first", yaxis_title="return", height=300)
    report.figure(figure)
    _worst_episodes(report, evaluation, draw)
    if failed:
        report.heading("Failures")
        report.table(
            ["start", "label", "rules that fired"], [[f.seed, f.label, ", ".join(f.fired) or "none"] for f in failed]
        )
    report.heading("Not tested")
    for item in untested(evaluation, certificate):
        report.text(item)
    return report


def _worst_episodes(report: Report, evaluation: Any, draw: Any) -> None:
    report.heading("The worst episodes")
    worst = sorted(evaluation.records, key=lambda record: (record.success, record.episode.total))[:_WORST]
    for record in worst:
        episode = record.episode
        title = f"start {episode.seed}, return {episode.total:.4g}, {'succeeded' if record.success else 'failed'}"
        if evaluation.world.plain:
            rows = [[t, str(a), str(o), r.get("error", "")] for t, (a, o, r) in
                    enumerate(zip(episode.actions, episode.observations[1:], episode.receipts, strict=True))][:30]  # fmt: skip
            report.table(["step", "action", "state after", "refused"], rows, caption=title)
            continue
        states = np.stack([np.asarray(o, dtype=float).reshape(-1) for o in episode.observations[1:]])
        figure = draw.Figure()
        names = evaluation.world.columns or tuple(f"column {i}" for i in range(states.shape[1]))
        for i in range(min(states.shape[1], 4)):
            figure.add_scatter(y=states[:, i], name=names[i])
            figure.add_scatter(
                y=[float(p[i]) for p in record.predicted], name=f"{names[i]}, predicted", line={"dash": "dot"}
            )
        figure.update_layout(height=300, title=title)
        report.figure(figure)
