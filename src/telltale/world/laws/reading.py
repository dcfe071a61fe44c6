"""Laws from a YAML file: a list under ``laws``, each with a ``kind`` and the arguments of the function of that name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from telltale.config import read_yaml, unknown_key
from telltale.errors import ConfigError, TelltaleError
from telltale.world.laws import contracts, library
from telltale.world.laws.law import Law, checked_laws
from telltale.world.laws.units import conserved_expression, contact_expression

KINDS: dict[str, Callable[..., Law]] = {
    "unit_circle": library.unit_circle,
    "limits": library.limits,
    "positivity": library.positivity,
    "kinematics": library.kinematics,
    "angle_kinematics": library.angle_kinematics,
    "fixed": library.fixed,
    "total": library.total,
    "conservation": conserved_expression,
    "contact": contact_expression,
    "schema": contracts.schema,
    "stage_graph": contracts.stage_graph,
    "conserved_sum": contracts.conserved_sum,
}

_COLUMN_ARGUMENTS = ("column", "cosine", "sine", "position", "velocity", "field")
_OF_EXPRESSIONS = ("conservation", "contact")
_FORMS = {"columns": list, "weights": dict, "edges": dict, "ranges": list, "units": dict, "expression": str}


def read_laws(path: str | Path, columns: Sequence[str] = ()) -> tuple[Law, ...]:
    """The laws of a YAML file. Columns may be given by number, or by a name of ``columns``.

    Example: ``laws: [{kind: limits, column: speed, low: -8, high: 8, name: speed limit}]``

    Raises :class:`~telltale.errors.ConfigError` for a kind, argument or column that does not exist.
    """
    document = read_yaml(path)
    entries = document.get("laws")
    if not isinstance(entries, list):
        raise ConfigError(f"{path} has no list under 'laws'; expected laws: [{{kind: limits, ...}}, ...].")
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(f"{path} lists {entry!r} under 'laws'; expected a mapping such as {{kind: limits, ...}}.")
    return checked_laws(law_of(dict(entry), columns) for entry in entries)


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
    for key, form in _FORMS.items():
        if key in entry and not isinstance(entry[key], form):
            raise ConfigError(
                f"{key}={entry[key]!r} of law {kind} is no {form.__name__}; see the examples of the docs."
            )
    if kind in _OF_EXPRESSIONS:
        entry.setdefault("columns", list(columns))
    elif "columns" in entry:
        entry["columns"] = [_number_of(column, columns) for column in entry["columns"]]
    if "weights" in entry:
        entry["weights"] = {_number_of(column, columns): weight for column, weight in entry["weights"].items()}
    try:
        return function(**entry)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TelltaleError):
            raise
        raise ConfigError(f"law {kind} cannot be made: {error}.") from error


def _number_of(column: Any, columns: Sequence[str]) -> int:
    if isinstance(column, int) and not isinstance(column, bool):
        if column < 0 or (columns and column >= len(columns)):
            raise ConfigError(f"column {column} is not there; expected 0 to {len(columns) - 1}, or a name.")
        return column
    if column not in columns:
        raise ConfigError(
            f"column {column!r} is unknown; expected a number or one of {', '.join(columns) or '(none named)'}."
        )
    return list(columns).index(column)
