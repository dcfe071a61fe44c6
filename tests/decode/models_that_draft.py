"""Tiny models whose early layers predict the last one sometimes: random weights, late layers scaled down."""

from __future__ import annotations

import random

import torch
from transformers import LlamaForCausalLM

from telltale.models.presets import build


def drafting_model(seed: int = 0, *, vocabulary_size: int = 64, late: float = 0.3, **overrides) -> LlamaForCausalLM:
    """A 4-layer Llama with varied output; its layers 2 and 3 add little, so exits are often, not always, right."""
    model = build("nano", seed=seed, vocabulary_size=vocabulary_size, tie_word_embeddings=False, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            parameter.mul_(5.0)
            if any(f"layers.{index}." in name for index in (2, 3)) and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(late)
    return model


def random_prompt(seed: int, length: int, vocabulary_size: int = 64) -> list[int]:
    """``length`` token ids drawn from ``seed``."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary_size) for _ in range(length)]
