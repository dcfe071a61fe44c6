"""The monitor on the terminal: a live panel with the newest reading and the timeline of the ratio."""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from telltale.train.sharpness.monitor import AT_EDGE, DIVERGING, EDGE, PAST_EDGE, STABLE, Reading

COLOURS = {STABLE: "green", AT_EDGE: "yellow", PAST_EDGE: "red", DIVERGING: "bold red"}
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
        self._readings: list[Reading] = []

    def __call__(self, reading: Reading) -> None:
        """Take in ``reading`` and redraw."""
        self._readings.append(reading)
        if not self._live.is_started:
            self._live.start()
            atexit.register(self.close)
        self._live.update(panel(self._readings, width=self._width), refresh=True)

    def close(self) -> None:
        """Leave the panel as it stands and give the terminal back."""
        self._live.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> EdgePanel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def panel(readings: Sequence[Reading], *, width: int = 60) -> RenderableType:
    """The newest reading in words and figures over a bar for each of the last ``width`` readings."""
    newest = readings[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("state", Text(newest.state, style=COLOURS[newest.state]))
    table.add_row("of the edge", f"{newest.ratio:.3f} ± {newest.ratio_error:.3f}" + _slope(newest))
    if newest.lambda_max is not None and newest.error is not None:
        table.add_row("lambda_max", f"{newest.lambda_max:,.4g} ± {newest.error:.2g} at rate {newest.rate:g}")
    if newest.no_curvature:
        table.add_row("", "no curvature: the loss is linear here")
    dimension = next((r for r in reversed(readings) if r.sd is not None), None)
    if dimension is not None and dimension.sd is not None and dimension.sd_interval is not None:
        low, high = dimension.sd_interval
        table.add_row("SD", f"{dimension.sd:,.1f} [{low:,.1f}, {high:,.1f}] at step {dimension.step}")
    table.add_row("loss", f"{newest.loss:.4g}")
    table.add_row("cost", f"{newest.cost_share:.1%} of the CPU time; next look in about {newest.interval} steps")
    return Panel(Group(table, timeline(readings[-width:])), title=f"step {newest.step}", expand=False)


def timeline(readings: Sequence[Reading]) -> Text:
    """A bar for each reading, full at a ratio of 1.5, coloured by its state."""
    text = Text()
    for reading in readings:
        if math.isfinite(reading.ratio):
            height = min(max(reading.ratio, 0.0) / TOP, 1.0)
            text.append(BARS[min(int(height * len(BARS)), len(BARS) - 1)], style=COLOURS[reading.state])
        else:
            text.append("!", style=COLOURS[DIVERGING])
    return text


def one_line(reading: Reading) -> str:
    """A reading for a log: step, ratio, state."""
    known = f"{reading.ratio:.2f} of the edge" if math.isfinite(reading.ratio) else "no Hessian"
    return f"step {reading.step}  sharpness  {known}, {reading.state}"


def _slope(reading: Reading) -> str:
    if reading.slope is None:
        return ""
    if reading.slope > 0 and reading.ratio < EDGE[0]:
        return f", rising by {reading.slope:.3f} per 1,000 steps"
    return f", {reading.slope:+.3f} per 1,000 steps"
