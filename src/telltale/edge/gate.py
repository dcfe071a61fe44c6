"""The gate: answer at the edge if its model is sure, offload if not. NumPy only; no PyTorch.

Accuracy is always told apart for kept and offloaded images: easy images that stay hide that offloading can hurt the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telltale.config import check_choice
from telltale.errors import ConfigError, NumericalError

Array = np.ndarray
KINDS = {"min_entropy": 1.0, "entropy": 1.0, "margin": 0.5}
"""Kinds of gate and their default thresholds."""


@dataclass(frozen=True)
class Gate:
    """Offload an image iff its uncertainty is at least ``threshold``.

    min_entropy (the paper's): u = -log2 max_c p_c, bits; threshold 1 offloads what has max p <= 1/2. entropy:
    u = -sum_c p_c log2 p_c, bits. margin: u = 1 - (p_first - p_second), 0 to 1. threshold None: 1 bit, for the margin 0.5.
    """

    kind: str = "min_entropy"
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_choice("gate", self.kind, KINDS)
        if self.threshold is None:
            object.__setattr__(self, "threshold", KINDS[self.kind])
        elif (
            isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold >= 0
        ):
            raise ConfigError(
                f"threshold={self.threshold!r} is not allowed; expected a number >= 0 (bits, or 1 - margin)."
            )

    def uncertainty(self, probabilities: Array) -> Array:
        """Uncertainty (batch,) of probabilities (batch, classes). Raises NumericalError if they are not finite."""
        values = np.asarray(probabilities, dtype=np.float64)
        if not np.isfinite(values).all():
            raise NumericalError(
                "the edge model gave probabilities that are not finite; check the checkpoint and the image."
            )
        if self.kind == "min_entropy":
            return -np.log2(np.maximum(values.max(axis=-1), 1e-300)) + 0.0
        if self.kind == "entropy":
            return -(values * np.log2(np.maximum(values, 1e-300))).sum(axis=-1) + 0.0
        if values.shape[-1] < 2:
            return np.zeros(values.shape[:-1])
        ordered = np.partition(values, -2, axis=-1)
        return 1.0 - (ordered[..., -1] - ordered[..., -2])

    def offloads(self, probabilities: Array) -> Array:
        """Whether each image (batch,) is offloaded: uncertainty >= threshold."""
        return self.uncertainty(probabilities) >= self.threshold


@dataclass(frozen=True)
class GatedAccuracy:
    """Counts of right answers among kept and offloaded images; accuracies are derived, never averaged from accuracies."""

    kept: int
    kept_right: int
    offloaded: int
    offloaded_right: int
    offloaded_right_at_edge: int

    @property
    def overall(self) -> float:
        """(right kept + right offloaded) / all."""
        return (self.kept_right + self.offloaded_right) / max(1, self.kept + self.offloaded)

    @property
    def edge_only(self) -> float:
        """The same had nothing been offloaded."""
        return (self.kept_right + self.offloaded_right_at_edge) / max(1, self.kept + self.offloaded)


def gated_accuracy(offloaded: Array, right_at_edge: Array, right_after: Array) -> GatedAccuracy:
    """Counts from booleans (images,): which were offloaded, where the edge is right, where the final answer is right."""
    away, edge, after = (np.asarray(values, dtype=bool) for values in (offloaded, right_at_edge, right_after))
    return GatedAccuracy(
        kept=int((~away).sum()),
        kept_right=int((edge & ~away).sum()),
        offloaded=int(away.sum()),
        offloaded_right=int((after & away).sum()),
        offloaded_right_at_edge=int((edge & away).sum()),
    )
