"""What a score is made of: one term per objective, and how the terms of two responses differ; as table, page and JSON.

ArmoRM, arXiv 2406.12845, section 2: score = sum_i g_i (r T)_i = sum_j c_j r_j with effective coefficients c = g T^t. The weights g
hide what decorrelation took away (the nuisance's own coefficient is negative), so an explanation lists the coefficients. The score
is the exactly rounded sum of the listed contributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from telltale.errors import DataError, NumericalError
from telltale.runs.html_report import Report, plotly_module

_OTHER_PROMPTS = "The two answer different prompts, so the gate weighs them differently."
_UP, _DOWN = "#0b6e99", "#b3541e"


@dataclass(frozen=True)
class Term:
    """One objective's part of a score.

    ``reward`` is the raw prediction r_j on the scale it was fitted on, ``weight`` the gate's scale * g_j, ``coefficient`` the
    effective c_j = sum_i g_i T_ji, ``contribution`` the product c_j r_j. The product of two float32 values is exact in a
    Python float, so the row multiplies out exactly, too.
    """

    objective: str
    reward: float
    weight: float
    coefficient: float
    contribution: float


@dataclass(frozen=True)
class Explanation:
    """A score and its terms, in the judge's order of objectives.

    ``truncated``: prompt and response were longer than the judge takes, and the prompt lost its beginning;
    ``response_truncated``: the response alone was, and lost its end, so that a part of it was not judged. ``unfamiliar``: its
    features lie beyond those of 99 in 100 responses like the ones that the judge was fitted on; None where the judge does not
    know these.
    """

    terms: tuple[Term, ...]
    truncated: bool = False
    response_truncated: bool = False
    unfamiliar: bool | None = None

    @classmethod
    def of(
        cls,
        objectives: Sequence[str],
        rewards: Sequence[float],
        weights: Sequence[float],
        coefficients: Sequence[float],
        *,
        truncated: bool = False,
        response_truncated: bool = False,
        unfamiliar: bool | None = None,
    ) -> Explanation:
        """Build it from what the head gives for one response; all sequences have one value per objective.

        Raises :class:`~telltale.errors.NumericalError` naming the first objective whose contribution is not finite.
        """
        terms = tuple(
            Term(name, reward, weight, coefficient, coefficient * reward)
            for name, reward, weight, coefficient in zip(objectives, rewards, weights, coefficients, strict=True)
        )
        for term in terms:
            if not math.isfinite(term.contribution):
                raise NumericalError(
                    f"objective {term.objective!r} has reward {term.reward} and coefficient {term.coefficient}; expected "
                    f"finite numbers from the judge."
                )
        return cls(terms, truncated, response_truncated, unfamiliar)

    @cached_property
    def score(self) -> float:
        """The exactly rounded sum of the contributions, ``math.fsum``."""
        return math.fsum(term.contribution for term in self.terms)

    @cached_property
    def rewards(self) -> dict[str, float]:
        """Raw reward of every objective."""
        return {term.objective: term.reward for term in self.terms}

    @cached_property
    def weights(self) -> dict[str, float]:
        """The gate's weight of every objective."""
        return {term.objective: term.weight for term in self.terms}

    @cached_property
    def coefficients(self) -> dict[str, float]:
        """Effective coefficient of every objective."""
        return {term.objective: term.coefficient for term in self.terms}

    @cached_property
    def contributions(self) -> dict[str, float]:
        """What every objective adds to the score."""
        return {term.objective: term.contribution for term in self.terms}

    def minus(self, other: Explanation) -> Comparison:
        """This response against ``other``: contributions relative to a reference, free of each objective's own offset."""
        return Comparison(self, other)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: score, truncated, response_truncated, unfamiliar, terms."""
        return {
            "score": self.score,
            "truncated": self.truncated,
            "response_truncated": self.response_truncated,
            "unfamiliar": self.unfamiliar,
            "terms": [dict(vars(term)) for term in self.terms],
        }

    def to_markdown(self) -> str:
        """A Markdown table, largest contribution first."""
        lines = ["| objective | reward | weight | coefficient | contribution |", "|---|---|---|---|---|"]
        lines += [
            f"| {term.objective} | {term.reward:.4f} | {term.weight:.4f} | {term.coefficient:+.4f} | {term.contribution:+.4f} |"
            for term in by_size(self.terms)
        ]
        return "\n".join([*lines, f"| **score** | | | | **{self.score:+.4f}** |"])

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with bars and the table. Needs Plotly (extra ``report``)."""
        return explanation_page(self).save(path)

    def __rich__(self) -> RenderableType:
        return explanation_table(self)


