"""``world.make``: a world by id, the user's Gymnasium environment by id or object, or any callable simulator."""

from __future__ import annotations

import importlib
from typing import Any

from telltale.config import unknown_key
from telltale.errors import ConfigError, MissingExtraError
from telltale.world.worlds.base import REGIMES, World
from telltale.world.worlds.built_in import BUILT_IN

_EXTRA = {
    "gymnasium": "world",
    "mujoco": "world-physical",
    "imageio": "world-physical",
    "pyspiel": "world-social",
    "open_spiel": "world-social",
}

_USERS: dict[str, Any] = {}


def register_world(name: str) -> Any:
    """Class decorator: makes a user's :class:`World` known to :func:`make` under ``name`` (``regime/name``)."""

    def enter(cls: Any) -> Any:
        if name in BUILT_IN or name in _USERS:
            raise ConfigError(f"a world is named {name!r} already; choose another name.")
        _USERS[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """Ids of all worlds."""
    return [*BUILT_IN, *_USERS]


def make(world: Any, **settings: Any) -> World:
    """A world.

    * an id of :func:`names`: that world, with its own settings as keywords;
    * another id of Gymnasium (``gymnasium.make`` knows it; ``physical/`` before it is allowed), or a Gymnasium environment; what a
      built-in world is of has the id ``physical/gymnasium:Pendulum-v1``, so that neither passes for the other:
      settings are those of :class:`telltale.world.worlds.gym_world.GymWorld` (``success``, ``reward``, ``oracle``, ...);
    * a callable ``simulator(state, action) -> next state`` or ``(next state, reward, terminated)``: settings are those of
      :class:`telltale.world.worlds.simulators.SimulatorWorld` (``initial``, ``action_space``, ``success``, ...).

    Raises :class:`~telltale.errors.ConfigError` for an unknown id or setting and
    :class:`~telltale.errors.MissingExtraError` with the line that installs the engine.
    """
    if isinstance(world, World):
        return world
    try:
        return _made(world, settings)
    except ImportError as error:
        if isinstance(error, MissingExtraError):
            raise
        package = (error.name or "gymnasium").split(".")[0]
        extra = _EXTRA.get(package)
        if extra is None and isinstance(world, str) and ":" in world:
            raise ConfigError(f"world {world!r} names a module that cannot be imported: {error}.") from error
        if extra is None:
            raise
        raise MissingExtraError(f"{_named(world)} needs {package}: pip install 'telltale[{extra}]'") from error
    except TypeError as error:
        named = _named(world)
        if "unexpected keyword argument" in str(error):
            name = str(error).rsplit("'", 2)[1]
            raise ConfigError(f"{named} has no setting {name!r}; see its class for those it has.") from error
        if "required keyword-only argument" in str(error):
            missing = str(error).split(":", 1)[1].strip()
            raise ConfigError(f"a world of {named} needs {missing}; pass it to telltale.world.make.") from error
        raise


def _made(world: Any, settings: dict[str, Any]) -> World:
    if isinstance(world, str):
        if world in _USERS:
            return _USERS[world](**settings)
        if world in BUILT_IN:
            module, name, fixed = BUILT_IN[world]
            return getattr(importlib.import_module(f"telltale.world.worlds.{module}"), name)(**{**fixed, **settings})
        return _from_gymnasium_id(world, settings)
    if isinstance(world, type):
        raise ConfigError(f"{world.__name__} is a class; give an environment made of it, {world.__name__}().")
    if hasattr(world, "reset") and hasattr(world, "step") and hasattr(world, "action_space"):
        from telltale.world.worlds.gym_world import GymWorld

        return GymWorld(world, **settings)
    if callable(world):
        from telltale.world.worlds.simulators import SimulatorWorld

        return SimulatorWorld(world, **settings)
    raise ConfigError(
        f"{type(world).__name__} is no world; give an id, a Gymnasium environment, or a callable simulator."
    )


def _named(world: Any) -> str:
    return world if isinstance(world, str) else getattr(world, "__name__", type(world).__name__)


def _from_gymnasium_id(world: str, settings: dict[str, Any]) -> World:
    regime, _, rest = world.partition("/")
    name = rest if regime in REGIMES and rest else world
    if regime in REGIMES[1:]:
        raise ConfigError(unknown_key(world, BUILT_IN).replace("config field", "world"))
    import gymnasium

    from telltale.world.worlds.gym_world import GymWorld

    module, _, plain = name.rpartition(":")
    if module:
        importlib.import_module(module)  # which registers it
    try:
        gymnasium.spec(plain)
    except gymnasium.error.Error as error:
        message = unknown_key(world, names()).replace("config field", "world")
        raise ConfigError(f"{message} Gymnasium does not know it either ({error}).") from None
    return GymWorld(name, **settings)
