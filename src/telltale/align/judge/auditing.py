"""Does the final score follow something that it should not: length, Markdown, refusals, the order of a pair?

Decorrelating each objective does not decorrelate the gated score, predicted verbosity is not length, and a pooled zero can hide any
correlation within a prompt. So the audit compares the score itself with what can be counted in the text, within prompts, with
intervals, and reports a judge that only looks at length next to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from telltale.align.judge.data import Conversation, Pair
from telltale.align.judge.decorrelation import group_sums, pooled_estimates, within_estimate
from telltale.align.judge.feature_store import prompt_id
from telltale.config import check_integer, check_range
from telltale.errors import DataError
from telltale.models.conversations import Messages
from telltale.runs.files import strict_json
from telltale.runs.html_report import Report, plotly_module
from telltale.signals.statistics import CountedEstimate, Estimate, proportion

REFUSALS = re.compile(
    r"^\W*(i('m| am) sorry|sorry,|i (can('|no)t|cannot|can not|won't|will not|am not able|am unable|'m unable)|as an ai|"
    r"i apologi[sz]e|unfortunately, i)",
    re.IGNORECASE,
)
MARKDOWN = re.compile(r"^\s*(#{1,6} |[-*+] |\d+\. |> |```|\|)|\*\*[^*]+\*\*|`[^`]+`", re.MULTILINE)
POSITION_PAIRS = 64
"""Pairs that are scored again in the other order."""
NOTABLE = 0.2
"""A correlation within prompts whose interval lies beyond this is reported as a finding."""
_POOLED_RESAMPLES = 200
"""Most resamples of a pooled correlation: each ranks all rows anew."""
PROPERTIES: dict[str, Callable[[str], float]] = {
    "length": lambda text: float(len(text.split())),
    "markdown": lambda text: float(len(MARKDOWN.findall(text))),
    "refusal": lambda text: float(bool(REFUSALS.match(text))),
}
"""What is counted in a response: words, markdown marks, whether it opens with a refusal."""


def audit(
    judge: Scorer,
    responses: Sequence[Conversation] = (),
    *,
    preferences: Sequence[Pair] = (),
    dropped_pairs: int = 0,
    tokens: Callable[[str], int] | None = None,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> Audit:
    """Audit ``judge`` on ``responses`` (several to a prompt) and ``preferences``; responses of pairs count as well.

    ``dropped_pairs`` were left out of ``preferences`` before. ``tokens`` counts a response's tokens, its length (None: words).
    Intervals are bootstraps over prompts, of accuracies Wilson's.

    Raises :class:`~telltale.errors.DataError` for nothing to audit on.
    """
    check_range("level", level, above=0.0, below=1.0)
    check_integer("resamples", resamples, low=1)
    conversations = [row.messages for row in responses]
    for pair in preferences:
        conversations += [
            [*pair.prompt, {"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)
        ]
    if not conversations:
        raise DataError("there is nothing to audit on; expected responses or preferences.")
    scores = torch.tensor(judge.score(conversations), dtype=torch.float64)
    texts = [conversation[-1]["content"] for conversation in conversations]
    groups = torch.tensor([prompt_id(c[:-1]) for c in conversations])
    count = PROPERTIES["length"] if tokens is None else lambda text: float(tokens(text))
    counted = {name: torch.tensor([measure(text) for text in texts]) for name, measure in PROPERTIES.items()}
    counted["length"] = torch.tensor([count(text) for text in texts])
    rows = tuple(
        _property(name, scores, values, groups, level=level, resamples=resamples, seed=seed)
        for name, values in counted.items()
    )
    first = len(responses)
    pairs = position = None
    if preferences:
        pairs = _pair_accuracies(scores[first:], counted["length"][first:], level)
        position = _position(judge, preferences, scores[first:])
    prompts = len(groups.unique())
    return Audit(rows, pairs, position, len(texts), prompts, level, _findings(rows, pairs, position), dropped_pairs)


@dataclass(frozen=True)
class Audit:
    """What was found. ``position`` is the largest difference of a score between the two orders of a pair (of the first
    ``POSITION_PAIRS``): 0 for a judge that sees one response at a time."""

    properties: tuple[PropertyRow, ...]
    pairs: PairRows | None
    position: float | None
    responses: int
    prompts: int
    level: float
    findings: tuple[str, ...]
    dropped_pairs: int = 0
    """Pairs that were left out because both responses are the same text."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not defined is null."""
        found: dict[str, Any] = strict_json(self)
        return found

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page. Needs Plotly (extra ``report``)."""
        return _page(self).save(path)

    def __rich__(self) -> RenderableType:
        table = Table(title=f"The score against the text: {self.responses} responses to {self.prompts} prompts")
        for name in ("property", "within prompts", "pooled", "prompts"):
            table.add_column(name, justify="left" if name == "property" else "right")
        for row in self.properties:
            table.add_row(row.name, _interval(row.within), _interval(row.pooled), str(row.varies))
        parts: list[RenderableType] = [table]
        if self.pairs is not None:
            accuracies = Table(title="Preferences")
            for name in ("scorer", "accuracy", "n"):
                accuracies.add_column(name, justify="left" if name == "scorer" else "right")
            for label, found in _pair_rows(self.pairs):
                accuracies.add_row(label, *_accuracy(found, "{} [{}, {}]"), str(found.count))
            parts.append(accuracies)
        if self.dropped_pairs:
            parts.append(f"{self.dropped_pairs} pairs of the same text were left out")
        if self.position is not None:
            parts.append(f"position: a score changes by at most {self.position:.2g} when a pair is turned around")
        return Group(*parts, *(f"[yellow]{finding}[/]" for finding in self.findings))


@dataclass(frozen=True)
class PropertyRow:
    """The score against one countable property of the response."""

    name: str
    within: Estimate
    """Spearman's rho among responses to one prompt, pooled over prompts."""
    pooled: Estimate
    varies: int
    """Prompts whose responses differ in it."""


