"""The peers, each at its best settings: Transformers' own generate in its four greedy forms.

Each function returns the new tokens of one prompt (1-D tensor). ``early_exit`` uses a constant draft length and no
confidence threshold, so that it drafts exactly what our decoder drafts at the same exit layer and draft length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


def plain(model: Any, prompt: Tensor, *, new_tokens: int) -> Tensor:
    """Transformers' greedy ``generate`` with its dynamic cache, the faster of its caches on CPU without compiling."""
    return _generate(model, prompt, new_tokens)


def early_exit(model: Any, prompt: Tensor, *, new_tokens: int, exit_layer: int, draft_length: int) -> Tensor:
    """``generate(assistant_early_exit=E)``."""
    drafting = {
        "num_assistant_tokens": draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return _generate(model, prompt, new_tokens, drafting, assistant_early_exit=exit_layer)


def prompt_lookup(model: Any, prompt: Tensor, *, new_tokens: int, draft_length: int, ngram: int = 2) -> Tensor:
    """``generate(prompt_lookup_num_tokens=d)``: drafts copied from the context."""
    drafting = {"prompt_lookup_num_tokens": draft_length, "max_matching_ngram_size": ngram}
    return _generate(model, prompt, new_tokens, drafting)


def _generate(
    model: Any, prompt: Tensor, new_tokens: int, settings: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    ids = prompt.view(1, -1)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True, **(settings or {})
    )
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **options)
    return output[0, ids.shape[1] :]
