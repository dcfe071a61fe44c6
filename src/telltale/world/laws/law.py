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
from telltale.world.plugs import called

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
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"a law is named {self.name!r}; give it a name, which cards and traces print.")
        if not callable(self.severity):
            raise ConfigError(f"law {self.name!r} has no function for a severity, but {type(self.severity).__name__}.")
        check_range(f"tolerance of law {self.name}", self.tolerance, low=0.0, finite=True)

    def excess(self, before: Any, action: Any, after: Any) -> Tensor:
        """By how much the severity exceeds the tolerance, 0 where the law holds. A NaN severity counts as infinite.

        Raises :class:`~telltale.world.plugs.UserCodeError` if the severity raises, and
        :class:`~telltale.errors.ConfigError` unless it gives one number per transition.
        """
        found = called(f"law {self.name!r}", self.severity, before, action, after)
        severity = called(f"the severity of law {self.name!r}", torch.as_tensor, found)
        rows = after.shape[:-1] if isinstance(after, Tensor) and not self.plain else torch.Size()
        if severity.shape != rows:
            raise ConfigError(
                f"law {self.name!r} gave severities of shape {tuple(severity.shape)} for transitions {tuple(rows)}; expected one "
                f"number per transition."
            )
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
            put = called(f"the projection of law {law.name!r}", law.projection, before, action, after)
            if isinstance(after, Tensor) and not (isinstance(put, Tensor) and put.shape == after.shape):
                shape = tuple(put.shape) if isinstance(put, Tensor) else type(put).__name__
                raise ConfigError(
                    f"the projection of law {law.name!r} returned {shape} for states {tuple(after.shape)}; keep the shape."
                )
            after = put
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
    check_range(f"largest severity of law {law.name!r} on the engine", largest, low=0.0, finite=True)
    return replace(law, tolerance=max(law.tolerance, largest * margin))


def checked_laws(laws: Iterable[Law], *, plain: bool | None = None) -> tuple[Law, ...]:
    """``laws`` as a tuple, if each is a :class:`Law` with a name of its own, of plain states or not as ``plain`` says.

    Raises :class:`~telltale.errors.ConfigError` otherwise.
    """
    if isinstance(laws, Law):
        raise ConfigError("laws= is one law; give a list of laws.")
    found = tuple(laws)
    names = set()
    for law in found:
        if not isinstance(law, Law):
            raise ConfigError(f"a law is {type(law).__name__}; expected telltale.world.Law(name, severity).")
        if law.name in names:
            raise ConfigError(f"two laws are named {law.name!r}; give each law its own name.")
        names.add(law.name)
        if plain is not None and law.plain is not plain:
            kinds = "plain states", "rows of numbers"
            raise ConfigError(
                f"law {law.name!r} speaks of {kinds[not law.plain]}, but the world's states are {kinds[not plain]}; "
                f"{'use laws of telltale.world.laws.contracts' if plain else 'use laws of telltale.world.laws.library'}, or "
                f"set plain= of your own Law."
            )
    return found
