"""A monitored run as one self-contained page: edge timeline, spectrum and exponents, dimension with interval, controls.

:class:`EdgePanel` is the monitor on the terminal: a live panel with the newest reading and the ratio over time.
"""

from __future__ import annotations

import atexit
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from telltale.errors import CheckpointError
from telltale.runs.html_report import Report, plotly_module
from telltale.train.sharpness.measure import over_checkpoints
from telltale.train.sharpness.monitor import (
    AT_EDGE,
    CONFIG_FILE,
    DIVERGING,
    EDGE,
    PAST_EDGE,
    STABLE,
    EdgeReading,
    read_readings,
)
from telltale.train.sharpness.readings import dimension_files
from telltale.train.sharpness.result import DIMENSION_FILE, LEGEND, SECOND_AXIS, Sharpness, spectrum_figures

LAST_POINTS = 5
REPORT_FILE = "sharpness.html"
COLOURS = {STABLE: "#2a8f5c", AT_EDGE: "#d69a00", PAST_EDGE: "#c8442b", DIVERGING: "#7a1020"}


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """The page of the monitored run ``run_dir`` at ``out`` (None: ``sharpness.html`` in it); returns its path.

    A measurement that ``telltale sharpness measure`` has left there is shown as well.
    Raises :class:`~telltale.errors.CheckpointError` if no monitor has left readings there, and for files that are damaged.
    """
    folder = Path(run_dir)
    readings = read_readings(folder)
    if not readings and (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"the monitor of {folder} has not looked yet: its budget allowed no look in so short a run; expected a longer run, "
            f"a larger budget or a smaller probe."
        )
    if not readings:
        raise CheckpointError(
            f"{folder} holds no readings of a monitor (sharpness.jsonl); expected the run_dir of a SharpnessMonitor."
        )
    dimensions = [(step, Sharpness.load(file)) for step, file in dimension_files(folder)]
    settings = _settings(folder)
    newest = readings[-1]
    report = Report(
        f"Edge of stability: {newest.state}",
        subtitle=f"{folder.resolve().name}, step {newest.step:,}"
        + "".join(f", {name} {settings[name]}" for name in ("optimizer", "jacobian", "parameters") if name in settings),
    )
    _summary(report, readings, dimensions)
    report.heading("Timeline")
    report.figure(_timeline(readings), caption=_TIMELINE_CAPTION)
    report.figure(_losses(readings), caption="The loss at each reading, and the learning rate.")
    if dimensions:
        _dimensions(report, dimensions)
    if (folder / DIMENSION_FILE).exists():
        _measured(report, Sharpness.load(folder / DIMENSION_FILE))
    report.heading("Readings")
    last = readings[-20:]
    report.table(
        ("step", "ratio", "± error", "lambda_max", "rate", "loss", "state"),
        [
            (
                f"{r.step:,}",
                f"{r.ratio:.3f}",
                f"{r.ratio_error:.3f}",
                "-" if r.lambda_max is None else f"{r.lambda_max:,.4g}",
                f"{r.rate:.3g}",
                f"{r.loss:.4g}",
                r.state,
            )
            for r in last
        ],
        caption=f"The last {len(last)} of {len(readings)}; all are in `sharpness.jsonl`.",
    )
    return report.save(folder / REPORT_FILE if out is None else out)


_TIMELINE_CAPTION = (
    "`lambda_max` * rate over the optimizer's threshold, with the Ritz residual as error bar. At 1 the steepest direction starts "
    "to overshoot; full-batch training at a constant rate tends to go there and stay. The band is what counts as at the edge."
)


def _summary(report: Report, readings: list[EdgeReading], dimensions: list[tuple[int, Sharpness]]) -> None:
    newest = readings[-1]
    cards = [
        (f"{newest.ratio:.2f} ± {newest.ratio_error:.2f}", "of the edge of stability"),
        (newest.state, "state"),
        (f"{newest.cost_share:.1%}", "of the CPU time was the monitor's"),
    ]
    if newest.forward_ratio is not None:
        cards.insert(1, (f"{newest.forward_ratio:.2f}", "of the edge, from forward passes alone"))
    if newest.slope is not None:
        cards.insert(2, (f"{newest.slope:+.3f}", "rise of the ratio per 1,000 steps"))
    if dimensions:
        found = dimensions[-1][1]
        cards.insert(1, (f"{found.sd:,.1f}", f"Sharpness Dimension of {found.size:,}; {found.interval_text}"))
    report.cards(cards)
    if newest.leading:
        report.heading("Where the edge is")
        report.table(
            ("module", "share of the steepest direction"),
            [(module, f"{share:.1%}") for module, share in newest.leading.items()],
            caption="Squares of the leading Ritz vector at the newest reading, by module.",
        )
    if newest.receipt is not None:
        report.text(
            f"Receipt of the products: asymmetry {newest.receipt.asymmetry:.1e}, difference from the change of the gradient "
            f"{newest.receipt.difference or 0.0:.1e}, of the gradient from the slope of the loss {newest.receipt.slope or 0.0:.1e}."
        )
    if newest.no_curvature:
        report.text("The loss has no curvature here: H = 0, a linear or dead model rather than a stable one.")
    if any(reading.state == DIVERGING for reading in readings):
        first = next(reading.step for reading in readings if reading.state == DIVERGING)
        report.text(f"The run was read as diverging at step {first:,}. Lower the learning rate or go back before it.")


