"""Timelines as pictures: text for a terminal, and an HTML page with one run over another and the memory below."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from telltale.config import check_integer
from telltale.errors import ConfigError, DataError
from telltale.runs.html_report import Report, plotly_module
from telltale.train.pipeline.simulation.timeline import ALL_REDUCE, COMPUTE, Event, Timeline

LEGEND = "F forward, B backward, U update, = all-reduce, . idle; digits are minibatches"
_COLUMNS_PER_OPERATION = 3
_COLUMNS_AT_FIRST = 120
"""Text columns that the page's first view would take."""
_COLOURS = {
    "F": "#3b7dd8",
    "B": "#e08a1e",
    "U": "#3f9b57",
    "A": "#9a6fb0",
    "activation": "#9cc3ef",
    "gradient": "#f3cf9b",
}
_NAMES = {
    "F": "forward",
    "B": "backward",
    "U": "update",
    "A": "all-reduce",
    "activation": "activations on a link",
    "gradient": "gradients on a link",
}
_TABLE_NAMES = _NAMES | {"U": "update with all-reduce"}


def text(timeline: Timeline, *, width: int | None = None, window: tuple[float, float] | None = None) -> str:
    """A Gantt chart of at most ``width`` columns, one row per rank, with a time axis and a legend.

    ``width=None`` is the terminal's. ``window`` is (first, last) second; None shows the whole run, or as much of its
    beginning as gives a median operation three columns. An operation is its letter and minibatch, cut to its last
    digits and filled with dashes to its duration. Raises :class:`~telltale.errors.ConfigError` for an empty window.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    check_integer("width", width, low=20)
    heads = [f"rank {rank} " for rank in range(timeline.ranks)]
    margin = max(map(len, heads))
    columns = width - margin
    first, last = _window(timeline, columns) if window is None else window
    if not first < last:
        raise ConfigError(f"window=({first}, {last}) is empty; expected a first second before the last.")
    scale = columns / (last - first)
    rows = []
    for rank, head in enumerate(heads):
        cells = ["."] * columns
        for event in timeline.events:
            if event.rank == rank and event.kind in (*COMPUTE, ALL_REDUCE):
                low = max(0, round((event.start - first) * scale))
                high = min(columns, round((event.end - first) * scale))
                if low < high:
                    cells[low:high] = _cells(event, high - low)
        rows.append(head.ljust(margin) + "".join(cells))
    figures = (
        f"{timeline.title}: {len(timeline.minibatches)} minibatches in {_seconds(timeline.makespan)}, "
        f"{_seconds(timeline.seconds_per_minibatch)} each, {timeline.bubble_fraction:.0%} idle"
    )
    left, right = _seconds(first), _seconds(last)
    axis = " " * margin + left + right.rjust(columns - len(left))
    return "\n".join([*textwrap.wrap(figures, width), *rows, axis, *textwrap.wrap(LEGEND, width)])


def html(
    timeline: Timeline,
    path: str | Path,
    *,
    other: Timeline | None = None,
    minibatches: int = 64,
    title: str = "Pipeline",
) -> Path:
    """Write a page with the Gantt chart of ``timeline``, ``other`` below it on the same time axis, and the memory.

    Only the first ``minibatches`` are drawn, so that the page stays light; the figures are of the whole runs. Raises
    :class:`~telltale.errors.MissingExtraError` without Plotly, :class:`~telltale.errors.ConfigError` for a run without
    an operation that takes time, and :class:`~telltale.errors.DataError` if ``other`` is of a plan with other stages.
    """
    check_integer("minibatches", minibatches, low=1)
    runs = [timeline] if other is None else [timeline, other]
    report = Report(title, subtitle=" over ".join(run.title for run in runs))
    report.cards(
        [
            card
            for run in runs
            for card in (
                (_seconds(run.seconds_per_minibatch), f"per minibatch, {run.label}"),
                (f"{run.bubble_fraction:.1%}", f"idle, {run.label}"),
            )
        ]
    )
    report.heading("Operations")
    report.figure(
        gantt_figure(runs, minibatches=minibatches),
        caption=(
            "Each row is a worker, the number in a bar its minibatch, a gap idle time; thin bars under a row are what it sends. "
            "An all-reduce averages the gradients of a stage's replicas and begins when a worker starts to wait for the others; "
            "in a recorded run it is a part of the update. Drag to look closer, double-click to see all, point at a bar for its "
            f"figures. The first {minibatches} minibatches at most are drawn."
        ),
    )
    if other is not None:
        comparison = timeline.compare(other)
        report.heading("One over the other")
        report.text(
            f"Seconds per minibatch, {timeline.label} over {other.label}: {comparison.seconds_ratio:.3f}. "
            f"Whole run: {comparison.makespan_ratio:.3f}."
        )
        rows = [
            (f"{_TABLE_NAMES[kind]}, stage {stage}", *map(_seconds, comparison.medians[stage, kind]))
            for stage, kind in sorted(comparison.medians, key=lambda place: (place[0], COMPUTE.index(place[1])))
        ]
        report.table(["median operation", timeline.label, other.label], rows)
    if any(run.sizes is not None for run in runs):
        report.heading("Memory")
        report.figure(
            memory_figure(runs, minibatches=minibatches),
            caption=(
                "What each worker holds: weight versions, gradients, optimizer state and saved activations, as the events imply."
                + (f" Dashed: {runs[1].label}." if other is not None else "")
            ),
        )
    return report.save(path)


def gantt_figure(runs: Sequence[Timeline], *, minibatches: int = 64) -> Any:
    """A Plotly figure with one panel per run, one row per rank, on a common time axis."""
    if len({(run.replicas, run.chunks) for run in runs}) > 1:
        raise DataError(f"{' and '.join(run.title for run in runs)} have different stages; expected the same ones.")
    objects = plotly_module()
    figure = plotly_module("plotly.subplots").make_subplots(
        rows=len(runs), cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=[run.title for run in runs]
    )
    shown: set[str] = set()
    for panel, run in enumerate(runs, start=1):
        for kind, colour in _COLOURS.items():
            events = [event for event in _first_events(run, minibatches) if event.kind == kind]
            if not events:
                continue
            on_link = kind in ("activation", "gradient")
            figure.add_trace(
                objects.Bar(
                    orientation="h",
                    base=[event.start for event in events],
                    x=[event.seconds for event in events],
                    y=[event.rank + (0.36 if kind == "activation" else 0.46 if on_link else 0.0) for event in events],
                    width=0.08 if on_link else 0.6,
                    marker={"color": colour, "line": {"color": "white", "width": 0 if on_link else 1}},
                    text=None if on_link else [str(event.minibatch) for event in events],
                    textposition="inside",
                    insidetextanchor="middle",
                    hovertext=[_hover(event) for event in events],
                    hoverinfo="text",
                    name=_NAMES[kind],
                    legendgroup=kind,
                    showlegend=kind not in shown,
                ),
                row=panel,
                col=1,
            )
            shown.add(kind)
        figure.update_yaxes(
            tickvals=list(range(run.ranks)),
            ticktext=[f"rank {rank}" for rank in range(run.ranks)],
            range=[run.ranks - 0.4, -0.5],
            row=panel,
            col=1,
        )
    # Wide enough bars to read their numbers; a double-click shows the rest.
    figure.update_xaxes(range=_window(runs[0], _COLUMNS_AT_FIRST))
    figure.update_xaxes(title_text="seconds", row=len(runs), col=1)
    height = 140 + len(runs) * (60 + 44 * runs[0].ranks)
    figure.update_layout(
        barmode="overlay", template="plotly_white", height=height, legend={"orientation": "h", "y": -0.2}
    )
    return figure


def memory_figure(runs: Sequence[Timeline], *, minibatches: int = 64) -> Any:
    """A Plotly figure: bytes per rank over time of every run that knows its sizes; the second run is dashed."""
    objects = plotly_module()
    figure = objects.Figure()
    palette = list(_COLOURS.values())[:4]
    for number, run in enumerate(runs):
        if run.sizes is None:
            continue
        until = max((event.end for event in _first_events(run, minibatches)), default=0.0)
        for rank in range(run.ranks):
            points = [point for point in run.memory(rank) if point[0] <= until]
            figure.add_trace(
                objects.Scatter(
                    x=[when for when, _ in points],
                    y=[size for _, size in points],
                    mode="lines",
                    line={"shape": "hv", "dash": "dash" if number else "solid", "color": palette[rank % len(palette)]},
                    name=f"rank {rank}, {run.label}",
                )
            )
    figure.update_layout(template="plotly_white", height=360, xaxis_title="seconds", yaxis_title="bytes")
    return figure


def _window(timeline: Timeline, columns: int) -> tuple[float, float]:
    durations = [event.seconds for lane in timeline.computing for event in lane if event.seconds > 0]
    first = timeline.events[0].start if timeline.events else 0.0
    if not durations:
        raise ConfigError("the timeline has no operation that takes time; expected one to draw.")
    fitting = columns * median(durations) / _COLUMNS_PER_OPERATION
    return first, first + min(timeline.makespan, fitting)


def _cells(event: Event, width: int) -> list[str]:
    if event.kind == ALL_REDUCE:
        return ["="] * width
    digits = str(event.minibatch)
    return list((event.kind + digits[max(0, len(digits) - width + 1) :] if width > 1 else event.kind).ljust(width, "-"))


def _first_events(run: Timeline, minibatches: int) -> list[Event]:
    stop = run.minibatches[0] + minibatches if run.minibatches else 0
    return [event for event in run.events if event.minibatch < stop]


def _hover(event: Event) -> str:
    lines = [f"{_NAMES[event.kind]} of minibatch {event.minibatch}", f"rank {event.rank}, stage {event.stage}"]
    if event.version is not None:
        lines.append(f"weight version {event.version}")
    if event.bytes:
        lines.append(f"{event.bytes:,.0f} bytes" + ("" if event.peer is None else f" to rank {event.peer}"))
    lines.append(f"{event.start:.6f} to {event.end:.6f} s ({_seconds(event.seconds)})")
    return "<br>".join(lines)


def _seconds(value: float) -> str:
    if value == 0 or value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
