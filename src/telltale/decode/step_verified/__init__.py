"""SpecGuard and its relatives: steps drafted by one model, verified by signals, redone by another (arXiv 2604.15244)."""

from __future__ import annotations

from telltale.decode.step_verified.config import StepVerifiedConfig, paper
from telltale.decode.step_verified.decoder import StepVerified
from telltale.decode.step_verified.encoders import register_encoder
from telltale.decode.step_verified.engine import StepEngine
from telltale.decode.step_verified.normalising import Normaliser, Scale
from telltale.decode.step_verified.records import StepRecord, StepVerifiedResult, StepVerifiedStatistics
from telltale.decode.step_verified.scoring import Step

__all__ = [
    "Normaliser",
    "Scale",
    "Step",
    "StepEngine",
    "StepRecord",
    "StepVerified",
    "StepVerifiedConfig",
    "StepVerifiedResult",
    "StepVerifiedStatistics",
    "paper",
    "register_encoder",
]
