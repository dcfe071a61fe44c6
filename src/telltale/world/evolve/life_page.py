"""The story of a life: a page with its timeline, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telltale.runs.html_report import Report, plotly_module
from telltale.world.certificate import Certificate
from telltale.world.evolve.level_three import RULES
from telltale.world.evolve.life import LifeLog, Round
from telltale.world.evolve.version_registry import Registry

_MARKS = {
    "alarm": ("x", "#b3261e"), "promotion": ("star", "#1b7f3b"), "rollback": ("triangle-left", "#7a3e9d"),
    "quarantine": ("square", "#a15c00"), "no-op": ("circle", "#5b6b7b"), "rejected": ("diamond", "#5b6b7b"),
}  # fmt: skip


def page(path: str | Path, certificate: Certificate | None = None) -> Report:
    """The page of the life in ``path``. Raises :class:`~telltale.errors.MissingExtraError` without Plotly."""
    draw = plotly_module()
    registry, life = Registry(path), LifeLog(Path(path) / "life")
    rounds, about = life.rounds(), life.about()
    events = [(done, event) for done in rounds for event in done.events]

    def count(what: str) -> int:
        return sum(event["what"] == what for _, event in events)

    claimed = "not certified" if certificate is None else f"level {certificate.level} earned"
    report = Report(f"A life in {about['world']}", subtitle=f"{len(rounds)} rounds, seed {about['seed']}; {claimed}")
    steps = rounds[-1].state.steps if rounds else 0
    report.cards(
        [
            (f"{steps:,}", "steps of the stream"), (str(count("alarm")), "alarms"), (str(registry.trials()), "trials at the gate"),
            (str(count("promotion")), "promotions"), (str(count("rollback")), "rollbacks"),
        ]
    )  # fmt: skip
    report.heading("Timeline")
    report.figure(
        _timeline(draw, rounds, registry), caption="Marks are events; the line below is the CUSUM of the monitor."
    )
    report.heading("What happened")
    shown = (
        "watch",
        "alarm",
        "laws",
        "diagnosis",
        "offer",
        "probes",
        "gate",
        "shadow",
        "canary",
        *_MARKS,
        "suspicion",
        "waiting",
    )
    report.table(
        ["round", "step", "event", "what was found"],
        [
            [done.number, done.state.steps, event["what"], event["words"]]
            for done, event in events
            if event["what"] in shown
        ],
    )
    _versions(report, registry)
    if certificate is not None:
        report.heading("Conditions")
        report.table(
            ["condition", "level", "status", "why", "rule"],
            [[n, c.level, c.status, c.reason, RULES.get(n, "")] for n, c in certificate.conditions.items()],
        )
    return report


def _timeline(draw: Any, rounds: Sequence[Round], registry: Registry) -> Any:
    figure = draw.Figure()
    played = [r for r in rounds if "success" in r.figures]
    figure.add_scatter(
        x=[r.state.steps for r in played], y=[r.figures["success"] for r in played], mode="lines+markers", name="success rate",
        text=[str(r.figures["active"])[:12] for r in played],
    )  # fmt: skip
    watched = [r for r in rounds if "cusum" in r.figures]
    figure.add_scatter(
        x=[r.state.steps for r in watched], y=[r.figures["cusum"] for r in watched], name="CUSUM (log e)", yaxis="y2"
    )
    for what, (symbol, color) in _MARKS.items():
        found = [(r.state.steps, e["words"]) for r in rounds for e in r.events if e["what"] == what]
        if found:
            figure.add_scatter(
                x=[s for s, _ in found], y=[1.08] * len(found), text=[w for _, w in found], mode="markers", name=what,
                marker={"symbol": symbol, "size": 13, "color": color},
            )  # fmt: skip
    names = registry.versions()
    first = 0
    for i, done in enumerate(rounds):
        last = i == len(rounds) - 1
        if last or rounds[i + 1].figures["active"] != done.figures["active"]:
            number = names.index(done.figures["active"])
            color = ("#e8f1f5", "#f4efe2", "#eaf5e8", "#f3e8f5")[number % 4]
            figure.add_vrect(x0=first, x1=done.state.steps, fillcolor=color, line_width=0, layer="below")
            first = done.state.steps
    figure.update_layout(
        height=420, xaxis_title="steps of the stream", yaxis={"title": "success rate", "range": [-0.05, 1.15], "domain": [0.35, 1]},
        yaxis2={"title": "CUSUM", "domain": [0, 0.25]},
    )  # fmt: skip
    return figure


def _versions(report: Report, registry: Registry) -> None:
    report.heading("Versions")
    active = registry.active().id
    rows = []
    for name in registry.versions():
        version = registry.version(name)
        role = "active" if name == active else ""
        operator = version.document["about"].get("operator", "")
        rows.append([name[:12], operator, (version.parent or "")[:12], len(version.evidence), role])
    report.table(["version", "made by", "parent", "transitions", "now"], rows)
    for _, event in ((e["number"], e) for e in registry.log() if e["kind"] == "promote"):
        body = event["body"]
        changed = registry.diff(body["from"], body["version"])
        if changed["added"] or changed["removed"]:
            report.text(f"What promotion {body['version'][:12]} changed:")
            report.code(
                "\n".join([*(f"- {line}" for line in changed["removed"]), *(f"+ {line}" for line in changed["added"])])
            )


def line(done: Round) -> str:
    """One round in a line."""
    success = f"success {done.figures['success']:.2f}" if "success" in done.figures else ""
    cusum = f"CUSUM {done.figures['cusum']:.1f}" if "cusum" in done.figures else ""
    parts = [
        f"round {done.number}",
        f"step {done.state.steps}",
        str(done.figures["active"])[:8],
        str(done.figures["phase"]),
    ]
    return "  ".join([*parts, *(p for p in (success, cusum) if p)])
