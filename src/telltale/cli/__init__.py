"""The ``telltale`` command: one verb per thing a person wants. Errors are one sentence and exit code 2, never a trace."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from typer.main import get_command

from telltale.cli.options import INTERRUPTED
from telltale.errors import TelltaleError

app = typer.Typer(
    name="telltale",
    help="Read a model's own signals and act on them: in training, alignment and decoding, over a thin uplink, and in "
    "worlds that a model predicts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; failures and warnings are one sentence on standard error."""
    if not app.registered_commands:
        _register()
    with warnings.catch_warnings():
        warnings.showwarning = _tell_warning
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        code = get_command(app).main(args=list(arguments), prog_name="telltale", standalone_mode=False, obj=arguments)
    except TelltaleError as error:
        _say(str(error))
        return 2
    except Exception as error:
        return _other(error)
    if code == INTERRUPTED:
        resuming = "A training run goes on with --resume; a tour, a world command or a specguard command with the same command."
        _say("interrupted." if arguments[:1] == ["serve"] else f"interrupted. {resuming}")
    return code if isinstance(code, int) else 0


def _register() -> None:
    from telltale.cli import (
        edge,
        generate,
        judge,
        oger,
        overview,
        pipeline,
        retrofit,
        serve,
        sharpness,
        specguard,
        train,
        world,
    )

    for module in (
        overview,
        train,
        pipeline,
        generate,
        retrofit,
        specguard,
        sharpness,
        judge,
        oger,
        edge,
        world,
        serve,
    ):
        module.register(app)


def _other(error: Exception) -> int:
    """Typer's own errors know their message and exit code; anything else is reported as unexpected."""
    if hasattr(error, "exit_code") and hasattr(error, "show"):
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        return 130
    if os.environ.get("TELLTALE_DEBUG"):
        raise error
    _say(f"unexpected {type(error).__name__}: {error}. Set TELLTALE_DEBUG=1 to see where.")
    return 1


def _tell_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _say(message: str) -> None:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    typer.echo(f"error: {message}" if rank is None else f"error: rank {rank}: {message}", err=True)
