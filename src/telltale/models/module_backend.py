"""The backend that runs a family's own layer modules over our cache: every supported family, nothing reimplemented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import UnsupportedModelError
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.masks import is_whole_prompt, visible_slots
from telltale.models.modes import evaluating

_ATTENTION_KINDS = ("sdpa", "eager")


class ModuleDecoder(Decoder):
    """Layers are called as they are, with our masks, rotary tables and cache. Slow, and right for every family."""

    backend = "module"

    def __init__(self, model: nn.Module, *, exact: bool = False, threads: int | None = None) -> None:
        super().__init__(model, exact=exact, threads=threads)
        self._attention: str = getattr(self.config, "_attn_implementation", "eager") or "eager"
        if self._attention not in _ATTENTION_KINDS:
            raise UnsupportedModelError(
                f"attention implementation {self._attention!r} cannot take explicit masks; load the model with "
                f"attn_implementation='sdpa' or 'eager'."
            )

    def _run(
        self, hidden: Tensor, start: int, stop: int, cache: Cache, positions: Sequence[int], *, prefill: bool
    ) -> Tensor:
        width = hidden.shape[1]
        place = torch.tensor(positions, device=self.device).view(-1, 1) + torch.arange(width, device=self.device)
        if start == 0 and self.parts.position_embedding is not None:
            hidden = hidden + self.parts.position_embedding(place)
        shared: dict[str, Any] = {"use_cache": True, "position_ids": place}
        if self.position_embeddings is not None:
            shared["position_embeddings"] = self.position_embeddings(hidden, place, positions, prefill=prefill)
        masks = {window: self._mask(positions, width, window, hidden.dtype) for window in set(self.windows[start:stop])}
        seam = _CacheSeam(cache, positions, width)
        shared["layer_past" if self.family == "gpt_neox" else "past_key_values"] = seam
        layers = self.parts.layers[start:stop]
        with evaluating(*layers):
            for index, layer in enumerate(layers, start):
                hidden = layer(hidden, attention_mask=masks[self.windows[index]], **shared)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden

    def _mask(self, positions: Sequence[int], width: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        mask, length = visible_slots(positions, width, window=window, device=self.device)
        if mask is None:
            return None
        if self._attention == "sdpa":
            return None if is_whole_prompt(positions, length, width, window) else mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class _CacheSeam:
    """What a family's attention module sees as its key-value cache."""

    def __init__(self, cache: Cache, positions: Sequence[int], width: int) -> None:
        self._cache = cache
        self._positions = positions
        self._length = max(positions) + width

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._cache.write(layer, keys, values, self._positions)
        return self._cache.read(layer, self._length)

    def get_seq_length(self, layer: int = 0) -> int:
        return min(self._positions)
