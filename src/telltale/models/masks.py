"""Attention masks made from positions alone: slot s is visible to position p iff p - w < s <= p, in its own row."""

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


def packed_slots(
    positions: Sequence[int],
    cuts: Sequence[int],
    width: int,
    own: int,
    *,
    group: int,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Which slots each token sees when ``group`` rows with a common prefix stand side by side as one sequence.

    ``positions[b]`` is the position of row b's first token of ``width``, ``cuts[b]`` that of its first own slot. The slots are
    the prefix up to the largest cut, then ``own`` of each row. Returns a bool mask (len(positions) / group, 1,
    group * width, slots), True where visible, or None if every token sees every slot.
    """
    prefix, last = max(cuts), positions[0] + width - 1
    alone = group == width == 1 and len(set(zip(positions, cuts, strict=True))) == 1 and last - cuts[0] + 1 == own
    if alone and (window is None or last < window):
        return None
    cut = torch.tensor(cuts, device=device).view(-1, group, 1, 1)
    place = torch.tensor(positions, device=device).view(-1, group, 1, 1) + torch.arange(width, device=device).view(
        -1, 1
    )
    slots = torch.arange(prefix, device=device)
    shared = (slots < cut).expand(-1, -1, width, -1)
    own_slots = (cut + torch.arange(own, device=device)).view(-1, 1, 1, group, own)
    mine = torch.eye(group, dtype=torch.bool, device=device).view(1, group, 1, group, 1)
    branch = mine & (own_slots <= place.unsqueeze(-1))
    if window is not None:
        shared = shared & (slots > place - window)
        branch = branch & (own_slots > place.unsqueeze(-1) - window)
    return torch.cat([shared, branch.flatten(3)], -1).flatten(1, 2).unsqueeze(1)
