"""Sparse identification of nonlinear dynamics with control (PySINDy): equations read off trajectories.

z' = Theta(z, u) Xi with few terms. Derivatives are taken within stretches of constant control only, by central
differences of fourth order: a difference across a control jump is wrong and brings spurious terms (Brunton et al., PNAS
2016, for the method; the jump is why this file does not hand whole trajectories to PySINDy).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import DataError, MissingExtraError
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

SUBSTEPS = 2


class Equations:
    """d z / dt = coefficients @ monomials(z, u), stepped by Runge-Kutta of order 4. ``exponents`` (terms, D + A).

    ``deviation`` (D,): standard deviation of one step's residual on the data, for intervals.
    """

    stochastic = False

    def __init__(
        self, exponents: Tensor, coefficients: Tensor, dt: float, columns: list[str], deviation: Tensor
    ) -> None:
        self.exponents, self.coefficients, self.dt = exponents.to(torch.int64), coefficients, dt
        self.columns, self.deviation = list(columns), deviation
        used = coefficients.abs().sum(0) > 0
        used[0] = used[0] | ~used.any()
        self._active = coefficients[:, used]
        # each term as a product of inputs; the last input is the constant 1, which fills terms of lower degree
        one = self.exponents.shape[1]
        self._terms = [[i for i, p in enumerate(powers) for _ in range(p)] for powers in self.exponents[used].tolist()]
        degree = max(1, *(len(row) for row in self._terms))
        self._factors = torch.tensor([row + [one] * (degree - len(row)) for row in self._terms]).T.contiguous()

    def slope(self, state: Tensor, action: Tensor) -> Tensor:
        """The right-hand side for rows (..., D) and (..., A)."""
        action = action.to(state.dtype).expand(*state.shape[:-1], action.shape[-1])
        inputs = torch.cat([state, action, torch.ones_like(state[..., :1])], -1)
        terms = inputs[..., self._factors[0]]
        for factors in self._factors[1:]:
            terms = terms * inputs[..., factors]
        return terms @ self._active.to(state.dtype).T

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step of ``dt`` seconds."""
        h, state = self.dt / SUBSTEPS, belief
        for _ in range(SUBSTEPS):
            k1 = self.slope(state, action)
            k2 = self.slope(state + h / 2 * k1, action)
            k3 = self.slope(state + h / 2 * k2, action)
            k4 = self.slope(state + h * k3, action)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return Transition(state)

    def predict(self, belief: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, D) of the next state."""
        mean = self.step(belief, action).belief
        return mean, self.deviation.to(mean).expand_as(mean)

    def explain(self) -> str:
        """The equations in words."""
        names = self.columns
        lines = []
        for row, name in zip(self.coefficients.tolist(), names, strict=False):
            terms = [
                f"{value:+.4g} " + " ".join(f"{names[i]}^{p}" if p > 1 else names[i] for i, p in enumerate(powers) if p)
                for value, powers in zip(row, self.exponents.tolist(), strict=True)
                if value
            ]
            lines.append(f"{name}' = {' '.join(terms) or '0'}")
        return "\n".join(lines)

    def tensors(self) -> dict[str, Tensor]:
        """What safetensors keeps."""
        return {"exponents": self.exponents, "coefficients": self.coefficients, "deviation": self.deviation}

    def describe(self) -> dict[str, Any]:
        """Kind and config, as saved."""
        return {"kind": "sindy", "config": {"dt": self.dt, "columns": self.columns}}


def fit_sindy(
    transitions: Transitions,
    *,
    world: World | None = None,
    seed: int = 0,
    dt: float | None = None,
    degree: int = 2,
    threshold: float = 0.1,
    shortest: int = 5,
) -> Equations:
    """Identify polynomial equations up to ``degree``; terms below ``threshold`` (in units of the data) are dropped.

    ``dt`` defaults to the world's. ``shortest``: stretches of constant control with fewer states are left out.

    Raises :class:`~telltale.errors.DataError` if no stretch is long enough (collect with ``hold``), and
    :class:`~telltale.errors.MissingExtraError` without PySINDy.
    """
    try:
        import pysindy
    except ImportError as error:
        raise MissingExtraError("equations need PySINDy: pip install 'telltale[world-scientific]'") from error
    check_integer("degree", degree, low=1, high=5)
    check_range("threshold", threshold, low=0.0)
    if transitions.plain or transitions.actions.ndim != 2:
        raise DataError(
            "equations are identified from numeric states and continuous actions; use kind program for plain states."
        )
    step = dt if dt is not None else getattr(world, "dt", None)
    if step is None:
        raise DataError("the time step is not known; pass dt= in seconds.")
    stretches = _stretches(transitions, shortest)
    if not stretches:
        raise DataError(
            f"no control is held for {shortest} states; collect with hold={shortest * 3}, so that derivatives do not cross jumps."
        )
    states = [s for s, _ in stretches]
    slopes = [_derivative(s, step) for s in states]
    controls = [np.repeat(u[None], len(s), 0) for s, u in stretches]
    model = pysindy.SINDy(
        optimizer=pysindy.STLSQ(threshold=threshold, alpha=1e-6),
        feature_library=pysindy.PolynomialLibrary(degree=degree),
    )
    model.fit(states, t=step, x_dot=slopes, u=controls)
    exponents = torch.as_tensor(np.asarray(model.feature_library.powers_), dtype=torch.int64)
    columns = list(getattr(world, "columns", ()) or [f"x{i}" for i in range(states[0].shape[1])])
    columns += [f"u{i}" if controls[0].shape[1] > 1 else "u" for i in range(controls[0].shape[1])]
    found = Equations(
        exponents, torch.as_tensor(model.coefficients()), float(step), columns, torch.ones(states[0].shape[1])
    )
    residual = transitions.after - found.step(transitions.before, transitions.actions).belief
    found.deviation = residual.double().pow(2).mean(0).sqrt().clamp(min=1e-9)
    return found


def _stretches(transitions: Transitions, shortest: int) -> list[tuple[Any, Any]]:
    """(states, control) of every run of steps within one episode under one control."""
    found: list[tuple[Any, Any]] = []
    first, count = 0, len(transitions)
    for i in range(1, count + 1):
        same = (
            i < count
            and bool(transitions.episodes[i] == transitions.episodes[first])
            and bool(torch.equal(transitions.actions[i], transitions.actions[first]))
        )
        if not same:
            states = torch.cat([transitions.before[first:i], transitions.after[i - 1 : i]])
            if len(states) >= shortest:
                found.append((states.double().numpy(), transitions.actions[first].double().numpy()))
            first = i
    return found


def _derivative(states: Any, step: float) -> Any:
    """Fourth order inside, and one-sided fourth order at both ends."""
    out = np.empty_like(states)
    out[2:-2] = (states[:-4] - 8 * states[1:-3] + 8 * states[3:-1] - states[4:]) / (12 * step)
    for i in (0, 1):
        out[i] = _one_sided(states, i, step)
        out[-1 - i] = -_one_sided(states[::-1], i, step)
    return out


def _one_sided(states: Any, i: int, step: float) -> Any:
    weights = {0: (-25, 48, -36, 16, -3), 1: (-3, -10, 18, -6, 1)}[i]
    return sum(w * states[j] for j, w in enumerate(weights)) / (12 * step)
