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
    actions, which are passed one-hot. ``terminated`` (else ``done``) is read where the module writes it.

    Raises :class:`~telltale.errors.UnsupportedModelError` if the module writes no observation.
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
        given = self._dict({observation: belief, action_key: taken}, batch_size=belief.shape[:-1])
        with torch.no_grad():
            out = self.module(given.clone(recurse=False))
        # what came in is there still; only what the module wrote is its answer
        before = set(given.keys(include_nested=True))
        known = {key for key in out.keys(include_nested=True) if key not in before or out[key] is not given[key]}
        candidates = [self.next_key] if self.next_key is not None else [("next", observation), observation]
        key = next((candidate for candidate in candidates if candidate in known), None)
        if key is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} writes none of {candidates}; say next_key=. It writes {sorted(map(str, known))}."
            )

        def per_row(*names: Any) -> Tensor | None:
            found = next((out[name] for name in names if name in known), None)
            return None if found is None else found.reshape(belief.shape[:-1])

        return Transition(
            out[key],
            per_row(("next", reward_key), reward_key),
            per_row(("next", "terminated"), "terminated", ("next", "done"), "done"),
        )
