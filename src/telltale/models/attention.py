"""The attention of one pass over a cache by PyTorch's fused kernels: rows as a batch, candidates of a prompt packed.

Where a caller asks how the tokens of a step attend to each other, those weights are made beside the fused kernel, from the
queries and keys that are at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from telltale.models.attention_rows import attention_since
from telltale.models.cache import Cache
from telltale.models.masks import is_whole_prompt, visible_slots
from telltale.models.packing import Packing


class PassAttention:
    """Attention of the tokens of one pass, called layer by layer; ``windows`` holds the sliding window of each layer.

    ``watched`` layers leave in ``blocks``, one after the other, their weights on positions ``since[b]`` .. of each row,
    averaged over heads: (batch, width, span) float32.
    """

    def __init__(
        self,
        cache: Cache,
        positions: Sequence[int],
        width: int,
        *,
        windows: Sequence[int | None],
        watched: Collection[int] = (),
        since: Sequence[int] = (),
        span: int = 0,
    ) -> None:
        self._cache, self._positions = cache, positions
        self._length = max(positions) + width
        self._windows, self._watched, self._since, self._span = windows, watched, since, span
        self._packing = None if cache.prefix is None else Packing(cache, positions, width)
        self._masks: dict[int | None, tuple[Tensor | None, bool]] = {}
        self._width = width
        self.blocks: list[Tensor] = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values (batch, kv heads, width, head dim) into the cache; the mixtures (batch, heads, width, head dim)."""
        self._cache.write(layer, keys, values, self._positions)
        mask, causal = self._mask(self._windows[layer])
        if self._packing is None:
            keys, values = self._cache.read(layer, self._length)
        else:
            queries = self._packing.fold(queries)
            keys, values = self._packing.read(layer)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=keys.shape[1] != queries.shape[1]
        )
        if layer in self._watched:
            self.blocks.append(self._block(queries, keys, mask, causal=causal))
        return mixed if self._packing is None else self._packing.unfold(mixed)

    def _mask(self, window: int | None) -> tuple[Tensor | None, bool]:
        """The mask of layers with this window, and whether the kernel's own causal one serves instead."""
        if window not in self._masks:
            device = self._cache.keys[0].device
            if self._packing is not None:
                self._masks[window] = self._packing.mask(window), False
            elif is_whole_prompt(self._positions, self._length, self._width, window):
                self._masks[window] = None, self._width > 1
            else:
                self._masks[window] = (
                    visible_slots(self._positions, self._width, window=window, device=device)[0],
                    False,
                )
        return self._masks[window]

    def _block(self, queries: Tensor, keys: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        batch, heads, width, size = queries.shape
        kv_heads, length = keys.shape[1], keys.shape[2]
        if causal:
            mask = torch.ones(width, length, dtype=torch.bool, device=keys.device).tril()
        grouped = queries.float().reshape(batch * kv_heads, -1, size)
        scores = torch.bmm(grouped, keys.float().flatten(0, 1).transpose(1, 2)).view(batch, heads, width, length)
        scores = scores * size**-0.5 if mask is None else torch.where(mask, scores * size**-0.5, float("-inf"))
        weights = scores.softmax(-1)
        if self._packing is not None:
            weights = self._packing.by_position(weights.mean(1), self._length).unsqueeze(1)
        return attention_since(weights, self._since, self._span).mean(1)
