"""The largest eigenvalue of an operator that changes a little between two looks, with an error bar, for a few products.

Each look is a short Lanczos run that starts from the last look's top Ritz vector; the residual of a Ritz pair bounds how far the
nearest eigenvalue is. A little noise keeps directions reachable that the last vector does not contain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.configuration import check_integer
from telltale.signals.hessian import Operator, vector_like
from telltale.signals.lanczos import lanczos

NOISE = 0.05
"""Length of the noise added to a warm start of length 1."""


@dataclass(frozen=True)
class Extreme:
    """Largest and smallest Ritz value; an eigenvalue lies within ``error`` of the largest."""

    largest: float
    error: float
    smallest: float
    matvecs: int


class ExtremeTracker:
    """``steps`` products a look when warm, ``cold_steps`` at the first one; noise and first start from ``seed``."""

    def __init__(self, *, steps: int = 6, cold_steps: int = 12, seed: int = 0) -> None:
        check_integer("steps", steps, low=2)
        check_integer("cold_steps", cold_steps, low=2)
        self.steps, self.cold_steps = steps, cold_steps
        self._generator = torch.Generator().manual_seed(seed)
        self._vector: Tensor | None = None
        self._scale: Tensor | None = None

    @property
    def warm(self) -> bool:
        """Whether the next look starts from the last one's vector."""
        return self._vector is not None

    def look(self, operator: Operator, *, scale: Tensor | None = None) -> Extreme:
        """The extremes of ``operator`` now. ``scale`` (N,): S where the operator is S H S; the warm vector follows it."""
        noise = torch.randn(operator.size, generator=self._generator).to(vector_like(operator))
        start, steps = noise, self.cold_steps
        vector = self._moved(scale)
        length = 0.0 if vector is None or vector.numel() != operator.size else float(vector.norm())
        if vector is not None and 0.0 < length < math.inf:
            start = vector / length + noise * (NOISE / noise.norm())
            steps = self.steps
        run = lanczos(operator, start, steps)
        top = int(run.nodes.argmax())
        self._vector = run.vectors(torch.tensor([top]))[0]
        self._scale = None if scale is None else scale.clone()
        return Extreme(float(run.nodes[top]), float(run.residuals[top]), float(run.nodes.min()), run.matvecs)

    def forget(self) -> None:
        """Start cold at the next look."""
        self._vector = self._scale = None

    def _moved(self, scale: Tensor | None) -> Tensor | None:
        """The last vector in today's coordinates: along a steady direction d of H it is S d."""
        if self._vector is None or scale is None or self._scale is None or self._scale.shape != scale.shape:
            return self._vector
        ratio = torch.where(self._scale > 0, scale / self._scale, torch.zeros_like(scale))
        return self._vector * ratio.to(self._vector)