def _dimensions(report: Report, dimensions: list[tuple[int, Sharpness]]) -> None:
    step, newest = dimensions[-1]
    report.heading("Sharpness Dimension")
    report.figure(
        _dimension_timeline(dimensions),
        caption="SD with its jackknife interval over minibatches. It does not predict generalisation: read it beside the controls.",
    )
    last = [found for _, found in dimensions[-LAST_POINTS:] if found.jacobian == newest.jacobian]
    if len(last) > 1 and len({(found.size, len(set(found.spectrum.batch))) for found in last}) == 1:
        report.text(
            f"Over the last {len(last)} points together, each exponent taken where it is largest: {over_checkpoints(last):,.1f}; "
            f"averaged: {over_checkpoints(last, over='mean'):,.1f}. The definition takes the largest over the attractor."
        )
    report.heading(f"Spectrum at step {step:,}")
    for figure, caption in spectrum_figures(newest):
        report.figure(figure, caption=caption)
    report.heading("Controls")
    names = list(dict.fromkeys(name for _, found in dimensions for name in found.controls))
    shown = dimensions[-12:]
    report.table(
        ("step", "SD", *names),
        [
            (f"{at:,}", f"{found.sd:,.1f}", *(f"{found.controls.get(name, math.nan):,.4g}" for name in names))
            for at, found in shown
        ],
        caption="What orders runs much as the dimension does; if one of these orders the runs alike, SD adds nothing.",
    )


def _timeline(readings: list[EdgeReading]) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    figure.add_hrect(y0=EDGE[0], y1=EDGE[1], fillcolor="#d69a00", opacity=0.15, line_width=0)
    figure.add_hline(y=1.0, line_dash="dot", line_color="#5b6b7b")
    known = [reading for reading in readings if math.isfinite(reading.ratio)]
    figure.add_scatter(
        x=[r.step for r in known], y=[r.ratio for r in known], mode="lines", line_color="#9fb2c3", showlegend=False
    )
    beside = [reading for reading in known if reading.forward_ratio is not None]
    if beside:
        figure.add_scatter(
            x=[r.step for r in beside],
            y=[r.forward_ratio for r in beside],
            mode="lines",
            line={"color": "#7a5ea8", "dash": "dot"},
            name="forward passes alone",
        )
    for state, colour in COLOURS.items():
        part = [reading for reading in known if reading.state == state]
        if part:
            figure.add_scatter(
                x=[r.step for r in part],
                y=[r.ratio for r in part],
                error_y={"type": "data", "array": [r.ratio_error for r in part]},
                mode="markers",
                marker_color=colour,
                name=state,
            )
    figure.update_layout(xaxis_title="step", yaxis_title="ratio to the edge", template="plotly_white", height=400)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _losses(readings: list[EdgeReading]) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    steps = [reading.step for reading in readings]
    figure.add_scatter(x=steps, y=[reading.loss for reading in readings], name="loss", line_color="#0b6e99")
    figure.add_scatter(
        x=steps, y=[r.rate for r in readings], name="rate", yaxis="y2", line={"color": "#b08968", "dash": "dot"}
    )
    figure.update_layout(
        xaxis_title="step",
        yaxis_title="loss",
        yaxis2=SECOND_AXIS | {"title": "learning rate", "rangemode": "tozero"},
        template="plotly_white",
        height=320,
        legend=LEGEND,
    )
    return figure


def _dimension_timeline(dimensions: list[tuple[int, Sharpness]]) -> Any:
    plotly = plotly_module()
    values = [found.sd for _, found in dimensions]
    figure = plotly.Figure(
        plotly.Scatter(
            x=[step for step, _ in dimensions],
            y=values,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, (found.interval or (0.0, found.sd))[1] - found.sd) for _, found in dimensions],
                "arrayminus": [max(0.0, found.sd - (found.interval or (found.sd, 0.0))[0]) for _, found in dimensions],
            },
            mode="lines+markers",
            line_color="#0b6e99",
        )
    )
    figure.update_layout(xaxis_title="step", yaxis_title="Sharpness Dimension", template="plotly_white", height=360)
    return figure


