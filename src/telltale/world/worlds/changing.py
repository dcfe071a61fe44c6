"""A world whose law changes while a model lives in it, without a word: the same id, task and actions, another engine.

``Changing([(0, a), (2000, b), (4000, a)])`` is world ``a``, from the 2,000th step of a life on ``b``, then ``a`` again. The
``clock`` (steps of the life so far) is the life's: whoever plays sets it between episodes, so an episode has one law. Laws,
reward and columns are those of the first world, which is what the model's owner believes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from telltale.errors import ConfigError
from telltale.world.worlds.base import Episode, Outcome, World


class Changing(World):
    """Phases are (first step, world), the first at step 0; all worlds have one id and one width of actions."""

    def __init__(self, phases: Sequence[tuple[int, World]]) -> None:
        self.phases = [(int(first), place) for first, place in phases]
        starts = [first for first, _ in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ConfigError(f"phases start at {starts}; expected rising steps, the first of them 0.")
        places = [place for _, place in self.phases]
        if len({(place.id, place.plain, place.action_width) for place in places}) > 1:
            raise ConfigError(f"phases of {', '.join(place.id for place in places)}; expected one world throughout.")
        self.clock = 0
        first = places[0]
        self.id, self.regime, self.plain, self.laws = first.id, first.regime, first.plain, first.laws
        self.max_steps, self.action_space, self.deterministic = first.max_steps, first.action_space, first.deterministic
        self.reward, self.terminated, self.columns = first.reward, first.terminated, first.columns
        self.planner, self.horizon = first.planner, first.horizon
        for name in ("goal", "ranges", "action_names", "angle", "top_speed", "dt", "noise"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))

    @property
    def now(self) -> World:
        """The world of the present phase."""
        return [place for first, place in self.phases if first <= self.clock][-1]

    def reset(self, seed: int) -> Any:
        """Begin an episode under the present law."""
        self._playing = self.now
        return self._playing.reset(seed)

    def step(self, action: Any) -> Outcome:
        """Act in the episode that was begun."""
        return self._playing.step(action)

    def spawn(self) -> World:
        """An engine of the present law."""
        return self.now.spawn()

    def success(self, episode: Episode) -> bool:
        """As the present world says."""
        return self.now.success(episode)

    def oracle(self) -> Any | None:
        """The true dynamics of the present law."""
        return self.now.oracle()

    def embed(self, belief: Any) -> Any:
        """As the first world says."""
        return self.phases[0][1].embed(belief)

    def versions(self) -> dict[str, str]:
        """The engines'."""
        return self.phases[0][1].versions()

    def rebuildable(self) -> bool:
        """Only phase by phase: see the settings."""
        return False

    def settings(self) -> dict[str, Any]:
        """First step and settings of every phase."""
        return {"phases": [[first, place.settings()] for first, place in self.phases]}

    def close(self) -> None:
        """Free the engines."""
        for _, place in self.phases:
            place.close()
