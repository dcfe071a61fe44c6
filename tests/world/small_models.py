"""Small models with known answers, and what the tests of the wing share."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    """z' = A z + B u, in double precision."""

    def __init__(self, width=3, actions=2, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(0.6 * torch.randn(width, width, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(width, actions, generator=generator, dtype=torch.float64))

    def step(self, belief, action):
        return belief @ self.a.T + action @ self.b.T


class Noisy(Linear):
    """The same with noise from the global generator, which nobody passes in."""

    def step(self, belief, action):
        return super().step(belief, action) + torch.randn_like(belief)


class Deaf(Noisy):
    """Noise, and no action."""

    def step(self, belief, action):
        return belief @ self.a.T + torch.randn_like(belief)


class Seeded(Linear):
    """Noise from the generator of the protocol."""

    def step(self, belief, action, *, generator=None):
        return super().step(belief, action) + torch.randn(belief.shape, generator=generator, dtype=belief.dtype)
