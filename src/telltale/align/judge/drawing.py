"""How an explanation looks: a table with bars in the terminal, and a page with Plotly bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from telltale.align.judge.explanation import Comparison, Explanation, by_size
from telltale.runs.report import Report, plotly_module

_UP, _DOWN = "#0b6e99", "#b3541e"


def explanation_table(explanation: Explanation) -> Table:
    """Objectives with reward, weight, coefficient, contribution and its bar; the largest contribution first."""
    title = f"score {explanation.score:+.4f}" + ("  (prompt truncated)" if explanation.truncated else "")
    table = _table(title, ("reward", "weight", "coefficient", "contribution"))
    largest = _largest(explanation.terms)
    for term in by_size(explanation.terms):
        table.add_row(
            term.objective,
            f"{term.reward:.4f}",
            f"{term.weight:.4f}",
            f"{term.coefficient:+.4f}",
            f"{term.contribution:+.4f}",
            Bar(term.contribution, largest),
        )
    table.add_section()
    table.add_row("sum", "", "", "", f"{explanation.score:+.4f}", "")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """What sets two responses apart: both rewards of every objective and what their difference adds to the score's.

    Bars to the right speak for the first.
    """
    title = f"first {comparison.first.score:+.4f}, second {comparison.second.score:+.4f}"
    table = _table(title, ("first", "second", "coefficient", "difference"))
    largest = _largest(comparison.deltas)
    for delta in by_size(comparison.deltas):
        name = delta.objective
        table.add_row(
            name,
            f"{comparison.first.rewards[name]:.4f}",
            f"{comparison.second.rewards[name]:.4f}",
            f"{delta.coefficients[0]:+.4f}" if comparison.same_gate else "differs",
            f"{delta.contribution:+.4f}",
            Bar(delta.contribution, largest),
        )
    table.add_section()
    table.add_row("sum", "", "", "", f"{comparison.difference:+.4f}", "")
    if not comparison.same_gate:
        table.caption = "The two answer different prompts, so the gate weighs them differently."
    return table


@dataclass(frozen=True)
class Bar:
    """A bar from a zero in the middle, to the right for a positive ``value``, as wide as its column leaves it.

    ``largest`` is the absolute value that fills a side.
    """

    value: float
    largest: float

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(9, options.max_width), min(31, options.max_width))

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        yield bar(self.value, self.largest, half=(min(31, options.max_width) - 1) // 2)


def bar(value: float, largest: float, *, half: int) -> Text:
    """The text of a :class:`Bar`, with ``half`` characters on either side of zero."""
    cells = round(half * abs(value) / largest) if largest > 0 else 0
    if value < 0:
        return Text(" " * (half - cells) + "█" * cells + "│" + " " * half, style=_DOWN)
    return Text(" " * half + "│" + "█" * cells + " " * (half - cells), style=_UP)


def explanation_page(explanation: Explanation) -> Report:
    """The page of one response."""
    report = Report(f"Score {explanation.score:+.4f}", subtitle="contributions add up to the score exactly")
    if explanation.truncated:
        report.text("The prompt was longer than the judge takes; its beginning was left out.")
    report.figure(bars(explanation.terms, "contribution to the score"))
    rows = [
        [t.objective, f"{t.reward:.4f}", f"{t.weight:.4f}", f"{t.coefficient:+.4f}", f"{t.contribution:+.4f}"]
        for t in by_size(explanation.terms)
    ]
    report.table(
        ["objective", "reward", "weight", "coefficient", "contribution"],
        [*rows, ["sum", "", "", "", f"{explanation.score:+.4f}"]],
        caption="Weight: the gate's. Coefficient: what the reward is multiplied by after decorrelation.",
    )
    return report


def comparison_page(comparison: Comparison) -> Report:
    """The page of two responses."""
    report = Report(
        f"Difference {comparison.difference:+.4f}",
        subtitle=f"first {comparison.first.score:+.4f}, second {comparison.second.score:+.4f}",
    )
    report.figure(bars(comparison.deltas, "difference of contributions, first minus second"))
    first, second = comparison.first.rewards, comparison.second.rewards
    rows = [
        [d.objective, f"{first[d.objective]:.4f}", f"{second[d.objective]:.4f}", f"{d.contribution:+.4f}"]
        for d in by_size(comparison.deltas)
    ]
    report.table(
        ["objective", "reward, first", "reward, second", "difference"],
        [*rows, ["sum", "", "", f"{comparison.difference:+.4f}"]],
    )
    return report


def bars(terms: Sequence[Any], title: str) -> Any:
    """Horizontal Plotly bars of terms or deltas, the largest on top."""
    plotly = plotly_module()
    ordered = by_size(terms)[::-1]
    figure = plotly.Figure(
        layout={
            "template": "plotly_white",
            "margin": {"l": 160, "r": 20, "t": 20, "b": 50},
            "height": 120 + 28 * len(ordered),
        }
    )
    figure.add_bar(
        y=[term.objective for term in ordered],
        x=[term.contribution for term in ordered],
        orientation="h",
        marker_color=[_UP if term.contribution >= 0 else _DOWN for term in ordered],
    )
    figure.update_xaxes(title=title, zeroline=True)
    return figure


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("objective", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")  # the one column that Rich may narrow
    return table


def _largest(terms: Sequence[Any]) -> float:
    return max((abs(term.contribution) for term in terms), default=0.0)
