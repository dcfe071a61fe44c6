"""The motion of one angle: an acceleration that is linear in a few terms, integrated as the angle's kinematics say.

States are (cos, sin, velocity) in any columns. w' = w + dt * sum_k c_k term_k(z, u), limited to ``top_speed``; the angle then
turns by dt * w' (semi-implicit Euler, as Gymnasium integrates). Terms are monomials of the state and the action. The kinematics are
known and the forces are identified: from exact data two terms need two transitions.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from telltale.errors import DataError
from telltale.world.models.sindy import Equations
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World


class Motion(Equations):
    """``exponents`` (terms, 3 + A), ``coefficients`` (3, terms) of which only the velocity's row acts; ``angle``: columns of
    cosine, sine and velocity."""

    def __init__(
        self, exponents: Tensor, coefficients: Tensor, dt: float, columns: list[str], deviation: Tensor,
        angle: tuple[int, int, int], top_speed: float,
    ) -> None:  # fmt: skip
        super().__init__(exponents, coefficients, dt, columns, deviation)
        self.angle, self.top_speed = (int(angle[0]), int(angle[1]), int(angle[2])), float(top_speed)

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step of ``dt`` seconds for rows (..., 3) and (..., A)."""
        columns = [*belief.unbind(-1), *action.to(belief.dtype).unbind(-1)]
        cosine, sine, velocity = (columns[i] for i in self.angle)
        # one row acts, so that a sum over its terms is cheaper than the whole product of matrices
        push: Any = 0.0
        for value, factors in zip(self._active[self.angle[2]].tolist(), self._terms, strict=True):
            push = push + math.prod((columns[i] for i in factors), start=value)
        velocity = velocity + self.dt * push
        velocity = velocity.clamp(-self.top_speed, self.top_speed)
        turned, moved = torch.cos(self.dt * velocity), torch.sin(self.dt * velocity)
        parts = {
            self.angle[0]: cosine * turned - sine * moved, self.angle[1]: sine * turned + cosine * moved,
            self.angle[2]: velocity,
        }  # fmt: skip
        return Transition(torch.stack([parts[i] for i in range(3)], -1))

    def describe(self) -> dict[str, Any]:
        """Kind and config, as saved."""
        config = {"dt": self.dt, "columns": self.columns, "angle": list(self.angle), "top_speed": self.top_speed}
        return {"kind": "motion", "config": config}


def monomials(width: int, degree: int) -> Tensor:
    """Exponents (terms, width) of all monomials up to ``degree``, the constant first."""
    rows = [
        [combination.count(i) for i in range(width)]
        for power in range(degree + 1)
        for combination in itertools.combinations_with_replacement(range(width), power)
    ]
    return torch.tensor(rows, dtype=torch.int64)


def fit_motion(
    transitions: Transitions, *, world: World | None = None, seed: int = 0, degree: int = 1, threshold: float = 0.05
) -> Motion:
    """Identify the acceleration by least squares over monomials up to ``degree``, dropping terms below ``threshold`` (rad/s^2
    over the spread of the term) once. Deterministic: ``seed`` is not used.

    Raises :class:`~telltale.errors.DataError` unless the world says which columns are an angle (``world.angle``).
    """
    angle, dt = getattr(world, "angle", None), getattr(world, "dt", None)
    if angle is None or dt is None or transitions.plain or transitions.before.shape[1] != 3:
        raise DataError(
            "kind motion needs a world with one angle: angle=(cosine, sine, velocity) and dt; use kind ensemble."
        )
    width, controls = transitions.before.shape[1], transitions.actions.shape[1]
    exponents = monomials(width + controls, degree)
    limit = float(getattr(world, "top_speed", float("inf")))
    columns = [*(getattr(world, "columns", ()) or ("cosine", "sine", "velocity"))]
    columns += [f"u{i}" if controls > 1 else "u" for i in range(controls)]
    inside = transitions.after[:, angle[2]].abs() < limit - 1e-6
    inputs = torch.cat([transitions.before, transitions.actions], 1)[inside].double()
    terms = (inputs.unsqueeze(1) ** exponents).prod(-1)
    slope = ((transitions.after - transitions.before)[inside, angle[2]] / dt).double().unsqueeze(1)
    keep = torch.arange(len(exponents))
    for _ in range(2):
        found = torch.linalg.lstsq(terms[:, keep], slope, driver="gelsd").solution[:, 0]
        keep_now = found.abs() * terms[:, keep].pow(2).mean(0).sqrt() > threshold
        keep = keep[keep_now] if bool(keep_now.any()) else keep[:1]
    found = torch.linalg.lstsq(terms[:, keep], slope, driver="gelsd").solution[:, 0]
    coefficients = torch.zeros(3, len(exponents), dtype=torch.float64)
    coefficients[angle[2], keep] = found
    model = Motion(exponents, coefficients, float(dt), columns, torch.ones(3), angle, limit)
    residual = transitions.after - model.step(transitions.before, transitions.actions).belief
    model.deviation = residual.double().pow(2).mean(0).sqrt().clamp(min=1e-9)
    return model
