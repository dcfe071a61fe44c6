"""Minibatches by number: every rank asks for the same one and reads what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from telltale.errors import DataError


class Batches:
    """A sequence of minibatches, or a function of their number, kept while they are in flight."""

    def __init__(self, source: Callable[[int], Any] | Sequence[Any], device: torch.device | None = None) -> None:
        if not callable(source) and not hasattr(source, "__getitem__"):
            raise DataError(
                f"batches is {type(source).__name__}; expected a function of the minibatch number, or a sequence."
            )
        self._source = source
        self._device = device
        self._kept: dict[int, Any] = {}

    def __call__(self, minibatch: int) -> Any:
        """Minibatch ``minibatch``, on this rank's device. Raises :class:`~telltale.errors.DataError` past the end."""
        if minibatch not in self._kept:
            if callable(self._source):
                batch = self._source(minibatch)
            else:
                try:
                    batch = self._source[minibatch]
                except (IndexError, KeyError) as error:
                    count = len(self._source) if hasattr(self._source, "__len__") else "ones"
                    raise DataError(f"minibatch {minibatch} is past the end of the {count} given.") from error
            device = self._device
            self._kept[minibatch] = batch if device is None else tree_map(lambda leaf: _moved(leaf, device), batch)
        return self._kept[minibatch]

    def shapes(self, minibatch: int) -> Hashable:
        """Shapes and dtypes of the minibatch's tensors, the same on every rank."""
        leaves = tree_leaves(self(minibatch))
        return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor))

    def release(self, minibatch: int) -> None:
        """Let go of a minibatch that is not needed any more."""
        self._kept.pop(minibatch, None)


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf
