"""A figure of the docs: one plot, one table, and the JSON both come from.

A page asks for a figure with the line ``<!-- figure: NAME -->``. The hook of ``mkdocs.yml`` puts the plot, a link to
the JSON and the folded table in its place. No figure is typed into a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

matplotlib.rcParams.update({"svg.hashsalt": "telltale", "font.size": 9, "axes.spines.top": False})
matplotlib.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none"})

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COLOURS = ("#2a6f97", "#e07a2f", "#4c956c", "#8d5a97", "#b23a48", "#7f8c8d", "#d4a017", "#1b1b1b")


def results(name: str) -> Any:
    """The committed JSON of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Figure:
    """A plot (or none, where a table says it all), its table, and the names of the JSON files it is drawn from."""

    caption: str
    sources: tuple[str, ...]
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    plot: Callable[[Axes], None] | None = None
    size: tuple[float, float] = (7.2, 3.2)
    note: str = ""

    def svg(self, path: Path) -> None:
        """Draws the plot into a file; the same data give the same bytes."""
        assert self.plot is not None
        canvas = Canvas(figsize=self.size, layout="constrained")
        self.plot(canvas.subplots())
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="svg", metadata={"Date": None})

    def table(self) -> str:
        """The table in Markdown."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass
class Registry:
    """Every figure by name. A figure is a function without arguments that reads its results and returns a Figure."""

    makers: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    def __call__(self, name: str) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
        """Decorator: registers a maker under a name."""

        def register(maker: Callable[[], Figure]) -> Callable[[], Figure]:
            assert name not in self.makers, name
            self.makers[name] = maker
            return maker

        return register


figure = Registry()


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of digits after the point; a dash for a missing one."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(entry: dict[str, float], digits: int = 3, sign: bool = False) -> str:
    """``{value, low, high}`` as text."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return f"{form.format(entry['value'])} [{form.format(entry['low'])}, {form.format(entry['high'])}]"


def quartiles(entry: dict[str, float], key: str = "cpu", digits: int = 3) -> str:
    """A median with its quartiles, as the benchmarks write them."""
    middle, low, high = (entry[key + end] for end in ("", "_q1", "_q3"))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: dict[str, Sequence[float]],
    *,
    errors: dict[str, Sequence[tuple[float, float]]] | None = None,
    unit: str = "",
    log: bool = False,
    reference: float | None = None,
) -> None:
    """Horizontal bars, one group a line, one colour a series. ``errors`` are (low, high) ends, not lengths."""
    height = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        at = [index + place * height for index in range(len(groups))]
        ends = None
        if errors and name in errors:
            pairs = list(zip(values, errors[name], strict=True))
            ends = [[max(v - low, 0) for v, (low, _) in pairs], [max(high - v, 0) for v, (_, high) in pairs]]
        axes.barh(at, values, height * 0.92, xerr=ends, color=COLOURS[place], label=name, ecolor="#444", capsize=2)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if log:
        axes.set_xscale("log")
    if reference is not None:
        axes.axvline(reference, color="#444", linewidth=0.8, linestyle="--")
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8)


def lines(
    axes: Axes,
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marker: str = "",
    log: str = "",
    reference: float | None = None,
) -> None:
    """Curves, one a series."""
    for place, (name, (across, up)) in enumerate(series.items()):
        axes.plot(across, up, marker=marker, color=COLOURS[place % len(COLOURS)], label=name, linewidth=1.3)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if reference is not None:
        axes.axhline(reference, color="#444", linewidth=0.8, linestyle="--")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(loc="best", fontsize=8)
