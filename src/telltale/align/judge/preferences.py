"""Pairs of a better and a worse response as features, and how they are split: by prompt, never by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.configuration import check_range
from telltale.errors import DataError


@dataclass(frozen=True)
class PairFeatures:
    """n pairs: hidden states of the chosen and the rejected response and of their prompt, and the prompt's id."""

    chosen: Tensor
    """(n, d)."""
    rejected: Tensor
    """(n, d)."""
    prompts: Tensor
    """(n, prompt size)."""
    groups: Tensor
    """(n,) int64: pairs of one prompt have one id."""
    dropped: int = 0
    """Pairs that were left out because both responses are the same text."""

    def __post_init__(self) -> None:
        count = len(self.groups)
        if self.groups.ndim != 1 or not count or self.chosen.shape != self.rejected.shape:
            raise DataError(
                f"chosen {tuple(self.chosen.shape)}, rejected {tuple(self.rejected.shape)} and groups "
                f"{tuple(self.groups.shape)} are no pairs; expected (n, d), (n, d) and (n,) with n >= 1."
            )
        if len(self.chosen) != count or len(self.prompts) != count:
            raise DataError(
                f"{len(self.chosen)} responses and {len(self.prompts)} prompts for {count} pairs; expected equal."
            )
        for name in ("chosen", "rejected", "prompts"):
            bad = (~torch.isfinite(getattr(self, name))).reshape(count, -1).any(1).nonzero()[:, 0]
            if len(bad):
                raise DataError(
                    f"pair {int(bad[0])} has a feature that is NaN or infinite in {name}; expected finite features."
                )

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: Tensor) -> PairFeatures:
        """The pairs ``rows`` (indices or a mask)."""
        return PairFeatures(self.chosen[rows], self.rejected[rows], self.prompts[rows], self.groups[rows])

    def split(self, held_out: float, *, seed: int) -> tuple[PairFeatures, PairFeatures]:
        """Two parts without a common prompt; about ``held_out`` of the prompts are in the second.

        Raises :class:`~telltale.errors.DataError` for a single prompt.
        """
        check_range("held_out", held_out, low=0.0, high=1.0)
        second = held_out_rows(self.groups, held_out, seed=seed)
        return self.take(~second), self.take(second)

    def distinct(self) -> PairFeatures:
        """Without pairs whose responses have the very same features: the same text twice says nothing."""
        same = (self.chosen == self.rejected).all(1)
        if bool(same.all()):
            raise DataError("both responses are the same in every pair; expected pairs that differ.")
        kept = self.take(~same)
        return PairFeatures(kept.chosen, kept.rejected, kept.prompts, kept.groups, self.dropped + int(same.sum()))


def held_out_rows(groups: Tensor, share: float, *, seed: int) -> Tensor:
    """Mask (n,) of the rows whose prompt is held out; at least one prompt stands on either side."""
    unique, where = groups.unique(return_inverse=True)
    if len(unique) < 2:
        raise DataError("all rows belong to one prompt; expected several prompts, so that some can be held out.")
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    chosen = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))[:count]
    mask = torch.zeros(len(unique), dtype=torch.bool)
    mask[chosen] = True
    return mask[where]
