"""A chapter of the tour: a policy that never leaves its one route, and the same policy with teachers (at most two minutes).

The policy of the task :mod:`telltale.tasks.routes` knows several ways to multiply and takes one, which does not fit the hard
problems. Plain GRPO reinforces what the policy samples, so it has nothing to learn from there; with a teacher's trace in every
group it has.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from telltale.align.oger.comparison import Setting, compare
from telltale.runs.files import write_atomically
from telltale.runs.html_report import Report, plotly_module
from telltale.runs.progress import ProgressBar
from telltale.tasks.routes import BaseRecipe

SETTING = Setting(
    steps=60,
    learning_rate=3e-4,
    evaluate_at=(10, 20, 30, 40, 50, 60),
    evaluated_problems=60,
    samples=8,
    base=BaseRecipe(steps=1400, batch_size=64),
)
"""Most of the time goes into the base policy: with less, it has no routes that teachers could wake."""
QUICK = Setting(
    steps=2,
    prompts=2,
    group=4,
    evaluate_at=(1, 2),
    evaluated_problems=4,
    samples=2,
    base=BaseRecipe(steps=2, batch_size=8),
)
ARMS = {"grpo": "GRPO alone", "default": "with teachers (OGER)"}


def run_chapter(
    folder: str | Path, *, quick: bool = False, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Run the chapter in ``folder`` and return its summary, which is also written there as ``summary.json``.

    ``quick`` is a rehearsal whose figures mean nothing. What is there already is not run again.
    """
    folder, console = Path(folder), console or Console(stderr=True)
    began = time.perf_counter()
    records = []
    for arm, title in ARMS.items():
        with _Bars(console) as bars:
            records += compare(
                folder, arms=[arm], seeds=[seed], setting=QUICK if quick else SETTING, progress=bars.tell
            )
        last = records[-1]["evaluations"][-1]
        console.print(
            f"{title}: {last['hard']:.0%} of hard and {last['easy']:.0%} of easy answers right, {last['taken']}"
        )
    summary = {
        "seconds": time.perf_counter() - began,
        "arms": {record["arm"]: record["evaluations"] for record in records},
        "seed": seed,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def add_to_report(report: Report, summary: dict[str, Any]) -> None:
    """Heading, two sentences and the one plot of a summary of :func:`run_chapter`."""
    report.heading("A policy that never leaves its one route")
    ends = {arm: evaluations[-1] for arm, evaluations in summary["arms"].items()}
    report.text(
        f"The base policy multiplies by repeated addition, which does not fit hard problems. After {ends['grpo']['step']} steps "
        f"GRPO alone solves {ends['grpo']['hard']:.0%} of hard answers; with a teacher's trace in every group (OGER) it is "
        f"{ends['default']['hard']:.0%} (of easy answers {ends['grpo']['easy']:.0%} and {ends['default']['easy']:.0%}). Teachers "
        f"are three programs, and the verifier checks every step of a solution."
    )
    graphs = plotly_module()
    figure = graphs.Figure()
    for arm, evaluations in summary["arms"].items():
        figure.add_trace(
            graphs.Scatter(
                x=[evaluation["step"] for evaluation in evaluations],
                y=[evaluation["hard"] for evaluation in evaluations],
                mode="lines+markers",
                name=ARMS[arm],
            )
        )
    figure.update_layout(
        template="simple_white",
        xaxis_title="policy update",
        yaxis_title="hard answers right",
        yaxis_range=[0, 1],
        height=380,
    )
    report.figure(figure, caption="Held-out problems, sampled at temperature 1; one seed.")


class _Bars:
    """One progress bar per named piece of work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: ProgressBar | None = None
        self._name: str | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def tell(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``name``."""
        if name != self._name:
            self._close()
            self._name, self._bar = name, ProgressBar(name, total, console=self.console)
            self._bar.__enter__()
        assert self._bar is not None
        self._bar.update(done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
