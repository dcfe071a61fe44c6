"""Options that several commands share, how their values are read, and options made from the fields of a config.

:func:`config_options` gives a command one option per field of a frozen dataclass, with the field's type, default and
docstring, so that a setting is described once. :func:`require_ranks` is for commands that need several processes: it prints
the ``torchrun`` line to type, or starts torchrun with ``--launch``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import logging
import os
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.errors import ConfigError, DataError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else there.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's choice.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's own.")]
Weights = Annotated[
    str | None, typer.Option(help="int8: linear layers in 8 bits, for the native step. Default: the dtype's own.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cpu.")]
Backend = Annotated[str, typer.Option(help="auto, native, fused or module.")]


def config_options(
    config: type, *, into: str, flags: Mapping[str, str] | None = None, panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command gets an option for each field of the dataclass ``config``, and one ``config`` as ``into``.

    An option is named as its field (``flags`` renames: field -> flag), takes the field's type and default, and its help is
    the field's docstring; ``--help`` shows the options under the heading ``panel``. The command is called with
    ``into=config(...)``, checked by the dataclass itself.
    """
    help_of = field_docs(config)
    hints = typing.get_type_hints(config)
    renamed = flags or {}
    added = []
    for field in dataclasses.fields(config):
        flag = renamed.get(field.name, f"--{field.name.replace('_', '-')}")
        option = typer.Option(flag, help=help_of.get(field.name), rich_help_panel=panel)
        default = field.default if field.default is not dataclasses.MISSING else None
        added.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[hints[field.name], option],
            )
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != into]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            fields = {parameter.name: values.pop(parameter.name) for parameter in added}
            command(**values, **{into: config(**fields)})

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        arguments = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
        rest = [parameter for parameter in parameters if parameter.default is not inspect.Parameter.empty]
        shown = signature.replace(parameters=[*arguments, *rest, *added])
        run.__signature__ = shown  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown.parameters.values()}
        del run.__wrapped__
        return run

    return decorate


def field_docs(config: type) -> dict[str, str]:
    """Field -> the docstring written below it in the dataclass's source, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = getattr(below.value, "value", None)
            if isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found


def emit(document: dict[str, Any]) -> None:
    """Print the machine output of a command; numbers that are not finite are null."""
    from telltale.runs.files import strict_json

    typer.echo(json.dumps(strict_json(document), indent=1, allow_nan=False))


def tell(document: dict[str, Any], *, as_json: bool) -> None:
    """Print what a command found: a line a field, or one JSON document."""
    if as_json:
        emit(document)
        return
    for key, value in document.items():
        typer.echo(f"{key}: {value}")


def set_threads(threads: int | None) -> None:
    """Apply ``--threads``. Raises :class:`~telltale.errors.ConfigError` for less than one."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads={threads} is not allowed; expected an integer >= 1.")
    import torch

    torch.set_num_threads(threads)


def automatic(name: str, value: str) -> int | None:
    """An option that is ``auto``, which is None, or an integer."""
    if value == "auto":
        return None
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
            f"machines see docs/pipedream/howto.md)."
        )
    raise typer.Exit(run_torchrun(arguments))


def run_torchrun(arguments: list[str]) -> int:
    """Run ``torchrun`` in this process to its end: 0, 130 after Ctrl-C, 2 if a rank failed (it has printed why), else 1."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own default, without its warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The ranks print their error in a sentence; torchrun's own report would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (INTERRUPTED, 2) if code in codes), 1)
    except SignalException:
        return INTERRUPTED
    return 0
