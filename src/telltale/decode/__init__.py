"""Decoders: the plain loop, and LayerSkip's self-speculation, which gives the same output in fewer passes."""

from __future__ import annotations

from telltale.decode.autoregressive import Autoregressive
from telltale.decode.huggingface import custom_generate
from telltale.decode.result import DecodeResult
from telltale.decode.self_speculative import SelfSpeculative

__all__ = ["Autoregressive", "DecodeResult", "SelfSpeculative", "custom_generate"]
