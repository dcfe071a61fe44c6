"""Where the newest tokens look: rows of the attention matrix, computed for these tokens and these layers alone.

Fused attention kernels never give their weights away. The queries of a few tokens are cheap to make again from the
state that entered the layer, and the keys stand in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError
from telltale.models.cache import Cache
from telltale.models.masks import visible_slots


def attention_rows(
    decoder: Any, layer: int, entering: Tensor, cache: Cache, positions: Sequence[int], *, prefill: bool = False
) -> Tensor:
    """softmax(scale * q k) of one layer, (batch, heads, width, length), float32; scale is 1 / sqrt(head dim) as a rule.

    ``entering``: the states that entered the layer, (batch, width, hidden), after the layer has written its keys.
    """
    width = entering.shape[1]
    with torch.inference_mode():
        queries = _queries(decoder, layer, entering, positions, prefill=prefill)
        mask, length = visible_slots(positions, width, window=decoder.windows[layer], device=decoder.device)
        keys, _ = cache.read(layer, length)
        keys = keys.repeat_interleave(decoder.heads // decoder.kv_heads, 1)
        scores = queries.float() @ keys.float().transpose(-1, -2) * _scale(decoder, layer)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1)


def check_since(since: Sequence[int], positions: Sequence[int], width: int) -> int:
    """How many positions the longest row has from its ``since`` to the end of a pass of ``width`` tokens.

    Raises :class:`~telltale.errors.ConfigError` unless there is one ``since`` for each row, not behind its first position.
    """
    if len(since) != len(positions) or any(not 0 <= s <= p for s, p in zip(since, positions, strict=False)):
        raise ConfigError(f"since={list(since)} for rows at {list(positions)}; expected one position <= each of these.")
    return max(position - first for position, first in zip(positions, since, strict=True)) + width


def attention_since(rows: Tensor, since: Sequence[int], span: int) -> Tensor:
    """Columns ``since[b]`` .. ``since[b] + span - 1`` of rows (batch, ..., length); zero beyond the length."""
    if len(set(since)) == 1 and since[0] + span <= rows.shape[-1]:
        return rows[..., since[0] : since[0] + span]
    padded = torch.nn.functional.pad(rows, (0, span))
    return torch.stack([row[..., first : first + span] for row, first in zip(padded, since, strict=True)])


def _scale(decoder: Any, layer: int) -> float:
    """What the family multiplies its scores with: GPT-2 can turn it off or divide it by the layer's number."""
    module = decoder.parts.layers[layer]
    attention = next(getattr(module, name) for name in ("self_attn", "attention", "attn") if hasattr(module, name))
    return float(getattr(attention, "scaling", decoder.head_dim**-0.5))


def _queries(decoder: Any, layer: int, entering: Tensor, positions: Sequence[int], *, prefill: bool) -> Tensor:
    """Rotated queries of one layer, (batch, heads, width, head dim), by the family's own modules."""
    module = decoder.parts.layers[layer]
    batch, width, _ = entering.shape
    place = torch.tensor(positions, device=decoder.device).view(-1, 1) + torch.arange(width, device=decoder.device)
    heads, size = decoder.heads, decoder.head_dim
    if decoder.family == "gpt2":
        if layer == 0:
            entering = entering + decoder.parts.position_embedding(place)
        queries = module.attn.c_attn(module.ln_1(entering))[..., : heads * size]
        return queries.view(batch, width, heads, size).transpose(1, 2)
    normed = module.input_layernorm(entering)
    if decoder.family == "gpt_neox":
        mixed = module.attention.query_key_value(normed).view(batch, width, heads, 3 * size)
        queries = mixed[..., :size]
    elif decoder.family == "phi3":
        queries = module.self_attn.qkv_proj(normed)[..., : heads * size].view(batch, width, heads, size)
    else:
        queries = module.self_attn.q_proj(normed).view(batch, width, heads, size)
        norm = getattr(module.self_attn, "q_norm", None)
        queries = queries if norm is None else norm(queries)
    cos, sin = decoder.position_embeddings(entering, place, positions, prefill=prefill)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turning = cos.shape[-1]
    first, second = queries[..., :turning].chunk(2, -1)
    turned = queries[..., :turning] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, queries[..., turning:]], -1).transpose(1, 2)
