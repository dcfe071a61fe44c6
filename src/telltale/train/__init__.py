"""Training that leaves a signal behind: the plain loop, the LayerSkip recipe that plugs into it, pipelines, sharpness."""

from __future__ import annotations

import importlib
from typing import Any

from telltale.train.loop import TrainResult, train
from telltale.train.run_config import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "train"]

_PACKAGES = ("layerskip", "pipeline", "sharpness")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"telltale.train.{name}")
    raise AttributeError(f"module 'telltale.train' has no attribute {name!r}")
