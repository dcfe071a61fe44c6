"""Laws of numeric states: limits, unit circles, kinematics, energy, conservation, contact, positivity, symmetry.

Every function returns a :class:`~telltale.world.laws.law.Law` over batched beliefs (..., D). Columns are given by index.
Severities are in the unit of the quantity checked, so that a tolerance can be read off a plot of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError
from telltale.world.laws.law import Law

Quantity = Callable[[Tensor], Tensor]


def unit_circle(cosine: int, sine: int, *, tolerance: float = 0.05, name: str = "unit circle") -> Law:
    """(cos, sin) has length 1. Severity: distance of the length from 1. Projection: divide by the length."""

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (torch.hypot(after[..., cosine], after[..., sine]) - 1).abs()

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        length = torch.hypot(after[..., cosine], after[..., sine])
        # a pair that is on the circle to rounding stays as it is, so that projecting twice is projecting once
        on_circle = (length - 1).abs() < 4 * torch.finfo(after.dtype).eps
        if bool(on_circle.all()):
            return after
        scale = torch.where(on_circle, torch.ones_like(length), 1 / length.clamp(min=1e-30))
        out = after.clone()
        out[..., cosine] = torch.where(length > 0, after[..., cosine] * scale, torch.ones_like(length))
        out[..., sine] *= scale
        return out

    return Law(name, severity, tolerance, projection=projection)


def limits(
    column: int, low: float, high: float, *, tolerance: float = 0.0, name: str | None = None, hard: bool = True
) -> Law:
    """low <= state[column] <= high. Severity: how far outside. Projection: clamp."""
    if not low <= high:
        raise ConfigError(f"limits low={low}, high={high} are empty; expected low <= high.")

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        value = after[..., column]
        return torch.maximum(low - value, value - high).clamp(min=0)

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        out = after.clone()
        out[..., column].clamp_(low, high)
        return out

    return Law(name or f"limits of column {column}", severity, tolerance, hard, projection)


def positivity(columns: Sequence[int], *, tolerance: float = 0.0, name: str = "positivity") -> Law:
    """The columns are not negative. Severity: the largest shortfall. Projection: clamp at 0."""
    chosen = list(columns)

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (-after[..., chosen]).clamp(min=0).amax(-1)

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return _replaced(after, chosen, after[..., chosen].clamp(min=0))

    return Law(name, severity, tolerance, projection=projection)


def kinematics(
    position: int, velocity: int, step: float, *, tolerance: float, explicit: bool = True, name: str | None = None
) -> Law:
    """position' = position + step * velocity (explicit Euler), or * velocity' (semi-implicit). Projection: that position."""

    def due(before: Tensor, after: Tensor) -> Tensor:
        return before[..., position] + step * (before if explicit else after)[..., velocity]

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (after[..., position] - due(before, after)).abs()

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return _replaced(after, [position], due(before, after).unsqueeze(-1))

    return Law(name or f"kinematics of column {position}", severity, tolerance, projection=projection)


def angle_kinematics(
    cosine: int, sine: int, velocity: int, step: float, *, tolerance: float, name: str = "angle kinematics"
) -> Law:
    """The angle turns by step * velocity' (semi-implicit Euler), modulo 2 pi. Severity in radians. Projection: that angle."""

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        cross = after[..., sine] * before[..., cosine] - after[..., cosine] * before[..., sine]
        dot = after[..., cosine] * before[..., cosine] + after[..., sine] * before[..., sine]
        off = (torch.atan2(cross, dot) - step * after[..., velocity]).abs()
        return torch.minimum(off, (2 * math.pi - off).abs())

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        angle = torch.atan2(before[..., sine], before[..., cosine]) + step * after[..., velocity]
        return _replaced(after, [cosine, sine], torch.stack([torch.cos(angle), torch.sin(angle)], -1))

    return Law(name, severity, tolerance, projection=projection)


def energy(
    quantity: Quantity,
    *,
    work: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    tolerance: float,
    relative: bool = True,
    reference: float | None = None,
    name: str = "energy",
) -> Law:
    """Energy changes by the work done: E(after) - E(before) = work(before, action, after), 0 where ``work`` is None.

    ``relative`` divides by |E(before)|, or by ``reference``, which also makes the check one against that energy and not
    the previous step's: a slow drift adds up to a violation then.
    """

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        start = torch.full_like(quantity(after), reference) if reference is not None else quantity(before)
        change = quantity(after) - start
        if work is not None:
            change = change - work(before, action, after)
        return change.abs() / start.abs().clamp(min=1e-12) if relative else change.abs()

    return Law(name, severity, tolerance)


def conservation(
    quantity: Quantity,
    *,
    tolerance: float,
    source: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    projection: Callable[[Any, Any, Any], Any] | None = None,
    name: str = "conservation",
) -> Law:
    """quantity(after) = quantity(before) + source(before, action, after). Severity: the difference."""

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        change = quantity(after) - quantity(before)
        return (change if source is None else change - source(before, action, after)).abs()

    return Law(name, severity, tolerance, projection=projection)


def fixed(columns: Sequence[int], *, tolerance: float, name: str = "fixed columns") -> Law:
    """The columns do not change within an episode (a target's position). Projection: copy them from before."""
    chosen = list(columns)

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (after[..., chosen] - before[..., chosen]).abs().amax(-1)

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return _replaced(after, chosen, before[..., chosen])

    return Law(name, severity, tolerance, projection=projection)


def total(columns: Sequence[int], value: float, *, tolerance: float, name: str = "total") -> Law:
    """The columns sum to ``value`` (shares of a population). Projection: the nearest such point."""
    chosen = list(columns)

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (after[..., chosen].sum(-1) - value).abs()

    def projection(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        parts = after[..., chosen]
        missing = value - parts.sum(-1, keepdim=True)
        # what rounding leaves is no violation, so that projecting twice is projecting once
        rounding = 8 * torch.finfo(after.dtype).eps * (parts.abs().sum(-1, keepdim=True) + abs(value))
        return _replaced(after, chosen, torch.where(missing.abs() <= rounding, parts, parts + missing / len(chosen)))

    return Law(name, severity, tolerance, projection=projection)


def contact(gap: Quantity, *, tolerance: float, name: str = "contact") -> Law:
    """Bodies do not penetrate: gap(after) >= 0. Severity: the depth of penetration, in the gap's unit."""

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (-gap(after)).clamp(min=0)

    return Law(name, severity, tolerance)


def symmetry(
    model_step: Callable[[Tensor, Tensor], Tensor],
    mirror: Callable[[Tensor], Tensor],
    mirror_action: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    name: str = "symmetry",
) -> Law:
    """Dynamics commute with a symmetry: step(mirror(z), mirror(a)) = mirror(step(z, a)). Severity: the largest difference."""

    def severity(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return (model_step(mirror(before), mirror_action(action)) - mirror(after)).abs().amax(-1)

    return Law(name, severity, tolerance)


def _replaced(state: Tensor, columns: Sequence[int], values: Tensor) -> Tensor:
    out = state.clone()
    for index, column in enumerate(columns):
        out[..., column] = values[..., index]
    return out
