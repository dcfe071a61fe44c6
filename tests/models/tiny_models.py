"""A tiny random model of every supported family, the awkward options switched on."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 97}
LLAMA_SHAPE = SHAPE | {
    "intermediate_size": 56,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA_SHAPE | {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", LLAMA_SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", LLAMA_SHAPE | {"sliding_window": 5}),
    "qwen2": ("Qwen2", LLAMA_SHAPE),
    "qwen2-window": ("Qwen2", LLAMA_SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", LLAMA_SHAPE | {"head_dim": 16}),
    "gemma": ("Gemma", LLAMA_SHAPE | {"head_dim": 16}),
    "phi3": ("Phi3", LLAMA_SHAPE | {"sliding_window": None, "original_max_position_embeddings": 128}),
    "phi3-partial": (
        "Phi3",
        LLAMA_SHAPE | {"sliding_window": 6, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5},
    ),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "vocab_size": 97,
            "n_positions": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        SHAPE
        | {
            "intermediate_size": 56,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}
LLAMA_LIKE = [name for name in CONFIGS if not name.startswith("gpt")]
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "sdpa", **overrides: Any
) -> Any:
    """A seeded random model in eval mode whose weights are large enough to make its predictions vary."""
    family, fields = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**(fields | overrides))
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _HEADS.get(family, f"{family}ForCausalLM"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def counted(cache: Any, lengths: int | list[int]) -> None:
    """Have so many tokens of each row of a cache count."""
    for row in range(cache.batch):
        cache.truncate(row, lengths if isinstance(lengths, int) else lengths[row])
