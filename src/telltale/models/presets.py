"""The small Llama-family models of the embedded defaults, randomly initialised from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from telltale.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Shape of a small Llama with a tied head, and the vocabulary size that suits it."""

    description: str
    layers: int
    hidden_size: int
    feed_forward_size: int
    heads: int
    vocabulary_size: int
    learning_rate: float
    """What trained it best in our runs; a from-scratch run with layer dropout wants a high one (paper, Table 9)."""


PRESETS: dict[str, Preset] = {
    "nano": Preset("for tests: 4 layers, 0.2M parameters", 4, 64, 176, 4, 512, 3e-3),
    "tiny": Preset("the tour's model: 8 layers, 1.7M parameters", 8, 128, 352, 4, 1024, 3e-3),
    "small": Preset("24 layers, 44M parameters", 24, 384, 1024, 6, 4096, 1e-3),
}


def build(
    name: str, *, vocabulary_size: int | None = None, seed: int = 0, max_positions: int = 2048, **overrides: Any
) -> LlamaForCausalLM:
    """A freshly initialised ``LlamaForCausalLM`` of preset ``name``.

    ``overrides`` are ``LlamaConfig`` fields. The global random state is left as it was.
    Raises :class:`~telltale.errors.ConfigError` for an unknown preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} is unknown; expected one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    fields: dict[str, Any] = {
        "vocab_size": vocabulary_size or preset.vocabulary_size,
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.feed_forward_size,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
    return model.eval()
