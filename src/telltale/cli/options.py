"""Options that several commands share, and how their values are read.

Commands that need several processes: the ``torchrun`` line to type, or torchrun itself started with ``--launch``.

Options that the specguard commands share: a pair of models, and how its steps are made.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli import INTERRUPTED
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


LAUNCH = "--launch"


def under_torchrun() -> bool:
    """Whether this process is one rank of a job."""
    return "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun has started this rank again after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_first_rank() -> bool:
    """Whether this process speaks for the job; true outside of one."""
    return os.environ.get("RANK", "0") == "0"


def torchrun_arguments(arguments: Iterable[str], workers: int) -> list[str]:
    """What follows ``torchrun`` to run this telltale command on ``workers`` processes of one machine."""
    own = [argument for argument in arguments if argument != LAUNCH]
    return ["--standalone", "--nproc-per-node", str(workers), "-m", "telltale", *own]


def require_ranks(context: typer.Context, workers: int, *, launch: bool) -> None:
    """Return in a rank of a job. Elsewhere start torchrun and end with its outcome if ``launch``, else refuse with the line.

    Raises :class:`~telltale.errors.ConfigError` with the command to type.
    """
    if under_torchrun():
        return
    given = context.find_root().obj
    arguments = torchrun_arguments(given if isinstance(given, list) else sys.argv[1:], workers)
    if not launch:
        raise ConfigError(
            f"this needs {workers} processes; type: {shlex.join(['torchrun', *arguments])} (or add {LAUNCH}; on several "
            f"machines see docs/pipedream.md)."
        )
    raise typer.Exit(run_torchrun(arguments))


def run_torchrun(arguments: list[str]) -> int:
    """Run ``torchrun`` in this process to its end: 0, 130 after Ctrl-C, 2 if a rank refused or failed (it has said why), else 1."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own default, without its warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The ranks say in a sentence what went wrong; torchrun's own report would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (INTERRUPTED, 2) if code in codes), 1)
    except SignalException:
        return INTERRUPTED
    return 0


Target = Annotated[Path, typer.Option(help="The checkpoint that verifies and redoes steps.")]
Draft = Annotated[Path | None, typer.Option(help="The checkpoint that drafts; it has the target's tokenizer.")]
ExitLayer = Annotated[int | None, typer.Option(help="Instead of --draft: the target's first layers draft.")]
Candidates = Annotated[int | None, typer.Option(help="Candidates of a step. Default: 16, or 1 at temperature 0.")]
Fallback = Annotated[str | None, typer.Option(help="How the target redoes a step: k-sample, plain or spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="FIELD=VALUE of StepVerifiedConfig, such as max_step_tokens=64; repeatable."),
]
