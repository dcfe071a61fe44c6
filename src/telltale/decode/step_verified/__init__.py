"""SpecGuard and its relatives: steps drafted by one model, verified by signals, redone by another (arXiv 2604.15244)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from telltale.decode.step_verified.config import StepVerifiedConfig, paper
from telltale.decode.step_verified.decoder import StepVerified
from telltale.decode.step_verified.encoders import register_encoder
from telltale.decode.step_verified.engine import StepEngine
from telltale.decode.step_verified.normalising import Normaliser, Scale
from telltale.decode.step_verified.records import StepRecord, StepVerifiedResult, StepVerifiedStatistics
from telltale.decode.step_verified.scoring import Step

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
