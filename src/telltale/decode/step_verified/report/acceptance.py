"""The acceptance curve: as the threshold falls, how many drafted steps are accepted, and how many of these are wrong.

Over recorded steps, so with the prefixes they were recorded on; what happens at a threshold that the policy is then run at is for
:mod:`telltale.decode.step_verified.report.frontier`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telltale.decode.step_verified.report.signals import StepTable

POINTS = 40
"""Points of a curve that has more."""


@dataclass(frozen=True)
class AcceptancePoint:
    """Accepting what scores ``threshold`` or more: shares of the recorded steps."""

    threshold: float
    accepted: float
    accepted_and_wrong: float
    wrong_among_accepted: float
    right_steps_accepted: float
    """Of the right steps; 0 if there is none."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)


def acceptance_curve(
    scores: NDArray[np.float64], right: NDArray[np.bool_], *, points: int = POINTS
) -> list[AcceptancePoint]:
    """At most ``points`` points from the strictest threshold to the laxest; equal scores are accepted together."""
    order = np.argsort(-scores, kind="stable")
    ordered, labels = scores[order], right[order]
    # The last of equal scores: accepting one of them accepts all.
    ends = np.flatnonzero(np.diff(ordered, append=-np.inf) != 0)
    if len(ends) > points:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, points).round().astype(int))]
    good = np.cumsum(labels)
    total, all_good = len(scores), int(labels.sum())
    found = []
    for end in ends:
        accepted = int(end) + 1
        wrong = accepted - int(good[end])
        found.append(
            AcceptancePoint(
                threshold=float(ordered[end]),
                accepted=accepted / total,
                accepted_and_wrong=wrong / total,
                wrong_among_accepted=wrong / accepted,
                right_steps_accepted=int(good[end]) / all_good if all_good else 0.0,
            )
        )
    return found


def acceptance_curves(table: StepTable) -> dict[str, list[AcceptancePoint]]:
    """The curve of every signal of ``table``."""
    return {name: acceptance_curve(values, table.right) for name, values in table.signals.items()}
