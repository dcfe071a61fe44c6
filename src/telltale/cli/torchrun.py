"""Commands that need several processes: the ``torchrun`` line to type, or torchrun itself started with ``--launch``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterable

import typer

from telltale.cli import INTERRUPTED
from telltale.errors import ConfigError

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
