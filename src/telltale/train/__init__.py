"""Training that leaves a signal behind: the plain loop, and the LayerSkip recipe that plugs into it."""

from __future__ import annotations

from telltale.train.config import TrainConfig
from telltale.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
