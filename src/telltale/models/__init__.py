"""The seams to model families: local checkpoints, the layerwise view of a decoder, its cache, small presets."""

from __future__ import annotations

from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.loading import load, load_model, load_tokenizer
from telltale.models.open import open_decoder

__all__ = ["Cache", "Decoder", "load", "load_model", "load_tokenizer", "open_decoder"]
