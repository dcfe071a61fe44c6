"""Dimensions: an equation whose units do not match is refused when the law is written, not when it is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from telltale.errors import ConfigError, MissingExtraError
from telltale.world.laws.expressions import evaluate, parse
from telltale.world.laws.law import Law
from telltale.world.laws.library import contact


class DimensionalityError(ConfigError):
    """The two sides of a law, or two terms of a sum, have different dimensions; names both."""


def check_dimensions(expression: str, units: dict[str, str], expected: str | None = None) -> str:
    """The units of ``expression`` when each name has the unit given, as Pint writes them.

    Raises :class:`DimensionalityError` if terms do not match, or the whole does not have the dimension of ``expected``.
    """
    try:
        import pint
    except ImportError as error:
        raise MissingExtraError("units need Pint: pip install 'telltale[world-scientific]'") from error
    registry: Any = pint.UnitRegistry()
    try:
        tree = parse(expression, units)
        quantities = {name: registry.Quantity(1.0, unit) for name, unit in units.items()}
        found = evaluate(tree, quantities)
        if expected is not None:
            registry.Quantity(found).to(expected)
    except pint.DimensionalityError as error:
        raise DimensionalityError(
            f"the units of {expression!r} do not match: {error}. Correct the expression or a unit."
        ) from error
    except pint.UndefinedUnitError as error:
        raise ConfigError(f"unit of {expression!r} is unknown: {error}. Use a unit that Pint knows.") from error
    except (pint.PintError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the units of {expression!r} cannot be checked: {error}.") from error
    return str(registry.Quantity(found).units)


def conserved_expression(
    expression: str,
    columns: Sequence[str],
    *,
    tolerance: float,
    units: dict[str, str] | None = None,
    hard: bool = True,
    name: str | None = None,
) -> Law:
    """``expression`` over named columns has one value before and after. With ``units``, its dimensions are checked now."""
    tree = parse(expression, columns)
    if units is not None:
        check_dimensions(expression, units)

    def severity(before: Any, action: Any, after: Any) -> Any:
        sides = [evaluate(tree, {name: side[..., i] for i, name in enumerate(columns)}) for side in (before, after)]
        return (sides[1] - sides[0]).abs()

    return Law(name or f"conservation of {expression}", severity, tolerance, hard)


def contact_expression(
    expression: str, columns: Sequence[str], *, tolerance: float, hard: bool = True, name: str | None = None
) -> Law:
    """Bodies do not penetrate: ``expression`` over named columns, the gap between them, is at least 0."""
    tree = parse(expression, columns)

    def gap(state: Any) -> Any:
        return evaluate(tree, {name: state[..., i] for i, name in enumerate(columns)})

    return replace(contact(gap, tolerance=tolerance, name=name or f"contact of {expression}"), hard=hard)