@dataclass(frozen=True)
class PairRows:
    """Accuracy on preferences, and what length has to do with it. Ties count one half."""

    judge: CountedEstimate
    length_only: CountedEstimate
    """Preferring the longer response."""
    chosen_shorter: CountedEstimate
    """The judge's accuracy where the chosen response is the shorter one."""
    chosen_longer: CountedEstimate


class Scorer(Protocol):
    """What the audit needs of a judge: a score for each conversation."""

    def score(self, messages: list[Messages]) -> list[float]: ...


def _property(
    name: str, scores: Tensor, values: Tensor, groups: Tensor, *, level: float, resamples: int, seed: int
) -> PropertyRow:
    within = within_estimate(scores, values, groups, resamples=resamples, level=level, seed=seed)
    [pooled] = pooled_estimates(
        [scores], values, groups, resamples=min(resamples, _POOLED_RESAMPLES), level=level, seed=seed
    )
    varies = int((group_sums(scores, values, groups, method="spearman")[:, 2] > 0).sum())
    return PropertyRow(name, within, pooled, varies)


def _pair_accuracies(scores: Tensor, lengths: Tensor, level: float) -> PairRows:
    margins, longer = scores[0::2] - scores[1::2], lengths[0::2] - lengths[1::2]
    credit, by_length = _credits(margins), _credits(longer)
    shorter = (longer < 0).tolist()
    return PairRows(
        proportion(credit, level=level),
        proportion(by_length, level=level),
        proportion([one for one, is_shorter in zip(credit, shorter, strict=True) if is_shorter], level=level),
        proportion([one for one, far in zip(credit, (longer > 0).tolist(), strict=True) if far], level=level),
    )


def _credits(margins: Tensor) -> list[float]:
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).tolist()


