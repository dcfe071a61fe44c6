"""Any Gymnasium environment as a world, by id or as an object."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.world.laws.law import Law
from telltale.world.worlds.base import Episode, Outcome, Success, World


class GymWorld(World):
    """A Gymnasium environment with a Box observation and a Box or Discrete action.

    ``success(episode) -> bool`` is the task; without it, ``success_return`` (default: the registered reward threshold) is
    the total reward that counts as success. ``reward(before, action, after)`` and ``terminated(after)`` are known functions
    on batches; without them models learn both. ``oracle()`` returns a model with the true dynamics. An environment given
    as an object is copied with ``copy.deepcopy`` for parallel episodes.

    Raises :class:`~telltale.errors.UnsupportedModelError` for other spaces.
    """

    regime = "physical"

    def __init__(
        self,
        environment: Any,
        *,
        success: Success | None = None,
        success_return: float | None = None,
        reward: Callable[[Any, Any, Any], Any] | None = None,
        terminated: Callable[[Any], Any] | None = None,
        oracle: Callable[[], Any] | None = None,
        laws: tuple[Law, ...] | list[Law] = (),
        max_steps: int | None = None,
        horizon: int = 20,
        **settings: Any,
    ) -> None:
        self._settings = settings
        self.env: Any = gymnasium.make(environment, **settings) if isinstance(environment, str) else environment
        spec = getattr(self.env, "spec", None)
        name = (
            environment
            if isinstance(environment, str)
            else (spec.id if spec is not None else type(self.env.unwrapped).__name__)
        )
        if not hasattr(self, "id"):
            self.id = f"physical/{name}"
        self.action_space = self.env.action_space
        observed = self.env.observation_space
        if not isinstance(observed, spaces.Box):
            raise UnsupportedModelError(
                f"{name} observes a {type(observed).__name__}; expected a Box. Wrap it with gymnasium.wrappers.FlattenObservation."
            )
        if not isinstance(self.action_space, (spaces.Box, spaces.Discrete)):
            raise UnsupportedModelError(
                f"{name} acts in a {type(self.action_space).__name__}; expected Box or Discrete."
            )
        if isinstance(self.action_space, spaces.Discrete) and int(self.action_space.start) != 0:
            raise UnsupportedModelError(f"{name} numbers its actions from {self.action_space.start}; expected from 0.")
        self._succeeds = success
        threshold = getattr(spec, "reward_threshold", None)
        self.success_return = success_return if success_return is not None else threshold
        limit = max_steps or getattr(spec, "max_episode_steps", None)
        self.max_steps = int(limit or 1000)
        self.horizon = horizon
        if reward is not None:
            self.reward = reward
        if terminated is not None:
            self.terminated = terminated
        self._oracle = oracle
        if laws:
            self.laws = tuple(laws)
        self.planner = "categorical_cem" if self.discrete else "cem"
        self._arguments = dict(
            environment=environment, success=success, success_return=success_return, reward=reward, terminated=terminated,
            oracle=oracle, laws=laws, max_steps=max_steps, horizon=horizon, **settings,
        )  # fmt: skip

    def reset(self, seed: int) -> Any:
        """Reset the environment with ``seed``."""
        observation, _ = self.env.reset(seed=int(seed))
        self._steps = 0
        return np.array(observation)

    def step(self, action: Any) -> Outcome:
        """One step; numeric entries of ``info`` are the receipt."""
        observation, reward, terminated, truncated, info = self.env.step(self.checked_action(action))
        self._steps += 1
        receipt = {
            key: float(value)
            for key, value in info.items()
            if np.ndim(value) == 0 and isinstance(value, (int, float, np.number))
        }
        truncated = bool(truncated) or self._steps >= self.max_steps
        return Outcome(np.array(observation), float(reward), bool(terminated), truncated, receipt)

    def spawn(self) -> World:
        """A new environment of the same id, or a deep copy of the user's object."""
        arguments = dict(self._arguments)
        environment = arguments.pop("environment")
        if not isinstance(environment, str):
            environment = copy.deepcopy(environment)
        return GymWorld(environment, **arguments)

    def success(self, episode: Episode) -> bool:
        """The user's predicate, or the total reward against the threshold.

        Raises :class:`~telltale.errors.ConfigError` if there is neither.
        """
        if self._succeeds is not None:
            return bool(self._succeeds(episode))
        if self.success_return is None:
            raise ConfigError(
                f"{self.id} has no success predicate and no registered reward threshold; pass success=function(episode) or "
                f"success_return=number to telltale.world.make."
            )
        return episode.total >= self.success_return

    def oracle(self) -> Any | None:
        """What ``oracle`` returns, if it was given."""
        return self._oracle() if self._oracle is not None else None

    def versions(self) -> dict[str, str]:
        """Gymnasium and NumPy."""
        return {name: importlib.metadata.version(name) for name in ("gymnasium", "numpy")}

    def settings(self) -> dict[str, Any]:
        """JSON settings of ``gymnasium.make``."""
        return {key: value for key, value in self._settings.items() if isinstance(value, (int, float, str, bool))}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()
