"""A law is a function that says by how much one transition breaks it, and what to do about it in imagined trajectories.

The compatibility factor phi_c of level 2 (arXiv 2604.22748, section 4) weighs whole trajectories. Here it is a set of laws
and one of five modes: report the violations, penalise them, project the state back, reject and resample particles, or
shield actions whose first predicted step breaks a hard law. Laws are checked per particle: the mean of particles that
obey a law need not obey it (the mean of unit vectors is no unit vector).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_choice, check_range
from telltale.errors import ConfigError, NumericalError

MODES = ("report", "penalise", "project", "reject", "shield")

Severity = Callable[[Any, Any, Any], Any]


class InfeasibleLaw(NumericalError):
    """No particle or action satisfies the laws; names the laws that were broken."""


@dataclass(frozen=True)
class Law:
    """One law: ``severity(before, action, after)`` is 0 where it holds, and grows with the violation.

    Tensor laws are given batched beliefs (..., D) and return (...); laws of plain states are given one state each and
    return a number. A transition breaks the law where the severity exceeds ``tolerance``, in the severity's own unit.
    ``projection(before, action, after)`` returns the nearest state that obeys the law, and must be idempotent. A soft law
    (``hard=False``) is reported and penalised, and never decides a certificate.
    """

    name: str
    severity: Severity
    tolerance: float = 0.0
    hard: bool = True
    projection: Callable[[Any, Any, Any], Any] | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        check_range(f"tolerance of law {self.name}", self.tolerance, low=0.0)

    def excess(self, before: Any, action: Any, after: Any) -> Tensor:
        """By how much the severity exceeds the tolerance, 0 where the law holds. A NaN severity counts as infinite."""
        try:
            severity = torch.as_tensor(self.severity(before, action, after))
        except (IndexError, TypeError):
            if not self.plain:
                raise
            severity = torch.tensor(float("inf"))  # a state that lacks what the law speaks of does not obey it
        severity = severity if severity.is_floating_point() else severity.float()
        return (severity - self.tolerance).clamp(min=0).nan_to_num(nan=float("inf"), posinf=float("inf"))

    def holds(self, before: Any, action: Any, after: Any) -> Tensor:
        """Whether each transition obeys the law, boolean."""
        return self.excess(before, action, after) == 0


@dataclass(frozen=True)
class Enforcement:
    """How laws act on an imagined trajectory. ``strength`` is lambda of ``penalise``: return lost per unit of excess."""

    mode: str = "report"
    strength: float = 10.0

    def __post_init__(self) -> None:
        check_choice("law mode", self.mode, MODES)
        check_range("strength", self.strength, low=0.0)


def enforcement(mode: str | Enforcement) -> Enforcement:
    """An Enforcement from its mode's name; an Enforcement comes back as it is."""
    return mode if isinstance(mode, Enforcement) else Enforcement(mode)


def project(laws: Iterable[Law], before: Any, action: Any, after: Any) -> Any:
    """``after`` with every law's projection applied, in the order given."""
    for law in laws:
        if law.projection is not None:
            after = law.projection(before, action, after)
    return after


def violations(laws: Sequence[Law], before: Any, action: Any, after: Any) -> dict[str, Tensor]:
    """Excess severity of each law, by name."""
    return {law.name: law.excess(before, action, after) for law in laws}


def any_hard_violation(laws: Sequence[Law], before: Any, action: Any, after: Any) -> Tensor | None:
    """Where at least one hard law is broken, boolean; None if there is no hard law."""
    broken: Tensor | None = None
    for law in laws:
        if law.hard:
            now = ~law.holds(before, action, after)
            broken = now if broken is None else broken | now
    return broken


def calibrate(law: Law, transitions: Any, *, margin: float = 1.05) -> Law:
    """``law`` with the smallest tolerance that accepts every transition given, times ``margin``.

    ``transitions`` is (before, action, after) from the real engine: what the engine does is lawful by definition, and a
    checker that objects to it has the wrong tolerance. Raises :class:`~telltale.errors.ConfigError` for margin < 1.
    """
    check_range("margin", margin, low=1.0)
    before, action, after = transitions
    if law.plain:
        severities = [float(law.severity(b, a, c)) for b, a, c in zip(before, action, after, strict=True)]
        largest = max(severities, default=0.0)
    else:
        largest = float(torch.as_tensor(law.severity(before, action, after)).max())
    return replace(law, tolerance=max(law.tolerance, largest * margin))


def check_unique(laws: Sequence[Law]) -> None:
    """Raise :class:`~telltale.errors.ConfigError` if two laws have one name."""
    names = [law.name for law in laws]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two laws are named {name!r}; give each law its own name.")
