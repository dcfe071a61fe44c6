"""The seams to model families: local checkpoints, the layerwise view of a decoder, its cache, small presets."""

from __future__ import annotations

from telltale.models.cache import Cache
from telltale.models.decoder import Decoder, open_decoder
from telltale.models.loading import load, load_model, load_tokenizer

__all__ = ["Cache", "Decoder", "load", "load_model", "load_tokenizer", "open_decoder"]
