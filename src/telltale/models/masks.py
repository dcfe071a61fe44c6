"""Attention masks made from positions alone: slot s is visible to position p iff p - w < s <= p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible_slots(
    positions: Sequence[int], width: int, *, window: int | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """Which cache slots each token sees, and how many slots there are to read.

    ``positions[b]`` is the position of row b's first token of ``width``. Returns a bool mask (batch, 1, width, length),
    True where visible, or None if every token sees every slot; and the length, last position + 1.
    """
    length = max(positions) + width
    alone = width == 1 and min(positions) == max(positions)
    if alone and (window is None or length <= window):
        return None, length
    place = torch.tensor(positions, device=device).view(-1, 1) + torch.arange(width, device=device)
    slots = torch.arange(length, device=device)
    mask = slots <= place.unsqueeze(-1)
    if window is not None:
        mask &= slots > place.unsqueeze(-1) - window
    return mask.unsqueeze(1), length


def is_whole_prompt(positions: Sequence[int], length: int, width: int, window: int | None) -> bool:
    """Whether the pass is an ordinary causal one from position 0 on, which kernels know without a mask."""
    return length == width and max(positions) == 0 and (window is None or length <= window)
