"""Scientific worlds: ordinary differential equations integrated by SciPy (LSODA), measured with noise.

The engine is ``scipy.integrate.odeint`` at tolerance 1e-10; the oracle is a batched Runge-Kutta scheme in PyTorch, so the
two share the right-hand side's formula and nothing of the integration. Actions hold for one step of ``dt``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from scipy.integrate import odeint
from torch import Tensor

from telltale.config import check_choice, check_range
from telltale.world.laws import library
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World

SUBSTEPS = 2


class EquationWorld(World):
    """Base: d state / dt = slope(state, control) with one control in [0, 1]. ``noise``: relative standard deviation of a
    measurement; the engine's state has none. A reset draws the initial state from ``start_low`` .. ``start_high``.
    """

    regime = "scientific"
    start_low: tuple[float, ...]
    start_high: tuple[float, ...]
    dt: float = 0.1

    def __init__(self, *, noise: float = 0.0, dt: float | None = None) -> None:
        check_range("noise", noise, low=0.0, below=1.0)
        if dt is not None:
            check_range("dt", dt, low=1e-4, high=10.0)
            self.dt = dt
        self.noise = noise
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float64)
        self._state = np.array(self.start_low)

    def slope(self, state: Any, control: Any, stack: Callable[[list[Any]], Any]) -> Any:
        """The right-hand side, on the last axis of ``state``; ``stack`` joins components."""
        raise NotImplementedError

    def price(self, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """The reward of one step."""
        raise NotImplementedError

    def reset(self, seed: int, *, state: Any | None = None) -> Any:
        """Draw an initial state, or start from ``state``."""
        self._rng = np.random.default_rng(seed)
        self._steps = 0
        drawn = self._rng.uniform(self.start_low, self.start_high)
        self._state = drawn if state is None else np.array(state, dtype=float)
        return self._measured()

    def step(self, action: Any) -> Outcome:
        """Integrate over ``dt``. The receipt has LSODA's message and the number of its steps."""
        control = float(self.checked_action(action)[0])
        before = self._state
        path, info = odeint(
            lambda y, t: self.slope(y, control, np.array),
            before,
            (0.0, self.dt),
            rtol=1e-10,
            atol=1e-10,
            full_output=True,
        )
        self._state = path[-1]
        self._steps += 1
        first, second = (torch.as_tensor(side, dtype=torch.float32).unsqueeze(0) for side in (before, self._state))
        reward = float(self.price(first, torch.tensor([[control]]), second)[0])
        receipt = {"integrator": info["message"], "integrator_steps": int(info["nst"][-1])}
        return Outcome(self._measured(), reward, False, self._steps >= self.max_steps, receipt)

    def _measured(self) -> Any:
        if self.noise == 0:
            return self._state.copy()
        return self._state * (1 + self.noise * self._rng.standard_normal(len(self._state)))

    def spawn(self) -> World:
        """The same equations with a state of their own."""
        return type(self)(noise=self.noise, dt=self.dt)

    def oracle(self) -> Any:
        """Runge-Kutta of order 4 with two sub-steps."""
        return EquationDynamics(self)

    def versions(self) -> dict[str, str]:
        """SciPy and NumPy."""
        return {name: importlib.metadata.version(name) for name in ("scipy", "numpy")}

    def settings(self) -> dict[str, Any]:
        """noise and dt."""
        return {"noise": self.noise, "dt": self.dt}

    def _stays(self, episode: Episode, column: int, middle: float, width: float) -> bool:
        last = [abs(float(o[column]) - middle) <= width for o in episode.observations[-50:]]
        return len(last) == 50 and sum(last) >= 45


