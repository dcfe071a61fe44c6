"""``telltale bench``: run one of the benchmark scripts of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from telltale.errors import ConfigError

_SUPPORT = {"measurement", "peers", "checkpoints", "specguard_pairs", "specguard_figures"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def bench(
    context: typer.Context,
    claim: Annotated[str, typer.Argument(help="Name of a script in benchmarks/ (see telltale list).")],
) -> None:
    """Measure one claim against its peers and write its JSON; further options go to the script.

    Example: `telltale bench layerskip_speed`
    """
    known = claims()
    if claim not in known:
        raise ConfigError(
            f"benchmark {claim!r} is unknown; expected one of {', '.join(known) or 'none: run it from a source checkout'}."
        )
    script = _folder() / f"{claim}.py"
    code = subprocess.run([sys.executable, str(script), *context.args], cwd=script.parents[1], check=False).returncode
    if code:
        raise ConfigError(f"benchmark {claim!r} ended with exit status {code}.")


def claims() -> list[str]:
    """Names of the benchmark scripts; empty outside a source checkout."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem not in _SUPPORT)


def _folder() -> Path:
    return Path(__file__).resolve().parents[3] / "benchmarks"
