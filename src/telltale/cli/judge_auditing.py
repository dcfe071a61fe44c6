"""``telltale judge audit`` and ``telltale judge evaluate``: what a fitted judge's score follows, and public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Device, Dtype, Json, Seed, Threads, emit, set_threads
from telltale.configuration import check_choice
from telltale.errors import ConfigError

JudgePath = Annotated[Path, typer.Argument(help="A judge's folder, of telltale's or the official layout.")]
BatchSize = Annotated[int, typer.Option(help="Conversations that go through the model together.")]


def register(group: typer.Typer) -> None:
    """Add the commands."""
    group.command("audit")(audit)
    group.command("evaluate")(evaluate)


def audit(
    judge: JudgePath,
    responses: Annotated[
        Path | None, typer.Option(help="JSON lines of responses, several to a prompt; ratings are ignored.")
    ] = None,
    preferences: Annotated[Path | None, typer.Option(help="JSON lines: prompt, chosen, rejected.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Does the final score follow length, markdown, refusals or the order of a pair? Within prompts, with intervals.

    Example: `telltale judge audit runs/judge --preferences preferences.jsonl --html audit.html`
    """
    if responses is None and preferences is None:
        raise ConfigError("there is nothing to audit on; expected --responses, --preferences or both.")
    set_threads(threads)
    from telltale.align.judge.auditing import audit as examine
    from telltale.align.judge.judge import Judge
    from telltale.align.judge.records import read_conversations, read_preferences

    opened = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    pairs, same = ([], 0) if preferences is None else read_preferences(preferences)
    found = examine(
        opened,
        [] if responses is None else read_conversations(responses),
        preferences=pairs,
        dropped_pairs=same,
        tokens=lambda text: len(opened.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        seed=seed,
    )
    if html is not None:
        found.to_html(html)
    _tell(found, json=json)


def evaluate(
    judge: JudgePath,
    suite: Annotated[str, typer.Option(help="rewardbench, rewardbench2, rm-bench or llmbar.")],
    data: Annotated[Path, typer.Option(help="A local file or folder in the benchmark's own format.")],
    weights: Annotated[
        str, typer.Option(help="RewardBench's subset weights: current, or paper (before September 2024).")
    ] = "current",
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """A public benchmark from local files, beside what preferring the longer response scores.

    Example: `telltale judge evaluate runs/judge --suite llmbar --data llmbar/`
    """
    set_threads(threads)
    from telltale.align.judge.evaluation import SUITES, WEIGHTS
    from telltale.align.judge.evaluation import evaluate as run
    from telltale.align.judge.judge import Judge

    # Before a large judge is loaded.
    check_choice("suite", suite, SUITES)
    check_choice("weights", weights, WEIGHTS)
    opened = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    _tell(run(opened, suite, data, weights=weights), json=json)


def _tell(found: Any, *, json: bool) -> None:
    if json:
        emit(found.to_dict())
        return
    from rich.console import Console

    Console().print(found)
