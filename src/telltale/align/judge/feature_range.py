"""Where the features lie that a judge was fitted on, and whether a new response lies there, too.

A judge extrapolates linearly, and a policy that is trained against it finds where that pays. So a fit keeps the mean of its
responses' features, their largest principal directions with the spread along each, and the spread across the rest. The distance
of a response is its mean squared deviation in these units, and the limit is the distance that one in a hundred responses to
held-out prompts has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from telltale.errors import DataError

DIRECTIONS = 32
OUTSIDE = 0.01
"""Share of responses to held-out prompts that lie beyond the limit."""
ROWS = 4096
"""Responses that the range is fitted on, at most."""


class FeatureRange(nn.Module):
    """The range of features (d,); ``directions`` of them have a spread of their own."""

    mean: Tensor
    directions: Tensor
    spread: Tensor
    rest: Tensor
    limit: Tensor

    def __init__(self, size: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(directions, size))
        self.register_buffer("spread", torch.ones(directions))
        self.register_buffer("rest", torch.ones(1))
        self.register_buffer("limit", torch.full((1,), torch.inf))

    @classmethod
    def fitted(cls, inside: Tensor, held_out: Tensor, *, seed: int = 0) -> FeatureRange:
        """From the features ``inside`` (n, d), with the limit from those of other prompts ``held_out`` (m, d).

        Raises :class:`~telltale.errors.DataError` for fewer than three rows to fit on, or none to set the limit by.
        """
        if len(inside) < 3 or not len(held_out):
            raise DataError(f"{len(inside)} and {len(held_out)} rows of features; expected three and one at least.")
        mean = inside.float().mean(0)
        centred = inside.float() - mean
        count = min(DIRECTIONS, *centred.shape, len(inside) // 4 + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, values, columns = torch.svd_lowrank(centred, q=min(count + 8, *centred.shape))
        found = cls(inside.shape[1], count)
        variance = values[:count].square() / (len(inside) - 1)
        left = (centred.square().sum() / (len(inside) - 1) - variance.sum()).clamp_min(0.0)
        # A spread of nothing would make any rounding infinitely far.
        least = 1e-6 * variance.max().clamp_min(1e-12)
        found.mean.copy_(mean)
        found.directions.copy_(columns[:, :count].T)
        found.spread.copy_(variance.clamp_min(least).sqrt())
        found.rest.copy_(left.clamp_min(least))
        found.limit.copy_(found.distance(held_out).quantile(1.0 - OUTSIDE))
        return found

    @torch.no_grad()
    def distance(self, hidden: Tensor) -> Tensor:
        """Mean squared deviation of features (n, d) along the directions and across them, (n,), float32: near 1 inside."""
        centred = hidden.float() - self.mean
        along = centred @ self.directions.T
        across = (centred.square().sum(-1) - along.square().sum(-1)).clamp_min(0.0) / self.rest
        return ((along / self.spread).square().sum(-1) + across) / (len(self.spread) + 1)

    def outside(self, hidden: Tensor) -> Tensor:
        """Whether features (n, d) lie beyond the limit, (n,)."""
        return self.distance(hidden) > self.limit
