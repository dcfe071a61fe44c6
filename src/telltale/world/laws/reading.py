"""Laws from a YAML file: a list under ``laws``, each with a ``kind`` and the arguments of the function of that name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from telltale.config import read_yaml, unknown_key
from telltale.errors import ConfigError
from telltale.world.laws import contracts, library
from telltale.world.laws.law import Law, check_unique
from telltale.world.laws.units import conserved_expression

KINDS: dict[str, Callable[..., Law]] = {
    "unit_circle": library.unit_circle,
    "limits": library.limits,
    "positivity": library.positivity,
    "kinematics": library.kinematics,
    "angle_kinematics": library.angle_kinematics,
    "fixed": library.fixed,
    "total": library.total,
    "conservation": conserved_expression,
    "schema": contracts.schema,
    "stage_graph": contracts.stage_graph,
    "conserved_sum": contracts.conserved_sum,
}

_COLUMN_ARGUMENTS = ("column", "cosine", "sine", "position", "velocity")


def read_laws(path: str | Path, columns: Sequence[str] = ()) -> tuple[Law, ...]:
    """The laws of a YAML file. Columns may be given by number, or by a name of ``columns``.

    Example: ``laws: [{kind: limits, column: speed, low: -8, high: 8, name: speed limit}]``

    Raises :class:`~telltale.errors.ConfigError` for a kind, argument or column that does not exist.
    """
    document = read_yaml(path)
    entries = document.get("laws")
    if not isinstance(entries, list):
        raise ConfigError(f"{path} has no list under 'laws'; expected laws: [{{kind: limits, ...}}, ...].")
    laws = tuple(law_of(dict(entry), columns) for entry in entries)
    check_unique(laws)
    return laws


def law_of(entry: dict[str, Any], columns: Sequence[str] = ()) -> Law:
    """One law from its mapping."""
    kind = entry.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(f"law kind {kind!r} is unknown; expected one of {', '.join(KINDS)}.")
    function = KINDS[kind]
    names = list(inspect.signature(function).parameters)
    for key in entry:
        if key not in names:
            raise ConfigError(unknown_key(key, names).replace("config field", f"argument of law {kind}"))
    for key in _COLUMN_ARGUMENTS:
        if key in entry:
            entry[key] = _number_of(entry[key], columns)
    if kind == "conservation":
        entry.setdefault("columns", list(columns))
    elif "columns" in entry:
        entry["columns"] = [_number_of(column, columns) for column in entry["columns"]]
    try:
        return function(**entry)
    except TypeError as error:
        raise ConfigError(f"law {kind} cannot be made: {error}.") from error


def _number_of(column: Any, columns: Sequence[str]) -> int:
    if isinstance(column, int):
        return column
    if column not in columns:
        raise ConfigError(
            f"column {column!r} is unknown; expected a number or one of {', '.join(columns) or '(none named)'}."
        )
    return list(columns).index(column)
