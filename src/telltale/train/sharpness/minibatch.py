"""What a probe may do to a minibatch of whatever shape: find its tensors, and give them another device or precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def in_full_precision(batch: Any) -> Any:
    """``batch`` with its half-precision tensors as float32, through mappings, lists and tuples; itself if it has none."""
    return _mapped(batch, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``; itself if they are there."""
    return _mapped(batch, lambda tensor: tensor.to(device))


def rows(batch: Any) -> int | None:
    """Length of the first tensor in the minibatch; None if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((size for size in map(rows, batch) if size is not None), None)
    return None


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The container is only made anew where a tensor changed: one of the user's own kind may have more than items."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        fields = {key: _mapped(value, function) for key, value in batch.items()}
        if all(fields[key] is value for key, value in batch.items()):
            return batch
        return _of_kind(batch, fields)
    if isinstance(batch, (list, tuple)):
        values = [_mapped(value, function) for value in batch]
        if all(one is other for one, other in zip(values, batch, strict=True)):
            return batch
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _of_kind(batch: Mapping[Any, Any], fields: dict[Any, Any]) -> Any:
    """``fields`` as a mapping like ``batch``, such as Transformers' BatchEncoding with its attributes; a dict if it cannot be."""
    try:
        return type(batch)(fields)  # type: ignore[call-arg]
    except TypeError:
        return fields
