"""The backend that runs a family's own layer modules over our cache: every supported family, nothing reimplemented."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import UnsupportedModelError
from telltale.models.attention import Packing, is_whole_prompt, rope_by_length, visible_slots
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.loading import evaluating
from telltale.models.seam import FamilySeam

_ATTENTION_KINDS = ("sdpa", "eager")
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What layers call the key-value cache: since transformers 5.24, before, and in GPT-NeoX."""


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
        by_length = rope_by_length(self.config)
        if by_length is not None and not self.parts.family.listed:
            raise UnsupportedModelError(
                f"rotary embeddings of family {self.family!r} depend on the length of the text ({by_length}); rows of one batch "
                f"would depend on each other. Expected another scaling, or a family of the table."
            )
        self._seam = None if self.parts.family.listed else FamilySeam(self.model, self.parts)
        taken = inspect.signature(type(self.parts.layers[0]).forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[0])
        if self._seam is not None:
            with torch.inference_mode(), evaluating(self.model):
                states = torch.zeros(1, 2, self.hidden_size, dtype=self.dtype, device=self.device)
                place = torch.arange(2, device=self.device).unsqueeze(0)
                self.kv_heads, self.head_dim = self._seam.stored_shape(
                    self.parts.layers[0], states, place, self._cache_name
                )

    def head(self, hidden: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.head`."""
        if self._seam is None:
            return super().head(hidden)
        rows = hidden.reshape(1, -1, self.hidden_size)
        with torch.inference_mode(), evaluating(self.model):
            pieces = rows.split(1, 1) if self.exact else [rows]
            logits = torch.cat([self._seam.head(self.parts.norm(piece)) for piece in pieces], 1)
        return logits.view(*hidden.shape[:-1], -1)

    def _follow(self, change: str) -> str | None:
        if self._seam is not None:
            self._seam = FamilySeam(self.model, self.parts)
        return super()._follow(change)

    def _run(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        prefill: bool,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        width = hidden.shape[1]
        place = torch.tensor(positions, device=self.device).view(-1, 1) + torch.arange(width, device=self.device)
        packing = None if cache.prefix is None else Packing(cache, positions, width)
        if start == 0 and self.parts.position_embedding is not None:
            hidden = hidden + self.parts.position_embedding(place)
        shared: dict[str, Any] = {"use_cache": True, "position_ids": place}
        own: list[dict[str, Any]] = [{}] * self.layers
        if self._seam is not None:
            with evaluating(self.model):
                own = self._seam.arguments(hidden, place)
                hidden = self._seam.entering if start == 0 else hidden
        elif self.position_embeddings is not None:
            shared["position_embeddings"] = self.position_embeddings(
                hidden, place, positions, prefill=prefill, lengths=lengths
            )
        if packing is not None:
            hidden, shared = (
                packing.fold_tokens(hidden),
                {name: _folded(value, packing) for name, value in shared.items()},
            )
            own = [{name: _folded(value, packing) for name, value in one.items()} for one in own]
        windows = set(self.windows[start:stop])
        masks = {window: self._mask(positions, width, window, hidden.dtype, packing) for window in windows}
        seam = _CacheSeam(cache, positions, width, packing)
        shared[self._cache_name] = seam
        layers = self.parts.layers[start:stop]
        with evaluating(*layers):
            for index, layer in enumerate(layers, start):
                hidden = layer(hidden, attention_mask=masks[self.windows[index]], **shared | own[index])
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden if packing is None else packing.unfold_tokens(hidden)

    def _mask(
        self, positions: Sequence[int], width: int, window: int | None, dtype: torch.dtype, packing: Packing | None
    ) -> Tensor | None:
        if packing is None:
            mask, length = visible_slots(positions, width, window=window, device=self.device)
            whole = is_whole_prompt(positions, length, width, window)
        else:
            mask, whole = packing.mask(window), False
        if mask is None:
            return None
        if self._attention == "sdpa":
            return None if whole else mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class _CacheSeam:
    """What a family's attention module sees as its key-value cache."""

    def __init__(self, cache: Cache, positions: Sequence[int], width: int, packing: Packing | None) -> None:
        self._cache = cache
        self._packing = packing
        self._positions = positions
        self._length = max(positions) + width

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._packing is None:
            self._cache.write(layer, keys, values, self._positions)
            return self._cache.read(layer, self._length)
        self._cache.write(layer, self._packing.unfold(keys), self._packing.unfold(values), self._positions)
        return self._packing.read(layer)

    def get_seq_length(self, layer: int = 0) -> int:
        return min(self._positions)


def _folded(value: Any, packing: Packing) -> Any:
    """What a layer gets besides the states, for packed tokens: tensors (batch, width, ...), or tuples of them."""
    if isinstance(value, tuple):
        return tuple(_folded(part, packing) for part in value)
    return packing.fold_tokens(value) if isinstance(value, Tensor) else value
