"""A random target and a smaller random draft that share a word-level tokenizer in which every eighth word ends a step."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.tiny_models import tiny_model

WORDS = 97
EOS = 96


def word(index: int) -> str:
    if index == EOS:
        return "<eos>"
    return f"w{index}.\n\n" if index % 8 == 7 else f"w{index}"


def tokenizer():
    backend = Tokenizer(models.WordLevel({word(index): index for index in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def target(name: str = "llama", **overrides):
    return tiny_model(name, seed=1, **overrides)


def draft(name: str = "llama", **overrides):
    return tiny_model(name, seed=2, **({"num_hidden_layers": 3} | overrides))


def prompts(count: int, *, seed: int = 0, lengths=(3, 9, 5, 1, 7, 12, 2, 6)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS - 1, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(count)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(result) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(result.tokens, result.lengths, strict=True)]
