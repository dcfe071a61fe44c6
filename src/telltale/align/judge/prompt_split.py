"""One split of all prompts that every stage of a fit takes: to train on, to stop by, to compare on.

A figure of a fit is worth something only on prompts that no stage has seen: neither the ridge regressions nor lambda, the gate, its
early stopping, or a calibration. So ids of prompts are divided once, across ratings, reference and preferences, and a part is asked
for by id. Responses to one prompt are always in one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.config import check_range
from telltale.errors import DataError

TRAIN, STOP, COMPARE = range(3)
PARTS = ("train", "stop", "compare")


@dataclass(frozen=True)
class PromptSplit:
    """Ids of the prompts to stop by and to compare on, sorted; all others are to train on."""

    stop: Tensor
    compare: Tensor

    def part_of(self, groups: Tensor) -> Tensor:
        """Of prompt ids (n,): ``TRAIN``, ``STOP`` or ``COMPARE``, (n,)."""
        found = torch.full(groups.shape, TRAIN, dtype=torch.long)
        found[torch.isin(groups, self.stop)] = STOP
        found[torch.isin(groups, self.compare)] = COMPARE
        return found


def split_prompts(preferences: Tensor, others: Sequence[Tensor], share: float, *, seed: int) -> PromptSplit:
    """Divide the prompt ids of ``preferences`` (n,) and of ``others``, such as those of the ratings.

    About ``share`` of the prompts are to compare on, and as large a part of the rest to stop by. Prompts that have both
    preferences and ratings, or one of them alone, are divided apart, so that each part has its share of either.
    Raises :class:`~telltale.errors.DataError` for preferences of fewer than three prompts.
    """
    check_range("share", share, low=0.0, high=1.0)
    preferred = preferences.unique()
    if len(preferred) < 3:
        raise DataError(
            f"the preferences belong to {len(preferred)} prompt{'s' * (len(preferred) > 1)}; expected at least three, to train "
            f"on, to stop by and to compare on."
        )
    other = torch.cat([groups.reshape(-1) for groups in others]).unique() if others else preferred[:0]
    both, alone = preferred[torch.isin(preferred, other)], preferred[~torch.isin(preferred, other)]
    generator = torch.Generator().manual_seed(seed)
    strata = [both, alone] if len(both) >= 3 and len(alone) >= 3 else [preferred]
    strata.append(other[~torch.isin(other, preferred)])
    stop, compare = [], []
    for prompts in strata:
        order = prompts[torch.randperm(len(prompts), generator=generator)]
        if len(prompts) < 3:
            continue
        first = min(max(1, round(share * len(order))), len(order) - 2)
        second = min(max(1, round(share * (len(order) - first))), len(order) - first - 1)
        compare.append(order[:first])
        stop.append(order[first : first + second])
    return PromptSplit(torch.cat(stop).sort().values, torch.cat(compare).sort().values)
