"""A world: a real engine behind reset and step, with a success predicate, laws, an oracle where there is one, and receipts.

Beliefs are what models are stepped with: float32 rows (D,) for numeric worlds, tuples of integers for the digital and
social ones. ``embed`` turns a belief into a vector, so that every world measures errors and divergences alike.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.errors import ConfigError, DataError, TelltaleError
from telltale.world.laws.law import Law
from telltale.world.plugs import called

REGIMES = ("physical", "digital", "social", "scientific")


@dataclass(frozen=True)
class Outcome:
    """What the engine answered to one action. ``receipt`` is the engine's own word: a return code, an error, a contact."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    receipt: dict[str, Any] = field(default_factory=dict)


@dataclass
class Episode:
    """One episode on the engine: T actions and T + 1 observations."""

    seed: int
    observations: list[Any]
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    source: str = "random"

    @property
    def total(self) -> float:
        """Sum of rewards."""
        return float(sum(self.rewards))

    def __len__(self) -> int:
        return len(self.actions)

    def add(self, action: Any, outcome: Outcome) -> None:
        """Append one step."""
        self.observations.append(outcome.observation)
        self.actions.append(action)
        self.rewards.append(outcome.reward)
        self.receipts.append(outcome.receipt)
        self.terminated, self.truncated = outcome.terminated, outcome.truncated


Success = Callable[[Episode], bool]


class World(ABC):
    """Base of all worlds. ``id`` is ``regime/name``; ``plain`` says that beliefs are Python states, not tensors.

    ``reward(before, action, after) -> (B,)`` and ``terminated(after) -> (B,)`` are the known functions a planner may use,
    or None where a model has to learn them. ``deterministic``: whether a replay is bit-equal.
    """

    id: str
    regime: str
    max_steps: int
    action_space: Any
    plain: bool = False
    deterministic: bool = True
    laws: tuple[Law, ...] = ()
    reward: Callable[[Any, Any, Any], Tensor] | None = None
    terminated: Callable[[Any], Tensor] | None = None
    columns: tuple[str, ...] = ()
    planner: str = "cem"
    horizon: int = 20

    @abstractmethod
    def reset(self, seed: int) -> Any:
        """Begin the episode of ``seed``; returns the first observation."""

    @abstractmethod
    def step(self, action: Any) -> Outcome:
        """Act once. Raises :class:`~telltale.errors.DataError` for an action outside the space."""

    @abstractmethod
    def spawn(self) -> World:
        """Another instance with an engine of its own and the same settings."""

    @abstractmethod
    def success(self, episode: Episode) -> bool:
        """Whether the task was done."""

    def oracle(self) -> Any | None:
        """A model with the true dynamics, or None."""
        return None

    def belief(self, observation: Any) -> Any:
        """The belief of a fully observed state: a float32 row for numeric worlds, the observation itself for plain ones."""
        return observation if self.plain else torch.as_tensor(np.asarray(observation), dtype=torch.float32).reshape(-1)

    def embed(self, belief: Any) -> Tensor:
        """Vectors (B, D) of beliefs (B, D), or (D,) of one plain state."""
        return torch.as_tensor(belief, dtype=torch.float32)

    def versions(self) -> dict[str, str]:
        """The engines and their versions, by distribution name."""
        return {}

    def rebuildable(self) -> bool:
        """Whether ``make(id, **settings())`` is this world; not so where the user gave objects or functions."""
        return True

    def settings(self) -> dict[str, Any]:
        """What :func:`telltale.world.make` was given besides the id; JSON values only."""
        return {}

    def close(self) -> None:  # noqa: B027 - most engines have nothing to free
        """Free the engine."""

    def check_task(self) -> None:  # noqa: B027 - most worlds can always tell
        """Raise :class:`~telltale.errors.ConfigError` if :meth:`success` cannot tell, before anything is played."""

    def task_parts(self) -> list[Any]:
        """What the user gave that defines the task besides the class: functions, or objects whose class's source counts."""
        return []

    def task_hash(self) -> str:
        """SHA-256 of the definition of the task: id, settings, laws, the source of the world's class and of what the user gave."""
        laws = [(law.name, law.tolerance, law.hard) for law in self.laws]
        sources = [source_of(type(self)), *(source_of(part) for part in self.task_parts())]
        text = repr((self.id, sorted(self.settings().items()), laws, self.max_steps, sources))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def discrete(self) -> bool:
        """Whether actions are integers 0 .. n - 1."""
        return hasattr(self.action_space, "n")

    @property
    def action_width(self) -> int:
        """Number of discrete actions, or the length of a continuous action."""
        return int(self.action_space.n) if self.discrete else int(np.prod(self.action_space.shape))

    def checked_action(self, action: Any) -> Any:
        """``action`` as the engine takes it: an int, or a float array of the space's shape and dtype within its bounds.

        Raises :class:`~telltale.errors.DataError` for NaN, a wrong shape, or a value outside the space.
        """
        if self.discrete:
            number = self._as_numbers(action, int)
            if number != action or not 0 <= number < self.action_width:
                raise DataError(
                    f"action {action!r} is outside {self.id}'s space; expected an integer 0 to {self.action_width - 1}."
                )
            return number
        array = self._as_numbers(action, lambda value: np.asarray(value, dtype=self.action_space.dtype)).reshape(-1)
        if array.size != self.action_width:
            raise DataError(f"action has {array.size} numbers; {self.id} takes {self.action_width}.")
        if not np.isfinite(array).all():
            raise DataError(
                f"action[{int(np.argmin(np.isfinite(array)))}] is not finite; expected numbers within the space of {self.id}."
            )
        low, high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)
        slack = 1e-5 * np.maximum(1.0, np.abs(array))
        if ((array < low - slack) | (array > high + slack)).any():
            index = int(np.argmax((array < low - slack) | (array > high + slack)))
            raise DataError(
                f"action[{index}]={array[index]} is outside {self.id}'s bounds {low[index]} to {high[index]}; clip it first."
            )
        return np.clip(array, low, high).reshape(self.action_space.shape)

    def _as_numbers(self, action: Any, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(action)
        except (TypeError, ValueError, OverflowError):
            kind = "an integer" if self.discrete else f"{self.action_width} numbers"
            raise DataError(f"action {action!r} is no action of {self.id}; expected {kind}.") from None

    def sample_action(self, generator: torch.Generator) -> Any:
        """A uniform random action."""
        if self.discrete:
            return int(torch.randint(self.action_width, (), generator=generator))
        low, high = (torch.as_tensor(bound, dtype=torch.float64).reshape(-1) for bound in bounds(self.action_space))
        return (low + (high - low) * torch.rand(len(low), generator=generator, dtype=torch.float64)).numpy()

    def batch_actions(self, actions: Sequence[Any]) -> Tensor:
        """Actions as models take them: (B,) int64, or (B, A) float32."""
        if self.discrete:
            return torch.as_tensor([int(a) for a in actions], dtype=torch.int64)
        return torch.stack([torch.as_tensor(np.asarray(a), dtype=torch.float32).reshape(-1) for a in actions])


def source_of(value: Any) -> str:
    """The source of a function or class, or of an object's class; its name where there is none to read."""
    if value is None:
        return ""
    named = value if inspect.isfunction(value) or isinstance(value, type) else type(value)
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):
        return f"{named.__module__}.{named.__qualname__}"


