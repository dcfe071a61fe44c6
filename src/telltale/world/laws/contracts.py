"""Laws of plain states: schema, stage graph, conserved sums, idempotence, zero sum, individual rationality.

A plain state is a tuple of values with named fields. Severities count what is wrong, so the tolerance is 0. A state that
lacks the fields of which a law speaks does not obey it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from telltale.config import check_range
from telltale.errors import ConfigError
from telltale.world.laws.law import Law


def _of_fields(severity: Callable[[Any, Any, Any], float]) -> Callable[[Any, Any, Any], float]:
    """``severity``, infinite for a state that lacks its fields or holds something else in them."""

    def checked(before: Any, action: Any, after: Any) -> float:
        try:
            return severity(before, action, after)
        except (IndexError, TypeError):
            return float("inf")

    return checked


def schema(ranges: Sequence[tuple[int, int]], *, name: str = "schema") -> Law:
    """One integer per field, within [low, high] of ``ranges``. Severity: fields that are not."""
    expected = []
    for pair in ranges:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(v) is int for v in pair)):
            raise ConfigError(f"ranges of a schema hold {pair!r}; expected [low, high] of integers for every field.")
        expected.append((pair[0], pair[1]))

    def severity(before: Any, action: Any, after: Any) -> float:
        if not isinstance(after, tuple) or len(after) != len(expected):
            return float(len(expected))
        return float(
            sum(
                type(value) is not int or not low <= value <= high
                for value, (low, high) in zip(after, expected, strict=True)
            )
        )

    return Law(name, severity, plain=True)


def stage_graph(field: int, edges: Mapping[int, Iterable[int]], *, name: str = "stage graph") -> Law:
    """The field stays or moves along an edge."""
    legal = {stage: frozenset(after) for stage, after in edges.items()}

    def severity(before: Any, action: Any, after: Any) -> float:
        return float(after[field] != before[field] and after[field] not in legal.get(before[field], frozenset()))

    return Law(name, _of_fields(severity), plain=True)


def conserved_sum(weights: Mapping[int, float], *, name: str = "conserved sum") -> Law:
    """sum of weight * field does not change. Severity: by how much it does."""
    terms = tuple((i, check_range(f"weight of field {i}", weight, finite=True)) for i, weight in weights.items())

    def severity(before: Any, action: Any, after: Any) -> float:
        return abs(sum(weight * (after[i] - before[i]) for i, weight in terms))

    return Law(name, _of_fields(severity), plain=True)


def idempotence(actions: Iterable[Any], step: Callable[[Any, Any], Any], *, name: str = "idempotence") -> Law:
    """Repeating one of ``actions`` changes nothing: step(step(z, a), a) = step(z, a)."""
    repeated = frozenset(actions)

    def severity(before: Any, action: Any, after: Any) -> float:
        return float(action in repeated and step(after, action) != after)

    return Law(name, severity, plain=True)


def invariant(holds: Callable[[Any], bool], *, name: str) -> Law:
    """A predicate of every state."""
    return Law(name, _of_fields(lambda before, action, after: float(not holds(after))), plain=True)


def zero_sum(returns: Callable[[Any], Sequence[float]], *, tolerance: float = 0.0, name: str = "zero sum") -> Law:
    """The players' returns in a state sum to 0."""
    return Law(name, lambda before, action, after: abs(float(sum(returns(after)))), tolerance, plain=True)


def individual_rationality(
    value: Callable[[Any, Any], float],
    outside: float = 0.0,
    *,
    name: str = "individual rationality",
    hard: bool = False,
) -> Law:
    """No action is worth less to its player than staying out: value(state, action) >= outside. Severity: the loss."""
    return Law(name, lambda before, action, after: max(0.0, outside - value(before, action)), hard=hard, plain=True)
