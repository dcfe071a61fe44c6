"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.errors import ConfigError, DataError

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else there.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's choice.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cpu.")]
Backend = Annotated[str, typer.Option(help="auto, native, fused or module.")]


def emit(document: dict[str, Any]) -> None:
    """Print the machine output of a command."""
    typer.echo(json.dumps(document, indent=1))


def set_threads(threads: int | None) -> None:
    """Apply ``--threads``. Raises :class:`~telltale.errors.ConfigError` for less than one."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads={threads} is not allowed; expected an integer >= 1.")
    import torch

    torch.set_num_threads(threads)


def automatic(name: str, value: str) -> int | str:
    """An option that is ``auto`` or an integer."""
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not understood; expected auto or an integer.") from None


def read_text(path: Path) -> str:
    """The text of a file. Raises :class:`~telltale.errors.DataError` if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
