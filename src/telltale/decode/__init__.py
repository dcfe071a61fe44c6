"""Decoders: the plain loop, LayerSkip's self-speculation (the same output in fewer passes), and SpecGuard's verified steps."""

from __future__ import annotations

from telltale.decode.decoders import Autoregressive, SelfSpeculative
from telltale.decode.hf_generate import custom_generate
from telltale.decode.results import DecodeResult
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig

__all__ = [
    "Autoregressive",
    "DecodeResult",
    "SelfSpeculative",
    "StepVerified",
    "StepVerifiedConfig",
    "custom_generate",
]
