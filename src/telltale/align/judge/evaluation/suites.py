"""Running a judge over a benchmark and putting its figures beside those of response length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from telltale.align.judge.evaluation.formats import Item, read_items
from telltale.align.judge.evaluation.scores import (
    WEIGHTS,
    Share,
    best_of_credit,
    pair_credit,
    rewardbench_sections,
    share,
    style_credits,
    ties_score,
)
from telltale.align.judge.plain_json import plain
from telltale.align.judge.templating import Messages
from telltale.configuration import check_choice
from telltale.errors import DataError

SUITES = ("rewardbench", "rewardbench2", "rm-bench", "llmbar")


class Scorer(Protocol):
    """What is asked of a judge: a score for each conversation."""

    def score(self, messages: list[Messages]) -> list[float]: ...


@dataclass(frozen=True)
class Figures:
    """One scorer's result on one suite."""

    score: float
    """The suite's own total."""
    sections: dict[str, float]
    subsets: dict[str, Share]


@dataclass(frozen=True)
class Evaluation:
    """A judge's figures and, beside them, those of preferring the longer response."""

    suite: str
    weights: str | None
    """RewardBench's table of subset weights."""
    items: int
    judge: Figures
    length_only: Figures

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not defined is null."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __rich__(self) -> Table:
        words = f", {self.weights} weights" if self.weights else ""
        table = Table(title=f"{self.suite}: {self.judge.score:.3f} over {self.items} prompts{words}")
        for name in ("subset", "n", "judge", "95% interval", "length only"):
            table.add_column(name, justify="left" if name == "subset" else "right")
        for name, found in self.judge.subsets.items():
            alone = self.length_only.subsets[name]
            table.add_row(
                name,
                str(found.count),
                f"{found.value:.3f}",
                f"{found.low:.3f} - {found.high:.3f}",
                f"{alone.value:.3f}",
            )
        for name, value in self.judge.sections.items():
            table.add_row(f"[bold]{name}[/]", "", f"[bold]{value:.3f}[/]", "", f"{self.length_only.sections[name]:.3f}")
        table.add_row("[bold]total[/]", "", f"[bold]{self.judge.score:.3f}[/]", "", f"{self.length_only.score:.3f}")
        return table


def evaluate(judge: Scorer, suite: str, path: str | Path, *, weights: str = "current") -> Evaluation:
    """``judge`` on the local files of ``suite`` at ``path``.

    ``weights`` "paper" takes RewardBench's table as it was when ArmoRM was published, with two subsets interchanged.
    Raises :class:`~telltale.errors.DataError` naming file and row for files in another format.
    """
    check_choice("suite", suite, SUITES)
    check_choice("weights", weights, WEIGHTS)
    items = read_items(suite, path)
    conversations = [
        [*item.prompt, {"role": "assistant", "content": response}]
        for item in items
        for response in (*item.chosen, *item.rejected)
    ]
    scores = list(judge.score(conversations))
    lengths = [float(len(conversation[-1]["content"])) for conversation in conversations]
    figures = _FIGURES[suite]
    return Evaluation(
        suite,
        weights if suite == "rewardbench" else None,
        len(items),
        figures(items, _by_item(items, scores), weights),
        figures(items, _by_item(items, lengths), weights),
    )


Scored = list[tuple[list[float], list[float]]]


def _by_item(items: Sequence[Item], scores: Sequence[float]) -> Scored:
    found, place = [], 0
    for item in items:
        middle, end = place + len(item.chosen), place + len(item.chosen) + len(item.rejected)
        found.append((list(scores[place:middle]), list(scores[middle:end])))
        place = end
    return found


def _rewardbench(items: Sequence[Item], scored: Scored, weights: str) -> Figures:
    credits: dict[str, list[float]] = defaultdict(list)
    for item, (right, wrong) in zip(items, scored, strict=True):
        credits[item.subset].append(pair_credit(right[0], wrong[0]))
    subsets = {name: share(found) for name, found in sorted(credits.items())}
    total, sections = rewardbench_sections({name: found.value for name, found in subsets.items()}, weights=weights)
    if not sections:
        raise DataError(f"none of the subsets {', '.join(subsets)} is RewardBench's; expected its own names.")
    return Figures(total, sections, subsets)


def _rewardbench2(items: Sequence[Item], scored: Scored, weights: str) -> Figures:
    credits: dict[str, list[float]] = defaultdict(list)
    ties = {}
    for item, (right, wrong) in zip(items, scored, strict=True):
        if item.subset.lower() == "ties":
            ties[item.id] = (right, wrong)
        else:
            credits[item.subset].append(best_of_credit(right, wrong))
    subsets = {name: share(found) for name, found in sorted(credits.items())}
    sections = {name: found.value for name, found in subsets.items()}
    if ties:
        sections["Ties"] = ties_score(ties).score
    return Figures(sum(sections.values()) / len(sections), sections, subsets)


def _rm_bench(items: Sequence[Item], scored: Scored, weights: str) -> Figures:
    credits: dict[str, list[float]] = defaultdict(list)
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, (right, wrong) in zip(items, scored, strict=True):
        domain = "safety" if item.subset.startswith("safety") else item.subset
        for difficulty, found in style_credits(right, wrong).items():
            credits[item.subset] += found
            cells[domain][difficulty] += found
    means = {domain: {name: _mean(found) for name, found in cell.items()} for domain, cell in cells.items()}
    # Its authors' rule: every domain counts alike, in the difficulties as in the total.
    difficulties = {name: _mean([found[name] for found in means.values()]) for name in ("easy", "normal", "hard")}
    domains = {domain: _mean(list(found.values())) for domain, found in means.items()}
    # The nine pairs of a prompt are not independent, so the interval counts prompts.
    subsets = {name: _clustered(found) for name, found in sorted(credits.items())}
    return Figures(_mean(list(domains.values())), difficulties | domains, subsets)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _llmbar(items: Sequence[Item], scored: Scored, weights: str) -> Figures:
    credits: dict[str, list[float]] = defaultdict(list)
    for item, (right, wrong) in zip(items, scored, strict=True):
        credits[item.subset].append(pair_credit(right[0], wrong[0]))
    subsets = {name: share(found) for name, found in sorted(credits.items())}
    everything = [credit for found in credits.values() for credit in found]
    adversarial = [credit for name, found in credits.items() if "adversarial" in name for credit in found]
    sections = {"adversarial": sum(adversarial) / len(adversarial)} if adversarial else {}
    return Figures(sum(everything) / len(everything), sections, subsets)


def _clustered(credits: list[float]) -> Share:
    return share([sum(credits[place : place + 9]) / 9 for place in range(0, len(credits), 9)])


_FIGURES: dict[str, Callable[[Sequence[Item], Scored, str], Figures]] = {
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
    "rm-bench": _rm_bench,
    "llmbar": _llmbar,
}
