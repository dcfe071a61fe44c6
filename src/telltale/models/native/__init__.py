"""The native decoder step: one small C++ source, compiled on first use, that runs Llama-like layers at memory speed."""

from __future__ import annotations

from telltale.models.native.engine import NativeDecoder, native_unavailable_reason

__all__ = ["NativeDecoder", "native_unavailable_reason"]