def _measured(report: Report, found: Sharpness) -> None:
    report.heading(f"Measured checkpoint: {found.sd:,.1f} of {found.size:,}; {found.interval_text}")
    report.text(
        f"By `telltale sharpness measure`: Jacobian {found.jacobian}, rate {found.rate:g}, aggregate {found.aggregate}."
    )
    found.describe(report)


def _settings(folder: Path) -> dict[str, Any]:
    """The monitor's own; empty if the file is not there."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold the settings of a monitor: {error}") from error


TERMINAL_COLOURS = {STABLE: "green", AT_EDGE: "yellow", PAST_EDGE: "red", DIVERGING: "bold red"}
BARS = "▁▂▃▄▅▆▇█"
TOP = 1.5
"""Ratio of the highest bar; what is above it is drawn as high."""


class EdgePanel:
    """``SharpnessMonitor(..., on_reading=[EdgePanel()])``: redrawn at every reading, from the first one on.

    Close it, or use it in a with block, before other things are printed; the end of the program closes it too.
    """

    def __init__(self, *, console: Console | None = None, width: int = 60) -> None:
        self.console = console or Console(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False)
        self._width = width
        self._readings: list[EdgeReading] = []

    def __call__(self, reading: EdgeReading) -> None:
        """Take in ``reading`` and redraw."""
        self._readings.append(reading)
        if not self._live.is_started:
            self._live.start()
            atexit.register(self.close)
        self._live.update(panel(self._readings, width=self._width), refresh=True)

    def close(self) -> None:
        """Leave the panel as it is and give the terminal back."""
        self._live.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> EdgePanel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def panel(readings: Sequence[EdgeReading], *, width: int = 60) -> RenderableType:
    """The newest reading in words and figures over a bar for each of the last ``width`` readings."""
    newest = readings[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("state", Text(newest.state, style=TERMINAL_COLOURS[newest.state]))
    table.add_row("of the edge", f"{newest.ratio:.3f} ± {newest.ratio_error:.3f}" + _slope(newest))
    if newest.forward_ratio is not None:
        table.add_row("forward only", f"{newest.forward_ratio:.3f} of the edge, a lower bound")
    if newest.lambda_max is not None and newest.error is not None:
        table.add_row("lambda_max", f"{newest.lambda_max:,.4g} ± {newest.error:.2g} at rate {newest.rate:g}")
    if newest.no_curvature:
        table.add_row("", "no curvature: the loss is linear here")
    dimension = next((r for r in reversed(readings) if r.sd is not None), None)
    if newest.leading:
        module, share = next(iter(newest.leading.items()))
        table.add_row("steepest in", f"{module}, {share:.0%} of the direction")
    if newest.receipt is not None:
        table.add_row("receipt", f"largest residual {newest.receipt.worst:.1e}")
    if dimension is not None and dimension.sd is not None:
        table.add_row("SD", f"{dimension.sd:,.1f} {_interval(dimension)} at step {dimension.step}")
    table.add_row("loss", f"{newest.loss:.4g}")
    table.add_row("cost", f"{newest.cost_share:.1%} of the CPU time; next look in about {newest.interval} steps")
    return Panel(Group(table, timeline(readings[-width:])), title=f"step {newest.step}", expand=False)


def timeline(readings: Sequence[EdgeReading]) -> Text:
    """A bar for each reading, full at a ratio of 1.5, coloured by its state."""
    text = Text()
    for reading in readings:
        if math.isfinite(reading.ratio):
            height = min(max(reading.ratio, 0.0) / TOP, 1.0)
            text.append(BARS[min(int(height * len(BARS)), len(BARS) - 1)], style=TERMINAL_COLOURS[reading.state])
        else:
            text.append("!", style=TERMINAL_COLOURS[DIVERGING])
    return text


def one_line(reading: EdgeReading) -> str:
    """A reading for a log: step, ratio, state."""
    known = f"{reading.ratio:.2f} of the edge" if math.isfinite(reading.ratio) else "no Hessian"
    return f"step {reading.step}  sharpness  {known}, {reading.state}"


def _interval(reading: EdgeReading) -> str:
    count = f"over {reading.sd_minibatches} minibatches" if reading.sd_minibatches else ""
    if reading.sd_interval is None:
        return f"{count}, too few for an interval"
    low, high = reading.sd_interval
    return f"[{low:,.1f}, {high:,.1f}] {count}"


def _slope(reading: EdgeReading) -> str:
    if reading.slope is None:
        return ""
    if reading.slope > 0 and reading.ratio < EDGE[0]:
        return f", rising by {reading.slope:.3f} per 1,000 steps"
    return f", {reading.slope:+.3f} per 1,000 steps"
