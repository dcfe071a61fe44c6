"""A quadratic whose curvatures are given, so that its critical step is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bowl(nn.Module):
    def __init__(self, curvatures: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float64))


def quadratic(model: Any, batch: Any) -> Tensor:
    return 0.5 * (model.curvatures * model.weight.square()).sum()
