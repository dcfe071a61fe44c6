"""A model stepped as a Gymnasium environment: imagined rollouts for the user's own reinforcement-learning library."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from telltale.errors import ConfigError
from telltale.world.laws.law import project
from telltale.world.protocol import adapt, check_predicted
from telltale.world.worlds.base import World


class ImaginedEnv(gymnasium.Env[Any, Any]):
    """Episodes start from real first observations of ``world`` and go on in ``model``, for at most ``max_steps`` steps.

    Reward and ending are the world's known functions, else the model's. Laws with a projection are enforced if ``enforce``.
    Raises :class:`~telltale.errors.ConfigError` for a world of plain states.
    """

    def __init__(self, model: Any, world: World, *, max_steps: int | None = None, enforce: bool = True) -> None:
        if world.plain:
            raise ConfigError(f"{world.id} has plain states; an imagined Gymnasium environment needs numeric ones.")
        self.model, self.world = adapt(model), world.spawn()
        self.max_steps, self.enforce = max_steps or world.max_steps, enforce
        width = len(world.belief(self.world.reset(0)))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = world.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A real first observation."""
        super().reset(seed=seed)
        start = int(self.np_random.integers(2**31))
        self._noise = torch.Generator().manual_seed(start)
        self._seen = self.world.belief(self.world.reset(start)).unsqueeze(0)
        self._belief = self.model.infer(self._seen)
        self._steps = 0
        return self._seen[0].numpy().copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One imagined step."""
        taken = self.world.batch_actions([self.world.checked_action(action)])
        with torch.no_grad():
            made = self.model.step(self._belief, taken, generator=self._noise)
        self._belief, after = made.belief, self.model.observed(made.belief)
        if self.enforce:
            put = project(self.world.laws, self._seen, taken, after)
            if not torch.equal(put, after):
                self._belief, after = self.model.infer(put), put
        check_predicted(after, self.model.name, "observation")
        reward = self.world.reward(self._seen, taken, after) if self.world.reward is not None else made.reward
        if reward is None:
            raise ConfigError(f"neither {self.world.id} nor the model gives a reward; fit with learn_reward=True.")
        ended = self.world.terminated(after) if self.world.terminated is not None else made.terminated
        self._seen = after
        self._steps += 1
        done = bool(ended[0]) if ended is not None else False
        return after[0].numpy().copy(), float(reward[0]), done, self._steps >= self.max_steps, {}

    def close(self) -> None:
        """Free the engine that the first observations come from."""
        self.world.close()
