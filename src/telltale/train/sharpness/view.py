"""How one update step sees the Hessian: the seam between a measurement and the optimizer's own Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from telltale.signals.exponents import Exponents, gradient_descent
from telltale.signals.hessian import Operator


@dataclass(frozen=True)
class View:
    """``exponents`` maps eigenvalues of ``wrap(H)`` to ln of the moduli of the step's Jacobian."""

    name: str
    exponents: Exponents
    threshold: float
    """Eigenvalue of ``wrap(H)`` above which the step overshoots; infinite at rate 0, where nothing moves."""
    wrap: Callable[[Operator], Operator] | None = None
    """H -> the symmetric operator that the step really has, such as P^-1/2 H P^-1/2. None: H itself."""
    roots: int = 1
    """Exponents for each direction: 2 with momentum."""


def paper_view(rate: float) -> View:
    """I - rate H, whatever the optimizer is; its edge is at 2 / rate."""
    return View("gd", gradient_descent(rate), 2.0 / rate if rate > 0 else math.inf)
