"""Whether a version that was active before should act again: the parent by the stream, for a while after a promotion; any earlier
one by the gate's own evidence after an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from telltale.world.evolve.gates import Gain, GateConfig, gain_of

ALPHA = 0.001
"""Error of one comparison; there is one a round."""
FEWEST = 8
"""Episodes of the stream that are compared, the newest ones; a round that has more is taken whole."""
HALF = 0.5
"""An earlier version comes back where it has less than this share of the active one's error."""


def newest_pairs(known: Sequence[list[float]], ours: Tensor, theirs: Tensor, episodes: Tensor) -> list[list[float]]:
    """Errors (active, parent) of the newest episodes: those ``known``, and those of a round by transition (N,)."""
    fresh = [[float(side[episodes == e].mean()) for side in (ours, theirs)] for e in episodes.unique()]
    return [*known, *fresh][-max(FEWEST, len(fresh)) :]


def parent_gain(pairs: Sequence[list[float]], config: GateConfig) -> Gain:
    """What the parent predicts better."""
    both = torch.tensor(pairs, dtype=torch.float64)
    return gain_of(
        both[:, 0], both[:, 1], torch.arange(len(both)), alpha=ALPHA, margin=config.margin, floor=config.floor
    )


def best_earlier(
    ours: Tensor, others: Mapping[str, Tensor], episodes: Tensor, config: GateConfig
) -> tuple[float, str] | None:
    """(share of the error that goes, version) of the one among ``others`` (errors by transition) that explains the same evidence as
    the active version does not; None where none does."""
    found = {
        name: gain_of(ours, theirs, episodes, alpha=ALPHA, margin=HALF, floor=config.floor)
        for name, theirs in others.items()
    }
    return max(((gain.relative, name) for name, gain in found.items() if gain.low > 0), default=None)
