"""The plain loop, one token per pass of the whole model: the floor that every other decoder is measured against.

A greedy single row is decoded in blocks, one call into the backend each, so that no Python stands between two tokens.
"""

from __future__ import annotations

from telltale.decode.generation import Decoding, Rounds, Run, plain_rounds
from telltale.decode.result import DecodeStatistics


class Autoregressive(Decoding):
    """Token by token through all layers. ``model``: a Hugging Face causal LM, or a decoder already opened."""

    def _statistics(self) -> DecodeStatistics:
        return DecodeStatistics()

    def _continue(self, run: Run, block: int) -> Rounds:
        return plain_rounds(run, block)
