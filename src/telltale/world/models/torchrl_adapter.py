"""TorchRL's ``WorldModel`` and ``ModelBasedEnv`` behind the protocol: TensorDict in, tensor out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from telltale.errors import MissingExtraError, UnsupportedModelError
from telltale.world.protocol import Transition


class FromTorchRL:
    """A TensorDict module that reads ``observation`` and ``action`` keys and writes the next observation.

    ``next_key`` None looks for ``("next", observation)`` and then for ``observation`` itself. ``actions``: number of discrete
    actions, which are passed one-hot. Raises :class:`~telltale.errors.UnsupportedModelError` if the module writes neither.
    """

    def __init__(
        self,
        module: Any,
        *,
        observation: Any = "observation",
        action: Any = "action",
        reward: Any = "reward",
        next_key: Any = None,
        actions: int | None = None,
    ) -> None:
        try:
            from tensordict import TensorDict
        except ImportError as error:
            raise MissingExtraError("TorchRL models need tensordict: pip install 'telltale[world-torchrl]'") from error
        self._dict = TensorDict
        self.module, self.keys, self.next_key, self.actions = module, (observation, action, reward), next_key, actions

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One call of the module on rows (B, D)."""
        observation, action_key, reward_key = self.keys
        taken = functional.one_hot(action.long(), self.actions).to(belief.dtype) if self.actions else action
        with torch.no_grad():
            out = self.module(self._dict({observation: belief, action_key: taken}, batch_size=belief.shape[:-1]))
        known = set(out.keys(include_nested=True))
        candidates = [self.next_key] if self.next_key is not None else [("next", observation), observation]
        key = next((candidate for candidate in candidates if candidate in known), None)
        if key is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} writes none of {candidates}; say next_key=. It writes {sorted(map(str, known))}."
            )
        reward = next((out[k] for k in (("next", reward_key), reward_key) if k in known), None)
        return Transition(out[key], reward.reshape(belief.shape[:-1]) if reward is not None else None)
