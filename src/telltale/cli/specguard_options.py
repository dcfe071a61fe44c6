"""Options that the specguard commands share: a pair of models, and how its steps are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[Path, typer.Option(help="The checkpoint that verifies and redoes steps.")]
Draft = Annotated[Path | None, typer.Option(help="The checkpoint that drafts; it has the target's tokenizer.")]
ExitLayer = Annotated[int | None, typer.Option(help="Instead of --draft: the target's first layers draft.")]
Candidates = Annotated[int | None, typer.Option(help="Candidates of a step. Default: 16, or 1 at temperature 0.")]
Fallback = Annotated[str | None, typer.Option(help="How the target redoes a step: k-sample, plain or spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="FIELD=VALUE of StepVerifiedConfig, such as max_step_tokens=64; repeatable."),
]
