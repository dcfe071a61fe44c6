"""Any callable simulator as a world: ``simulator(state, action)`` returns the next state, or it with reward and end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError
from telltale.world.laws.law import Law, checked_laws
from telltale.world.plugs import called
from telltale.world.protocol import Transition
from telltale.world.worlds.base import REGIMES, Episode, Outcome, Success, World


class SimulatorWorld(World):
    """A deterministic function of state (D,) and action as a world; the function is its own oracle.

    ``initial`` is a state or ``initial(rng) -> state`` with a NumPy generator. ``action_space`` is a Gymnasium Box or
    Discrete, or an integer for that many discrete actions. ``reward(before, action, after)`` works on batches and is needed
    unless the simulator returns rewards. A simulator that takes ``rng`` as a third argument is given a seeded one; say
    ``deterministic=False`` if it draws elsewhere.
    """

    def __init__(
        self,
        simulator: Callable[..., Any],
        *,
        initial: Any,
        action_space: Any,
        success: Success,
        reward: Callable[[Any, Any, Any], Tensor] | None = None,
        terminated: Callable[[Any], Tensor] | None = None,
        laws: tuple[Law, ...] | list[Law] = (),
        max_steps: int = 100,
        horizon: int = 20,
        regime: str = "scientific",
        name: str | None = None,
        deterministic: bool = True,
    ) -> None:
        from gymnasium import spaces

        check_choice("regime", regime, REGIMES)
        check_integer("max_steps", max_steps, low=1)
        check_integer("horizon", horizon, low=1)
        self.simulator, self.initial, self._succeeds = simulator, initial, success
        if isinstance(action_space, int):
            action_space = spaces.Discrete(check_integer("action_space", action_space, low=1))
        self.action_space = action_space
        if not isinstance(self.action_space, (spaces.Box, spaces.Discrete)):
            raise ConfigError(
                f"action_space is {type(action_space).__name__}; give a Gymnasium Box or Discrete, or an integer."
            )
        self.regime, self.max_steps, self.horizon, self.deterministic = regime, max_steps, horizon, deterministic
        self.id = f"{regime}/{name or getattr(simulator, '__name__', type(simulator).__name__)}"
        self.laws = checked_laws(laws, plain=False)
        if reward is not None:
            self.reward = reward
        if terminated is not None:
            self.terminated = terminated
        self.planner = "categorical_cem" if self.discrete else "cem"
        try:
            self._takes_rng = "rng" in inspect.signature(simulator).parameters
        except (TypeError, ValueError):  # built-in functions have no signature to read
            self._takes_rng = False
        self._arguments = {
            "simulator": simulator,
            "initial": initial,
            "action_space": self.action_space,
            "success": success,
            "reward": reward,
            "terminated": terminated,
            "laws": laws,
            "max_steps": max_steps,
            "horizon": horizon,
            "regime": regime,
            "name": name,
            "deterministic": deterministic,
        }

    def reset(self, seed: int) -> Any:
        """The initial state of ``seed``."""
        self._rng = np.random.default_rng(seed)
        self._steps = 0
        state = (
            called(f"the initial state of {self.id}", self.initial, self._rng)
            if callable(self.initial)
            else self.initial
        )
        self._state = called(f"the initial state of {self.id}", np.array, state, dtype=float).reshape(-1)
        if not np.isfinite(self._state).all():
            raise DataError(f"the initial state of {self.id} is {self._state}; expected finite numbers.")
        return self._state.copy()

    def step(self, action: Any) -> Outcome:
        """Call the simulator once."""
        before, action = self._state, self.checked_action(action)
        after, reward, terminated = self._called(before, action, self._rng)
        if reward is None and self.reward is not None:
            rows = (torch.as_tensor(side, dtype=torch.float32).unsqueeze(0) for side in (before, after))
            first, second = rows
            reward = float(
                called(f"the reward of {self.id}", self.reward, first, self.batch_actions([action]), second)[0]
            )
        if reward is None:
            raise ConfigError(
                f"{self.id} returns no reward and none was given; pass reward=function(before, action, after)."
            )
        if terminated is None:
            row = torch.as_tensor(after, dtype=torch.float32).unsqueeze(0)
            terminated = False
            if self.terminated is not None:
                terminated = bool(called(f"the termination of {self.id}", self.terminated, row)[0])
        self._state = after
        self._steps += 1
        return Outcome(after.copy(), float(reward), bool(terminated), self._steps >= self.max_steps)

    def _called(self, state: Any, action: Any, rng: Any) -> tuple[Any, float | None, bool | None]:
        options = {"rng": rng} if self._takes_rng else {}
        # copies, since a simulator may work in place
        returned = called(self.id, self.simulator, np.array(state), action, **options)
        reward, terminated = None, None
        # a tuple is (state, reward, terminated), or a state of as many numbers as the one before
        if isinstance(returned, tuple) and not (
            len(returned) == len(state) and all(np.ndim(value) == 0 for value in returned)
        ):
            if len(returned) != 3:
                raise ConfigError(
                    f"{self.id} returned {len(returned)} values; expected the next state, or (state, reward, terminated)."
                )
            returned, reward, terminated = returned
        after = called(f"the state that {self.id} returned", np.array, returned, dtype=float).reshape(-1)
        if after.shape != np.shape(state):
            raise ConfigError(
                f"{self.id} returned a state of shape {after.shape} for one of shape {np.shape(state)}; keep the shape."
            )
        return after, reward, terminated

    def spawn(self) -> World:
        """The same simulator with its own state."""
        return SimulatorWorld(**self._arguments)

    def rebuildable(self) -> bool:
        """Never: the simulator is the user's object."""
        return False

    def task_parts(self) -> list[Any]:
        """The simulator and the user's functions."""
        given = [self._arguments[name] for name in ("simulator", "initial", "success", "reward", "terminated")]
        return [*given, *(law.severity for law in self.laws)]

    def success(self, episode: Episode) -> bool:
        """The user's predicate."""
        return bool(self._succeeds(episode))

    def oracle(self) -> Any | None:
        """The simulator, stepped row by row."""
        return SimulatorModel(self)


class SimulatorModel:
    """A simulator as a model: each row of a batch is one call."""

    def __init__(self, world: SimulatorWorld) -> None:
        self.world = world
        self.stochastic = world._takes_rng or not world.deterministic

    def step(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """Call the simulator for every row (B, D); ``common`` gives each the same random numbers."""
        seed = int(torch.randint(2**62, (), generator=generator)) if generator is not None else 0
        rng = np.random.default_rng(seed)
        rows = belief.reshape(-1, belief.shape[-1]).double().numpy()
        acts = action.reshape(len(rows), -1)
        found = [
            self.world._called(
                row, int(act[0]) if self.world.discrete else act.numpy(), np.random.default_rng(seed) if common else rng
            )
            for row, act in zip(rows, acts, strict=True)
        ]
        after = torch.as_tensor(np.stack([state for state, _, _ in found]), dtype=belief.dtype).reshape(belief.shape)
        reward = terminated = None
        if found[0][1] is not None:
            reward = torch.as_tensor([float(r or 0.0) for _, r, _ in found], dtype=belief.dtype).reshape(
                belief.shape[:-1]
            )
            terminated = torch.as_tensor([bool(end) for _, _, end in found]).reshape(belief.shape[:-1])
        return Transition(after, reward, terminated)
