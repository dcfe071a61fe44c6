"""``fit``: a model of a named kind from transitions. Kinds are a table, to which users add their own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from telltale.config import unknown_key
from telltale.errors import ConfigError, DataError
from telltale.world.plugs import called
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

KINDS: dict[str, str] = {
    "ensemble": "telltale.world.models.numeric:fit_numeric_ensemble",
    "mlp": "telltale.world.models.numeric:fit_mlp",
    "motion": "telltale.world.models.motion:fit_motion",
    "sindy": "telltale.world.models.sindy:fit_sindy",
    "program": "telltale.world.models.program:fit_program",
    "tabular": "telltale.world.models.tabular:fit_tabular",
    "opponent": "telltale.world.models.opponent:fit_opponent",
}
"""``module:function`` of each kind; the function is called with (transitions, world=..., seed=..., **options)."""

_USERS: dict[str, Callable[..., Any]] = {}


def register_model(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: makes ``function(transitions, *, world, seed, **options) -> model`` a kind of :func:`fit`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in KINDS or name in _USERS:
            raise ConfigError(f"a model kind is named {name!r} already; choose another name.")
        _USERS[name] = function
        return function

    return enter


def kinds() -> list[str]:
    """Names of the kinds of model that can be fitted."""
    return [*KINDS, *_USERS]


def check_kind(kind: str) -> None:
    """Raise :class:`~telltale.errors.ConfigError` with the kinds that there are, unless ``kind`` is one."""
    if kind not in KINDS and kind not in _USERS:
        raise ConfigError(f"model kind {kind!r} is unknown; expected one of {', '.join(kinds())}.")


def fit(kind: str, transitions: Transitions, *, world: World | None = None, seed: int = 0, **options: Any) -> Any:
    """A model of ``kind`` fitted on ``transitions``; ``world`` tells what is known (reward, ending, fields).

    Raises :class:`~telltale.errors.ConfigError` for an unknown kind or option, and
    :class:`~telltale.errors.DataError` for data that the kind cannot use.
    """
    check_kind(kind)
    if len(transitions) == 0:
        raise DataError("there are no transitions to fit on; collect some.")
    if kind in _USERS:
        return called(f"the fit of {kind}", _USERS[kind], transitions, world=world, seed=seed, **options)
    module, _, name = KINDS[kind].partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        known = [name for name in parameters if name not in ("transitions", "world", "seed")]
        for key in options:
            if key not in known:
                raise ConfigError(unknown_key(key, known).replace("config field", f"option of {kind}"))
    return function(transitions, world=world, seed=seed, **options)
