"""Any callable simulator as a world: ``simulator(state, action)`` returns the next state, or it with reward and end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.errors import ConfigError
from telltale.world.laws.law import Law
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, Success, World


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

        self.simulator, self.initial, self._succeeds = simulator, initial, success
        self.action_space = spaces.Discrete(action_space) if isinstance(action_space, int) else action_space
        if not isinstance(self.action_space, (spaces.Box, spaces.Discrete)):
            raise ConfigError(
                f"action_space is {type(action_space).__name__}; give a Gymnasium Box or Discrete, or an integer."
            )
        self.regime, self.max_steps, self.horizon, self.deterministic = regime, max_steps, horizon, deterministic
        self.id = f"{regime}/{name or getattr(simulator, '__name__', type(simulator).__name__)}"
        self.laws = tuple(laws)
        if reward is not None:
            self.reward = reward
        if terminated is not None:
            self.terminated = terminated
        self.planner = "categorical_cem" if self.discrete else "cem"
        self._takes_rng = "rng" in inspect.signature(simulator).parameters
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
        state = self.initial(self._rng) if callable(self.initial) else self.initial
        self._state = np.array(state, dtype=float).reshape(-1)
        return self._state.copy()

    def step(self, action: Any) -> Outcome:
        """Call the simulator once."""
        before, action = self._state, self.checked_action(action)
        after, reward, terminated = self._called(before, action, self._rng)
        if reward is None and self.reward is not None:
            rows = (torch.as_tensor(side, dtype=torch.float32).unsqueeze(0) for side in (before, after))
            first, second = rows
            reward = float(self.reward(first, self.batch_actions([action]), second)[0])
        if reward is None:
            raise ConfigError(
                f"{self.id} returns no reward and none was given; pass reward=function(before, action, after)."
            )
        if terminated is None:
            row = torch.as_tensor(after, dtype=torch.float32).unsqueeze(0)
            terminated = bool(self.terminated(row)[0]) if self.terminated is not None else False
        self._state = after
        self._steps += 1
        return Outcome(after.copy(), float(reward), bool(terminated), self._steps >= self.max_steps)

    def _called(self, state: Any, action: Any, rng: Any) -> tuple[Any, float | None, bool | None]:
        returned = self.simulator(state, action, rng=rng) if self._takes_rng else self.simulator(state, action)
        if isinstance(returned, tuple):
            if len(returned) != 3:
                raise ConfigError(
                    f"{self.id} returned {len(returned)} values; expected the next state, or (state, reward, terminated)."
                )
            after, reward, terminated = returned
        else:
            after, reward, terminated = returned, None, None
        after = np.asarray(after, dtype=float).reshape(-1)
        if after.shape != np.shape(state):
            raise ConfigError(
                f"{self.id} returned a state of shape {after.shape} for one of shape {np.shape(state)}; keep the shape."
            )
        return after, reward, terminated

    def spawn(self) -> World:
        """The same simulator with its own state."""
        return SimulatorWorld(**self._arguments)

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

    def step(self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None) -> Transition:
        """Call the simulator for every row (B, D)."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)) if generator is not None else 0)
        rows, acts = (
            belief.reshape(-1, belief.shape[-1]).double().numpy(),
            action.reshape(len(belief.reshape(-1, belief.shape[-1])), -1),
        )
        found = [
            self.world._called(row, int(act[0]) if self.world.discrete else act.numpy(), rng)
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
