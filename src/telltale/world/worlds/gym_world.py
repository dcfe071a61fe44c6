"""Any Gymnasium environment as a world, by id or as an object."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from telltale.config import check_choice, check_integer, check_range, unknown_key
from telltale.errors import ConfigError, MissingExtraError, UnsupportedModelError
from telltale.world.laws.law import Law, checked_laws
from telltale.world.plugs import called
from telltale.world.worlds.base import REGIMES, Episode, Outcome, Success, World
from telltale.world.worlds.built_in import BUILT_IN


class GymWorld(World):
    """A Gymnasium environment with a Box observation and a Box or Discrete action.

    ``success(episode) -> bool`` is the task; without it, ``success_return`` (default: the registered reward threshold) is
    the total reward that counts as success. ``reward(before, action, after)`` and ``terminated(after)`` are known functions
    on batches; without them models learn both. ``oracle()`` returns a model with the true dynamics. ``columns`` name what is
    observed, for laws and cards; ``regime`` files the world under physical, digital, social or scientific. An environment
    given as an object is copied with ``copy.deepcopy`` for parallel episodes, and must depend on the seed of ``reset`` alone.

    Raises :class:`~telltale.errors.UnsupportedModelError` for other spaces, and :class:`~telltale.errors.ConfigError` for an
    environment that Gymnasium cannot make.
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
        columns: tuple[str, ...] | list[str] = (),
        regime: str = "physical",
        **settings: Any,
    ) -> None:
        check_choice("regime", regime, REGIMES)
        check_integer("horizon", horizon, low=1)
        if max_steps is not None:
            check_integer("max_steps", max_steps, low=1)
        if success_return is not None:
            check_range("success_return", success_return, finite=True)
        if settings and not isinstance(environment, str):
            known = list(inspect.signature(GymWorld.__init__).parameters)[2:-1]
            raise ConfigError(unknown_key(next(iter(settings)), known).replace("config field", "setting"))
        self._settings, self._given = settings, environment
        self.env: Any = _made(environment, settings) if isinstance(environment, str) else environment
        spec = getattr(self.env, "spec", None)
        name = (
            environment
            if isinstance(environment, str)
            else (spec.id if spec is not None else type(self.env.unwrapped).__name__)
        )
        if not hasattr(self, "id"):
            self.regime = regime
            # with a built-in world's id it would pass for that world; Gymnasium reads "gymnasium:Pendulum-v1" as its own
            built_in = type(self) is GymWorld and f"{regime}/{name}" in BUILT_IN
            self.id = f"{regime}/{'gymnasium:' if built_in else ''}{name}"
        self.action_space = self.env.action_space
        _check_spaces(name, self.env)
        self._succeeds = success
        threshold = getattr(spec, "reward_threshold", None)
        self.success_return = success_return if success_return is not None else threshold
        limit = max_steps or getattr(spec, "max_episode_steps", None)
        self.max_steps = int(limit or 1000)
        self.horizon = horizon
        self.deterministic = not getattr(spec, "nondeterministic", False)
        if reward is not None:
            self.reward = reward
        if terminated is not None:
            self.terminated = terminated
        self._oracle = oracle
        if laws:
            self.laws = checked_laws(laws, plain=False)
        if columns:
            self.columns = tuple(columns)
            width = int(np.prod(self.env.observation_space.shape))
            if len(self.columns) != width:
                raise ConfigError(f"columns name {len(self.columns)} values, but {name} observes {width}.")
        self.planner = "categorical_cem" if self.discrete else "cem"
        self._arguments: dict[str, Any] = {
            "success": success,
            "success_return": success_return,
            "reward": reward,
            "terminated": terminated,
            "oracle": oracle,
            "laws": laws,
            "max_steps": max_steps,
            "horizon": horizon,
            "columns": columns,
            "regime": regime,
        }

    def reset(self, seed: int) -> Any:
        """Reset the environment with ``seed``."""
        answer = called(f"{self.id}'s reset", self.env.reset, seed=int(seed))
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise ConfigError(f"{self.id}'s reset returned {type(answer).__name__}; expected (observation, info).")
        self._steps = 0
        return self._observed(answer[0])

    def step(self, action: Any) -> Outcome:
        """One step; numeric entries of ``info`` are the receipt."""
        answer = called(f"{self.id}'s step", self.env.step, self.checked_action(action))
        if not (isinstance(answer, tuple) and len(answer) == 5):
            size = len(answer) if isinstance(answer, tuple) else type(answer).__name__
            raise ConfigError(
                f"{self.id}'s step returned {size}; expected (observation, reward, terminated, truncated, info)."
            )
        observation, reward, terminated, truncated, info = answer
        self._steps += 1
        receipt = {
            key: float(value)
            for key, value in info.items()
            if np.ndim(value) == 0 and isinstance(value, (int, float, np.number))
        }
        truncated = bool(truncated) or self._steps >= self.max_steps
        return Outcome(self._observed(observation), float(reward), bool(terminated), truncated, receipt)

    def _observed(self, observation: Any) -> Any:
        found, expected = np.array(observation), self.env.observation_space.shape
        if found.shape != expected:
            raise ConfigError(f"{self.id} observed an array of shape {found.shape}; its space says {expected}.")
        return found

    def spawn(self) -> World:
        """A new environment of the same id, or a deep copy of the user's object."""
        environment = self._given
        if not isinstance(environment, str):
            try:
                environment = copy.deepcopy(environment)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{self.id} cannot be copied for episodes of its own ({type(error).__name__}: {error}); register it with "
                    f"gymnasium.register and give its id."
                ) from error
        return GymWorld(environment, **self._arguments, **self._settings)

    def check_task(self) -> None:
        """Raises :class:`~telltale.errors.ConfigError` if there is neither a predicate nor a return to reach."""
        if self._succeeds is None and self.success_return is None and type(self).success is GymWorld.success:
            raise ConfigError(
                f"{self.id} has no success predicate and no registered reward threshold; pass success=function(episode) or "
                f"success_return=number to telltale.world.make."
            )

    def success(self, episode: Episode) -> bool:
        """The user's predicate, or the total reward against the threshold; see :meth:`check_task`."""
        if self._succeeds is not None:
            return bool(self._succeeds(episode))
        self.check_task()
        assert self.success_return is not None
        return episode.total >= self.success_return

    def oracle(self) -> Any | None:
        """What ``oracle`` returns, if it was given."""
        return called(f"the oracle of {self.id}", self._oracle) if self._oracle is not None else None

    def versions(self) -> dict[str, str]:
        """Gymnasium and NumPy."""
        return {name: importlib.metadata.version(name) for name in ("gymnasium", "numpy")}

    def rebuildable(self) -> bool:
        """Whether the environment was given by id, and everything else as numbers and texts."""
        functions = ("success", "reward", "terminated", "oracle", "laws")
        plain = all(isinstance(value, (int, float, str, bool, type(None))) for value in self._settings.values())
        known = (
            isinstance(self._given, str) and self.regime == "physical"
        )  # the id of another regime is not Gymnasium's
        return known and plain and not any(self._arguments[name] for name in functions)

    def task_parts(self) -> list[Any]:
        """The user's functions and the class of the environment."""
        given = [self._arguments[name] for name in ("success", "reward", "terminated")]
        return [*given, *(law.severity for law in self._arguments["laws"]), type(self.env.unwrapped)]

    def settings(self) -> dict[str, Any]:
        """JSON settings of ``gymnasium.make``, and those of the task that were given; a world of its own class has none."""
        if type(self) is not GymWorld:
            return {}
        task = {
            name: self._arguments[name] for name in ("success_return", "max_steps") if self._arguments[name] is not None
        }
        if self._arguments["columns"]:
            task["columns"] = list(self._arguments["columns"])
        if self._arguments["horizon"] != 20:
            task["horizon"] = self._arguments["horizon"]
        return {**{k: v for k, v in self._settings.items() if isinstance(v, (int, float, str, bool))}, **task}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def _made(name: str, settings: dict[str, Any]) -> Any:
    try:
        return gymnasium.make(name, **settings)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtraError(f"{name} needs a package that is not installed: {str(error).rstrip('.')}.") from error
    except gymnasium.error.Error as error:
        raise ConfigError(f"Gymnasium cannot make {name}: {error}.") from error


def _check_spaces(name: str, env: Any) -> None:
    """Raise :class:`~telltale.errors.UnsupportedModelError` unless a Box is observed, and the actions are a Box or Discrete."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise UnsupportedModelError(f"{name} is a vector of environments; give one of them, which is copied as needed.")
    observed, acted = env.observation_space, env.action_space
    if not isinstance(observed, spaces.Box):
        raise UnsupportedModelError(
            f"{name} observes a {type(observed).__name__}; expected a Box. Wrap it with gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(acted, (spaces.Box, spaces.Discrete)):
        raise UnsupportedModelError(
            f"{name} acts in a {type(acted).__name__}; expected Box or Discrete. Wrap it so that each combination of actions has "
            f"a number (gymnasium.wrappers.TransformAction)."
        )
    if isinstance(acted, spaces.Discrete) and int(acted.start) != 0:
        raise UnsupportedModelError(f"{name} numbers its actions from {acted.start}; expected from 0.")
    if isinstance(acted, spaces.Box) and not np.issubdtype(acted.dtype, np.floating):
        raise UnsupportedModelError(
            f"{name} acts in a Box of {acted.dtype}; planners of Boxes need real numbers. Use a Discrete space, or a float Box."
        )
