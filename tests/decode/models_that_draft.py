"""Tiny models whose early layers predict the last one sometimes: random weights, late layers scaled down."""

from __future__ import annotations

import random

import torch
from transformers import LlamaForCausalLM

from telltale.models.draft_exits import BIASES, NORMS, READS, DraftExit, DraftExits
from telltale.models.presets import build

LATE = (1, 3)
"""Layers whose values the draft exits read."""


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


def exits_for(model, *, layers=(1, 2), noise=0.05, keep=3) -> DraftExits:
    """Exits that read the state as the final norm does, and a little of the late values: right as often as plain exits are, on
    two of ``keep`` tokens of the vocabulary."""
    config = model.config
    hidden, late = config.hidden_size, len(LATE) * config.num_key_value_heads * config.head_dim
    generator = torch.Generator().manual_seed(3)
    shapes = {"state": (hidden, hidden), "gate": (24, hidden), "up": (24, hidden), "down": (hidden, 24)}
    shapes |= dict.fromkeys(READS, (hidden, late)) | dict.fromkeys((*BIASES, *NORMS), (hidden,))
    found = {}
    for layer in layers:
        weights = {name: noise * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        weights["state"] += torch.eye(hidden)
        for name in ("state_norm", "mlp_norm"):
            weights[name] += 1.0
        weights["norm"] += model.model.norm.weight.detach().float()
        found[layer] = DraftExit(layer, weights)
    tokens = torch.arange(config.vocab_size)
    return DraftExits(found, LATE, tokens[tokens % keep > 0], "", {})


def random_prompt(seed: int, length: int, vocabulary_size: int = 64) -> list[int]:
    """``length`` token ids drawn from ``seed``."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary_size) for _ in range(length)]
