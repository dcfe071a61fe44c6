"""Poisoned evidence: the attack that gates are measured with. Actions are recorded as others than were taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from telltale.config import check_range, check_seed
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World


def poisoned(transitions: Transitions, world: World, *, share: float = 0.5, seed: int = 0) -> Transitions:
    """The transitions with ``share`` of the actions flipped: a continuous one to the other side of its range, a discrete one to
    another one, drawn by ``seed``."""
    check_range("share", share, low=0.0, high=1.0)
    generator = torch.Generator().manual_seed(check_seed(seed))
    chosen = torch.randperm(len(transitions), generator=generator)[: round(share * len(transitions))]
    actions: Any = transitions.actions.clone()
    if world.discrete:
        shift = torch.randint(1, max(2, world.action_width), (len(chosen),), generator=generator)
        actions[chosen] = (actions[chosen] + shift) % world.action_width
    else:
        low, high = (
            torch.as_tensor(b, dtype=actions.dtype).reshape(-1)
            for b in (world.action_space.low, world.action_space.high)
        )
        actions[chosen] = low + high - actions[chosen]
    return replace(transitions, actions=actions)
