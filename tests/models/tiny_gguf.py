"""A tiny ``.gguf`` file, written with the ``gguf`` package from a seeded model: its weights, and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

from models.tiny_models import tiny_model

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TOKENS = [*sorted(ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES), "<|im_start|>", "<|im_end|>"]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, *, split: str = "qwen2", kind: str = "gpt2", in_8_bits: bool = False, **more: Any) -> Any:
    """Write ``path`` and return the model whose weights are in it, in float32. ``in_8_bits``: its matrices are Q8_0, and the model
    has what they were made from."""
    import gguf

    shape = {"intermediate_size": 64} if in_8_bits else {}
    model = tiny_model("qwen2", vocab_size=len(TOKENS), tie_word_embeddings=False, **shape)
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, tensor in model.state_dict().items():
        numbers = tensor.to(torch.float32).numpy()
        if in_8_bits and numbers.ndim == 2:
            kind_of_8_bits = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_renamed(name), gguf.quants.quantize(numbers, kind_of_8_bits), raw_dtype=kind_of_8_bits)
        else:
            writer.add_tensor(_renamed(name), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _renamed(name: str) -> str:
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        if name.startswith(ours):
            return name.replace(ours, theirs)
    _, _, layer, rest = name.split(".", 3)
    part, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"