def bounds(space: Any) -> tuple[Any, Any]:
    """Low and high of a Box. Raises :class:`~telltale.errors.ConfigError` where a bound is infinite."""
    low, high = np.asarray(space.low), np.asarray(space.high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ConfigError(
            "the action space has infinite bounds; give it finite ones (gymnasium.wrappers.RescaleAction or ClipAction)."
        )
    return low, high


def run_episode(
    world: World, seed: int, act: Callable[[Any], Any], *, source: str = "random", max_steps: int | None = None
) -> Episode:
    """Play one episode with ``act(observation) -> action``."""
    episode = Episode(seed, [world.reset(seed)], source=source)
    for _ in range(max_steps or world.max_steps):
        action = world.checked_action(called("the policy", act, episode.observations[-1]))
        outcome = world.step(action)
        check_outcome(world, outcome)
        episode.add(action, outcome)
        if outcome.terminated or outcome.truncated:
            break
    return episode


def replays(world: World, episode: Episode, *, receipts: bool = False) -> bool:
    """Whether the engine, played again with the episode's seed and actions, gives the same observations, rewards and end;
    with ``receipts``, these too."""
    engine = world.spawn()
    try:
        same = np.array_equal(np.asarray(engine.reset(episode.seed)), np.asarray(episode.observations[0]))
        for t, action in enumerate(episode.actions):
            if not same:
                return False
            outcome = engine.step(action)
            same = np.array_equal(np.asarray(outcome.observation), np.asarray(episode.observations[t + 1]))
            same = same and outcome.reward == episode.rewards[t]
            same = same and (not receipts or repr(outcome.receipt) == repr(episode.receipts[t]))
        return same and (not len(episode) or outcome.terminated == episode.terminated)
    except TelltaleError:
        return False
    finally:
        engine.close()


def check_outcome(world: World, outcome: Outcome) -> None:
    """Raise :class:`~telltale.errors.DataError` if the engine returned a reward or an observation that is not finite."""
    if not world.plain and not np.isfinite(np.asarray(outcome.observation, dtype=float)).all():
        raise DataError(
            f"{world.id} returned an observation that is not finite: {outcome.observation}. Check the environment."
        )
    if not np.isfinite(outcome.reward):
        raise DataError(
            f"{world.id} returned the reward {outcome.reward}; expected a finite number. Check the environment."
        )
