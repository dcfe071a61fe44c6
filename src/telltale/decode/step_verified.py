"""SpecGuard and its relatives: steps drafted by one model, verified by signals, redone by another (arXiv 2604.15244)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from telltale.decode.decoders import StepVerified
from telltale.decode.engine import Engine as StepEngine
from telltale.decode.results import StepRecord, StepVerifiedResult, StepVerifiedStatistics
from telltale.decode.step_config import Normaliser, Scale, StepVerifiedConfig, paper
from telltale.decode.steps import register_encoder
from telltale.decode.verification import Step

if TYPE_CHECKING:
    from telltale.decode.calibration.calibrate import calibrate
    from telltale.decode.calibration.calibration import Calibration

_ON_USE = {
    "Calibration": "telltale.decode.calibration.calibration",
    "calibrate": "telltale.decode.calibration.calibrate",
}
"""Names whose modules bring SciPy's statistics, which decoding does not need."""

__all__ = [
    "Calibration",
    "Normaliser",
    "Scale",
    "Step",
    "StepEngine",
    "StepRecord",
    "StepVerified",
    "StepVerifiedConfig",
    "StepVerifiedResult",
    "StepVerifiedStatistics",
    "calibrate",
    "paper",
    "register_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(importlib.import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
