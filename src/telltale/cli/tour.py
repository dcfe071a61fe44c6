"""``telltale tour``: the main job on an embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telltale.cli import INTERRUPTED
from telltale.cli.options import Json, Seed, Threads, emit, set_threads


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tour")(tour)


def tour(
    run_dir: Annotated[
        Path, typer.Option(help="Where corpus, model and report go; an interrupted tour goes on there.")
    ] = Path("runs/tour"),
    text: Annotated[
        Path | None, typer.Option(help="Your own text: a file or a folder. Default: Python's standard library.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal of seconds; its figures mean nothing.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a small model with the LayerSkip recipe, decode it beside Transformers, and write a report.

    Takes at most 8 minutes on 2 cores. Example: `telltale tour --text my_project/ --run-dir runs/mine`
    """
    from telltale.tour import run_tour

    set_threads(threads)
    summary = run_tour(run_dir, text=text, quick=quick, seed=seed)
    if json:
        emit(summary)
    if not summary["finished"]:
        raise typer.Exit(INTERRUPTED)