class EquationDynamics:
    """The equations of a world in PyTorch, batched."""

    stochastic = False

    def __init__(self, world: EquationWorld) -> None:
        self.world = world

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step of ``dt`` for rows (..., D)."""
        h = self.world.dt / SUBSTEPS
        control = action[..., 0].clamp(0.0, 1.0)
        state = belief
        for _ in range(SUBSTEPS):
            k1 = self._slope(state, control)
            k2 = self._slope(state + h / 2 * k1, control)
            k3 = self._slope(state + h / 2 * k2, control)
            k4 = self._slope(state + h * k3, control)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return Transition(state)

    def _slope(self, state: Tensor, control: Tensor) -> Tensor:
        return self.world.slope(state, control, lambda parts: torch.stack(parts, -1))


class LotkaVolterra(EquationWorld):
    """Prey x and predators y with a harvest u of prey: x' = x - .4 x y - u x, y' = -.8 y + .2 x y.

    Task: bring both to rest at (4, 2.5), where nothing is harvested. Success: x within .4 and y within .25 of it in 90% of
    the last 50 steps. ``harvested`` says what the control takes: ``prey``, or ``both`` (x' = x - .4 x y - .5 u x,
    y' = -.8 y + .2 x y - .5 u y), another mechanism with the same point of rest.
    """

    id = "scientific/lotka_volterra"
    columns = ("prey", "predators")
    max_steps = 150
    horizon = 25
    start_low, start_high = (3.0, 1.0), (7.0, 4.0)

    def __init__(self, *, noise: float = 0.0, dt: float | None = None, harvested: str = "prey") -> None:
        super().__init__(noise=noise, dt=dt)
        check_choice("harvested", harvested, ("prey", "both"))
        self.harvested = harvested
        self.reward = self.price
        self.laws = (library.positivity((0, 1), name="populations are not negative"),)

    def spawn(self) -> World:
        """The same equations with a state of their own."""
        return LotkaVolterra(noise=self.noise, dt=self.dt, harvested=self.harvested)

    def settings(self) -> dict[str, Any]:
        """noise, dt, and what is harvested where that is not the prey."""
        changed = {} if self.harvested == "prey" else {"harvested": self.harvested}
        return {**super().settings(), **changed}

    def slope(self, state: Any, control: Any, stack: Callable[[list[Any]], Any]) -> Any:
        """(x', y')."""
        prey, predators = state[..., 0], state[..., 1]
        if self.harvested == "both":
            caught = 0.5 * control
            growth = prey - 0.4 * prey * predators - caught * prey
            return stack([growth, -0.8 * predators + 0.2 * prey * predators - caught * predators])
        return stack([prey - 0.4 * prey * predators - control * prey, -0.8 * predators + 0.2 * prey * predators])

    def price(self, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """Minus the distance from rest, relative in both species, squared."""
        return -((after[..., 0] / 4.0 - 1) ** 2) - (after[..., 1] / 2.5 - 1) ** 2

    def success(self, episode: Episode) -> bool:
        """At rest at the end."""
        return self._stays(episode, 0, 4.0, 0.4) and self._stays(episode, 1, 2.5, 0.25)


def lotka_volterra_invariant(state: Tensor) -> Tensor:
    """V = .2 x - .8 ln x + .4 y - ln y, which does not change without harvest."""
    prey, predators = state[..., 0], state[..., 1]
    return 0.2 * prey - 0.8 * torch.log(prey) + 0.4 * predators - torch.log(predators)


class Epidemic(EquationWorld):
    """Shares susceptible s, infected i, recovered r; distancing u: s' = -b s i, i' = b s i - .2 i, b = .5 (1 - .8 u).

    Success: at most 12% infected at any time, with a mean distancing of at most .35.
    """

    id = "scientific/sir"
    columns = ("susceptible", "infected", "recovered")
    max_steps = 120
    horizon = 25
    dt = 0.5
    start_low, start_high = (0.96, 0.005, 0.0), (0.96, 0.02, 0.0)

    def __init__(self, *, noise: float = 0.0, dt: float | None = None) -> None:
        super().__init__(noise=noise, dt=dt)
        self.reward = self.price
        self.laws = (
            library.positivity((0, 1, 2), tolerance=1e-3, name="shares are not negative"),
            library.total((0, 1, 2), 1.0, tolerance=0.01 + 3 * noise, name="shares sum to one"),
        )

    def reset(self, seed: int, *, state: Any | None = None) -> Any:
        """The rest of the population is recovered."""
        super().reset(seed, state=state)
        if state is None:
            self._state[2] = 1.0 - self._state[0] - self._state[1]
        return self._measured()

    def slope(self, state: Any, control: Any, stack: Callable[[list[Any]], Any]) -> Any:
        """(s', i', r')."""
        susceptible, infected = state[..., 0], state[..., 1]
        new = 0.5 * (1 - 0.8 * control) * susceptible * infected
        return stack([-new, new - 0.2 * infected, 0.2 * infected])

    def price(self, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """Distancing costs its strength; above 11% infected every further per cent costs 1."""
        return -0.2 * action[..., 0] - 100.0 * (after[..., 1] - 0.11).clamp(min=0)

    def success(self, episode: Episode) -> bool:
        """Peak and effort within their limits, over the whole episode."""
        peak = max(float(o[1]) for o in episode.observations)
        effort = float(np.mean([float(np.asarray(a).reshape(-1)[0]) for a in episode.actions]))
        return len(episode) >= self.max_steps and peak <= 0.12 and effort <= 0.35


class Enzyme(EquationWorld):
    """Mass action: enzyme E and substrate S bind to a complex C that makes product P; u feeds substrate.

    E' = -k1 E S + (k2 + k3) C, S' = u - k1 E S + k2 C, C' = k1 E S - (k2 + k3) C, P' = k3 C with k = 2, .5, 1. E + C does
    not change; S + C + P grows by what is fed. Success: the complex within .05 of .7 in 90% of the last 50 steps.
    """

    id = "scientific/enzyme"
    columns = ("enzyme", "substrate", "complex", "product")
    max_steps = 100
    horizon = 20
    start_low, start_high = (1.0, 0.0, 0.0, 0.0), (1.0, 2.0, 0.0, 0.0)

    def __init__(self, *, noise: float = 0.0, dt: float | None = None) -> None:
        super().__init__(noise=noise, dt=dt)
        self.reward = self.price
        slack = 0.01 + 6 * noise
        self.laws = (
            library.positivity((0, 1, 2, 3), tolerance=1e-3 + noise, name="amounts are not negative"),
            library.conservation(
                lambda z: z[..., 0] + z[..., 2], tolerance=slack, projection=_rebalanced, name="enzyme"
            ),
            library.conservation(
                lambda z: z[..., 1] + z[..., 2] + z[..., 3],
                source=lambda before, action, after: self.dt * action[..., 0].clamp(0.0, 1.0),
                tolerance=slack * 3,
                name="substrate mass",
            ),
        )

    def slope(self, state: Any, control: Any, stack: Callable[[list[Any]], Any]) -> Any:
        """(E', S', C', P')."""
        free, substrate, bound = state[..., 0], state[..., 1], state[..., 2]
        binding = 2.0 * free * substrate
        return stack([-binding + 1.5 * bound, control - binding + 0.5 * bound, binding - 1.5 * bound, 1.0 * bound])

    def price(self, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """Minus the squared distance of the complex from .7."""
        return -10.0 * (after[..., 2] - 0.7) ** 2

    def success(self, episode: Episode) -> bool:
        """The complex stayed in its band."""
        return self._stays(episode, 2, 0.7, 0.05)


def _rebalanced(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """The free enzyme is what is not bound."""
    out = after.clone()
    out[..., 0] = before[..., 0] + before[..., 2] - after[..., 2]
    return out