def _position(judge: Scorer, preferences: Sequence[Pair], scores: Tensor) -> float:
    """The largest change of a score when each pair is scored on its own, the rejected response first."""
    turned = []
    for pair in preferences[:POSITION_PAIRS]:
        both = [[*pair.prompt, {"role": "assistant", "content": text}] for text in (pair.rejected, pair.chosen)]
        rejected, chosen = judge.score(both)
        turned += [chosen, rejected]
    scores = scores[: len(turned)]
    moved = (torch.tensor(turned, dtype=torch.float64) - scores).abs()
    # Batches of other shapes round differently; what is left of the score's own size is no order effect.
    rounding = 1e-5 * scores.abs().clamp_min(1.0)
    return float(torch.where(moved <= rounding, torch.zeros_like(moved), moved).max())


def _findings(rows: Sequence[PropertyRow], pairs: PairRows | None, position: float | None) -> tuple[str, ...]:
    found = []
    for row in rows:
        if row.within.low > NOTABLE or row.within.high < -NOTABLE:
            found.append(
                f"Among responses to one prompt the score follows {row.name} ({row.within.value:+.2f} "
                f"[{row.within.low:+.2f}, {row.within.high:+.2f}])."
            )
    if pairs is not None and pairs.judge.value <= pairs.length_only.value:
        found.append(
            f"Preferring the longer response does as well ({pairs.length_only.value:.3f}) as the judge ({pairs.judge.value:.3f}): "
            f"these labels, or the judge, are about length."
        )
    if pairs is not None and pairs.chosen_shorter.count and pairs.chosen_shorter.high < 0.5:
        found.append(
            f"Where the better response is the shorter one the judge is below chance ({pairs.chosen_shorter.value:.3f})."
        )
    if position:
        found.append(f"Scores depend on the order of a pair (by up to {position:.2g}).")
    return tuple(found)


def _pair_rows(pairs: PairRows) -> list[tuple[str, CountedEstimate]]:
    return [
        ("judge", pairs.judge),
        ("length alone", pairs.length_only),
        ("judge, chosen is shorter", pairs.chosen_shorter),
        ("judge, chosen is longer", pairs.chosen_longer),
    ]


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _accuracy(found: CountedEstimate, *forms: str) -> list[str]:
    """The estimate and the ends of its interval in ``forms``; a dash of no pairs."""
    if math.isnan(found.value):
        return ["-"] * len(forms)
    return [form.format(f"{found.value:.3f}", f"{found.low:.3f}", f"{found.high:.3f}") for form in forms]


def _page(found: Audit) -> Report:
    report = Report(
        "Audit of a judge",
        subtitle=f"{found.responses} responses to {found.prompts} prompts, {found.level:.0%} intervals",
    )
    for finding in found.findings or ("Nothing notable was found.",):
        report.text(finding)
    report.heading("The score against the text, within prompts")
    known = [row for row in found.properties if math.isfinite(row.within.value)]
    if known:
        report.figure(
            _followed(known),
            caption="0 means that among responses to one prompt the score does not follow the property.",
        )
    else:
        report.text("No prompt has responses that differ in any of these properties, or in their score.")
    rows = [(row.name, _interval(row.within), _interval(row.pooled), row.varies) for row in found.properties]
    report.table(("property", "within prompts", "pooled", "prompts that differ in it"), rows)
    if found.pairs is not None:
        report.heading("Preferences")
        report.table(
            ("scorer", "accuracy", "interval", "n"),
            [(label, *_accuracy(s, "{0}", "{1} - {2}"), s.count) for label, s in _pair_rows(found.pairs)],
        )
    return report


def _followed(known: Sequence[PropertyRow]) -> Any:
    """Bars of the correlations within prompts."""
    plotly = plotly_module()
    figure = plotly.Figure(
        plotly.Bar(
            x=[row.name for row in known],
            y=[row.within.value for row in known],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row.within.high - row.within.value for row in known],
                "arrayminus": [row.within.value - row.within.low for row in known],
            },
            marker_color="#0b6e99",
            width=0.3,
        )
    )
    figure.update_layout(yaxis_title="Spearman's rho", yaxis_range=[-1, 1], template="plotly_white", height=340)
    return figure