@dataclass(frozen=True)
class Delta:
    """One objective's part of the difference of two scores: ``contribution`` is the first response's minus the second's.

    ``reward`` is the difference of raw rewards, ``coefficients`` the two effective coefficients; they are the same when
    both answer the same prompt.
    """

    objective: str
    reward: float
    coefficients: tuple[float, float]
    contribution: float


@dataclass(frozen=True)
class Comparison:
    """Two explained responses. ``difference == math.fsum(delta.contribution for delta in deltas)``, bit for bit.

    Raises :class:`~telltale.errors.DataError` if they come from judges of different objectives.
    """

    first: Explanation
    second: Explanation
    probability: float | None = None
    """That the first is the better one; None where the judge is not calibrated."""
    answered: bool | None = None
    """False is "don't know": the difference is too small for the judge's promise. None where it makes none."""

    def __post_init__(self) -> None:
        names = [[term.objective for term in side.terms] for side in (self.first, self.second)]
        if names[0] != names[1]:
            raise DataError(
                f"the two explanations have objectives {', '.join(names[0])} and {', '.join(names[1])}; expected the same "
                f"judge for both."
            )

    @cached_property
    def deltas(self) -> tuple[Delta, ...]:
        """One per objective, in the judge's order."""
        return tuple(
            Delta(a.objective, a.reward - b.reward, (a.coefficient, b.coefficient), a.contribution - b.contribution)
            for a, b in zip(self.first.terms, self.second.terms, strict=True)
        )

    @cached_property
    def difference(self) -> float:
        """First score minus second: the sum of the deltas."""
        return math.fsum(delta.contribution for delta in self.deltas)

    @property
    def verdict(self) -> str:
        """The probability in a sentence, with "don't know" where the judge gives no answer; empty where it is not calibrated."""
        if self.probability is None:
            return ""
        unsure = " (don't know: too close for what the judge promises)" if self.answered is False else ""
        return f"the first is better with probability {self.probability:.2f}{unsure}"

    @property
    def same_gate(self) -> bool:
        """Whether both were weighed alike, as two responses to one prompt are."""
        return all(math.isclose(*delta.coefficients, rel_tol=1e-4, abs_tol=1e-6) for delta in self.deltas)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: difference, deltas, and the two explanations."""
        return {
            "difference": self.difference,
            "probability": self.probability,
            "answered": self.answered,
            "deltas": [
                {"objective": d.objective, "reward": d.reward, "contribution": d.contribution} for d in self.deltas
            ],
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
        }

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with bars and the table. Needs Plotly (extra ``report``)."""
        return comparison_page(self).save(path)

    def __rich__(self) -> RenderableType:
        return comparison_table(self)


def explanation_table(explanation: Explanation) -> Table:
    """Objectives with reward, weight, coefficient, contribution and its bar; the largest contribution first."""
    title = f"score {explanation.score:+.4f}" + _cut(explanation)
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
        table.caption = _OTHER_PROMPTS
    return table


def _cut(explanation: Explanation) -> str:
    found = ["response truncated"] if explanation.response_truncated else []
    if explanation.truncated and not found:
        found = ["prompt truncated"]
    if explanation.unfamiliar:
        found.append("unlike what the judge was fitted on")
    return f"  ({', '.join(found)})" if found else ""


def explanation_page(explanation: Explanation) -> Report:
    """The page of one response."""
    report = Report(f"Score {explanation.score:+.4f}", subtitle="contributions add up to the score exactly")
    if explanation.response_truncated:
        report.text("The response was longer than the judge takes: its end was left out, and is not judged.")
    elif explanation.truncated:
        report.text("The prompt was longer than the judge takes; its beginning was left out.")
    if explanation.unfamiliar:
        report.text("The response is unlike those that the judge was fitted on; its score is an extrapolation.")
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
    if comparison.verdict:
        report.text(comparison.verdict[0].upper() + comparison.verdict[1:] + ".")
    for name, side in (("first", comparison.first), ("second", comparison.second)):
        if _cut(side):
            report.text(f"The {name} response: {_cut(side).strip(' ()')}.")
    if not comparison.same_gate:
        report.text(_OTHER_PROMPTS)
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


def bars(terms: Sequence[Any], title: str) -> Any:
    """Horizontal Plotly bars of terms or deltas, the largest on top."""
    plotly = plotly_module()
    ordered = by_size(terms)[::-1]
    figure = plotly.Figure(
        layout={
            "template": "plotly_white",
            "margin": {"l": 160, "r": 20, "t": 40, "b": 50},
            "height": 140 + 28 * len(ordered),
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


def by_size(terms: Sequence[Any]) -> list[Any]:
    """Terms or deltas, the one that moves the score most first."""
    return sorted(terms, key=lambda term: -abs(term.contribution))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("objective", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")  # the one column that Rich may narrow
    return table


def _largest(terms: Sequence[Any]) -> float:
    return max((abs(term.contribution) for term in terms), default=0.0)
