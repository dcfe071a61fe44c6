"""Calls into what a user plugged in: a model, a reward, a success predicate, a law, a simulator, an environment.

Whatever such code raises comes out as one sentence that names what was called, what it raised, and the line of the user's
file; errors of telltale pass as they are.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from telltale.errors import TelltaleError


class UserCodeError(TelltaleError, RuntimeError):
    """Code that the user gave raised an exception; names the code, the exception and the line."""


def called(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """``function(*arguments, **options)``. Raises :class:`UserCodeError`, from the cause, for whatever it raises.

    Rollouts lay tensors out column by column; a function that is not telltale's gets them row by row, as ``view`` expects.
    """
    if not (getattr(function, "__module__", None) or "").startswith("telltale."):
        arguments = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
    try:
        return function(*arguments, **options)
    except TelltaleError:
        raise
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "no message").strip().rstrip(".")
        raise UserCodeError(f"{what} raised {type(error).__name__}: {said}{_line(error)}.") from error


def modules_of(value: Any) -> Iterator[torch.nn.Module]:
    """The outermost modules in a user's object: itself, or those that its attributes, lists and dictionaries hold."""
    for found in parts_of(value):
        if isinstance(found, torch.nn.Module):
            yield found


_CLOSED = (str, bytes, int, float, torch.Tensor, type, ModuleType)
"""What holds no part of a model, or far too much else."""


def parts_of(value: Any, depth: int = 4, seen: set[int] | None = None) -> Iterator[Any]:
    """``value`` and what it holds in attributes, lists, tuples, dictionaries and closures; modules are not entered."""
    seen = set() if seen is None else seen
    if id(value) in seen or depth < 0 or isinstance(value, _CLOSED):
        return
    seen.add(id(value))
    yield value
    if isinstance(value, torch.nn.Module):
        return
    if isinstance(value, dict):
        inner = list(value.values())[:64]
    elif isinstance(value, (list, tuple)):
        inner = list(value)[:64]
    else:
        inner = list(getattr(value, "__dict__", {}).values())
        inner.append(getattr(value, "__self__", None))  # the object behind a bound method
        inner += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
        if isinstance(value, partial):
            inner += [value.func, *value.args, *value.keywords.values()]
    for part in inner:
        if part is not None:
            yield from parts_of(part, depth - 1, seen)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that its function has not bound yet
        return False


def _line(error: Exception) -> str:
    """The deepest line of the traceback that is neither telltale's nor an installed package's."""
    own = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(own) and "site-packages" not in frame.filename:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
