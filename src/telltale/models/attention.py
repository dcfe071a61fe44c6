"""The attention of one pass over a cache: masks, rotary embeddings, PyTorch's fused kernels, and packed candidates.

*Masks* depend on positions alone: slot s is visible to position p iff p - w < s <= p, in its own row.

*Attention weights.* Fused kernels do not return them. For the few tokens and layers that a caller reads they are computed
beside the kernel, from the queries and the cached keys: only these rows of the attention matrix.

*Rotary embeddings* come from the family's own module, as a function of the position only. Where its frequencies depend on the
sequence length (``dynamic`` and ``longrope``), Transformers uses the longest position of the pass and remembers it in the
live module; then a token's embedding would depend on which tokens share its pass, and on what was decoded before. Here a prompt
has the frequencies of its own length and a decoded token those of a sequence that ends with it, as when its row is decoded
alone, from a private copy of the module.

*Packed candidates* of one prompt are one sequence: the prompt's keys once, behind them each candidate's own, and a mask.
Rows of a fork that go on from the same row become more queries of one attention instead of more rows of a batch, so their
shared prefix is copied once and read once however many they are. This is tree packing: a token sees its prefix and its own
branch. Groups of unequal size are filled up with repeats of their first row, which the way back drops.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import ConfigError
from telltale.models.cache import Cache


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

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, cap: float | None = None
    ) -> Tensor:
        """Keys and values (batch, kv heads, width, head dim) into the cache; the mixtures (batch, heads, width, head dim).

        Scores are q k times ``scale``, and cap * tanh(scores / cap) of these where there is a ``cap``.
        """
        self._cache.write(layer, keys, values, self._positions)
        mask, causal = self._mask(self._windows[layer])
        if self._packing is None:
            keys, values = self._cache.read(layer, self._length)
        else:
            queries = self._packing.fold(queries)
            keys, values = self._packing.read(layer)
        if cap is None:
            grouped = keys.shape[1] != queries.shape[1]
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )
        else:
            weights = _weights(queries, keys, mask, causal=causal, scale=scale, cap=cap)
            repeats = queries.shape[1] // keys.shape[1]
            mixed = weights.to(values.dtype) @ values.repeat_interleave(repeats, 1)
        if layer in self._watched:
            self.blocks.append(self._block(_weights(queries, keys, mask, causal=causal, scale=scale, cap=cap)))
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

    def _block(self, weights: Tensor) -> Tensor:
        if self._packing is not None:
            weights = self._packing.by_position(weights.mean(1), self._length).unsqueeze(1)
        return attention_since(weights, self._since, self._span).mean(1)


def _weights(
    queries: Tensor, keys: Tensor, mask: Tensor | None, *, causal: bool, scale: float, cap: float | None
) -> Tensor:
    """Attention weights (batch, heads, width, length) in float32."""
    batch, heads, width, size = queries.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    if causal:
        mask = torch.ones(width, length, dtype=torch.bool, device=keys.device).tril()
    grouped = queries.float().reshape(batch * kv_heads, -1, size)
    scores = torch.bmm(grouped, keys.float().flatten(0, 1).transpose(1, 2)).view(batch, heads, width, length) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    return (scores if mask is None else torch.where(mask, scores, float("-inf"))).softmax(-1)


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


def visible_slots(
    positions: Sequence[int], width: int, *, window: int | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """Which cache slots each token sees, and how many slots there are to read.

    ``positions[b]`` is the position of row b's first token of ``width``. Returns a bool mask (batch, 1, width, length),
    True where visible, or None if every token sees every slot; and the length, last position + 1.
    """
    length = max(positions) + width
    alone = width == 1 and min(positions) == max(positions)
    if alone and (window is None or length <= window):
        return None, length
    place = torch.tensor(positions, device=device).view(-1, 1) + torch.arange(width, device=device)
    slots = torch.arange(length, device=device)
    mask = slots <= place.unsqueeze(-1)
    if window is not None:
        mask &= slots > place.unsqueeze(-1) - window
    return mask.unsqueeze(1), length


def is_whole_prompt(positions: Sequence[int], length: int, width: int, window: int | None) -> bool:
    """Whether the pass is an ordinary causal one from position 0 on, which kernels know without a mask."""
    return length == width and max(positions) == 0 and (window is None or length <= window)


def packed_slots(
    positions: Sequence[int],
    cuts: Sequence[int],
    width: int,
    own: int,
    *,
    group: int,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Which slots each token sees when ``group`` rows with a common prefix are packed as one sequence.

    ``positions[b]`` is the position of row b's first token of ``width``, ``cuts[b]`` that of its first own slot. The slots are
    the prefix up to the largest cut, then ``own`` of each row. Returns a bool mask (len(positions) / group, 1,
    group * width, slots), True where visible, or None if every token sees every slot.
    """
    prefix, last = max(cuts), positions[0] + width - 1
    alone = group == width == 1 and len(set(zip(positions, cuts, strict=True))) == 1 and last - cuts[0] + 1 == own
    if alone and (window is None or last < window):
        return None
    cut = torch.tensor(cuts, device=device).view(-1, group, 1, 1)
    place = torch.tensor(positions, device=device).view(-1, group, 1, 1) + torch.arange(width, device=device).view(
        -1, 1
    )
    slots = torch.arange(prefix, device=device)
    shared = (slots < cut).expand(-1, -1, width, -1)
    own_slots = (cut + torch.arange(own, device=device)).view(-1, 1, 1, group, own)
    mine = torch.eye(group, dtype=torch.bool, device=device).view(1, group, 1, group, 1)
    branch = mine & (own_slots <= place.unsqueeze(-1))
    if window is not None:
        shared = shared & (slots > place - window)
        branch = branch & (own_slots > place.unsqueeze(-1) - window)
    return torch.cat([shared, branch.flatten(3)], -1).flatten(1, 2).unsqueeze(1)


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration: one dictionary, or one for each kind of layer; none without rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [own for own in rope.values() if isinstance(own, dict)]
    return nested or ([rope] if rope else [])


def rope_by_length(config: Any) -> str | None:
    """The kind of rotary scaling whose frequencies depend on the length of the sequence, None if they do not."""
    kinds = [str(rope.get("rope_type", "default")) for rope in rope_kinds(config)]
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


class PositionEmbeddings:
    """(cos, sin) for given positions, (batch, width, rotary dim) each."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary: Any = rotary
        self._is_static = rope_by_length(getattr(rotary, "config", None)) is None

    def __call__(
        self,
        hidden: Tensor,
        place: Tensor,
        positions: Sequence[int],
        *,
        prefill: bool,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """For tokens at ``place`` (batch, width), which begin at ``positions`` in each row.

        A prompt (``prefill``) is one sequence: all its tokens get the frequencies of its full length, which ``lengths`` has
        for each row (None: it ends with this pass). No row's depend on another row.
        """
        if self._is_static:
            return self._rotary(hidden, position_ids=place)
        width = hidden.shape[1]
        if prefill:
            ends = [first + width for first in positions] if lengths is None else list(lengths)
            rows = [self._of_sequence(hidden, own.unsqueeze(0), end) for own, end in zip(place, ends, strict=True)]
        else:
            steps = {first + offset for first in positions for offset in range(width)}
            tables = {at: self._of_sequence(hidden, place.new_full((1, 1), at), at + 1) for at in steps}
            rows = []
            for first in positions:
                own_tables = [tables[first + offset] for offset in range(width)]
                rows.append(
                    (torch.cat([cos for cos, _ in own_tables], 1), torch.cat([sin for _, sin in own_tables], 1))
                )
        return torch.cat([cos for cos, _ in rows]), torch.cat([sin for _, sin in rows])

    def _of_sequence(self, hidden: Tensor, place: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """For positions ``place`` (1, width) of a sequence of ``length`` tokens; what lies beyond its end is padding."""
        place = torch.cat([place.clamp(max=length - 1), place.new_full((1, 1), length - 1)], 1)
        cos, sin = self._fresh()(hidden, position_ids=place)
        return cos[:, :-1], sin[:, :-1]

    def _fresh(self) -> Any:
        """A copy of the rotary module that has not seen a sequence yet; the live one is never written to."""
        rotary = copy.copy(self._rotary)
        rotary._buffers = {name: buffer.clone() for name, buffer in self._rotary._buffers.items()}
        rotary.inv_freq = rotary.original_inv_freq.clone().to(rotary.inv_freq.device)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        return rotary


class Packing:
    """The rows of a pass over ``cache``, a fork or branches, grouped as (origins, rows of each): made once per pass.

    ``positions`` are those of each row's first token of ``width``.
    """

    def __init__(self, cache: Cache, positions: Sequence[int], width: int) -> None:
        groups: dict[int, list[int]] = {}
        for row, origin in enumerate(cache.prefix_rows):
            groups.setdefault(origin, []).append(row)
        self.size = max(len(rows) for rows in groups.values())
        """Rows of the largest group."""
        slots = [row for rows in groups.values() for row in rows + rows[:1] * (self.size - len(rows))]
        self._cache, self._width, self._origins = cache, width, list(groups)
        self._positions = [positions[row] for row in slots]
        self._cuts = [cache.prefix_lengths[row] for row in slots]
        self._cut = max(self._cuts)
        self._own = max(place + width - cut for place, cut in zip(self._positions, self._cuts, strict=True))
        self._slots = self._back = None
        if slots != list(range(cache.batch)):
            device = cache.keys[0].device
            self._slots = torch.tensor(slots, device=device)
            self._back = torch.tensor([slots.index(row) for row in range(cache.batch)], device=device)

    def fold(self, x: Tensor) -> Tensor:
        """(rows, heads, width or own slots, size) -> (origins, heads, that of all rows of an origin, size)."""
        x = x if self._slots is None else x.index_select(0, self._slots)
        x = x.view(len(self._origins), self.size, *x.shape[1:]).transpose(1, 2)
        return x.flatten(2, 3)

    def unfold(self, x: Tensor) -> Tensor:
        """(origins, heads, packed width, size) -> (rows, heads, width, size)."""
        x = x.unflatten(2, (self.size, self._width)).transpose(1, 2).flatten(0, 1)
        return x if self._back is None else x.index_select(0, self._back)

    def fold_tokens(self, x: Tensor) -> Tensor:
        """(rows, width, ...) -> (origins, packed width, ...)."""
        return self.fold(x.unsqueeze(1)).squeeze(1)

    def unfold_tokens(self, x: Tensor) -> Tensor:
        """(origins, packed width, ...) -> (rows, width, ...)."""
        return self.unfold(x.unsqueeze(1)).squeeze(1)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that :meth:`mask` is about: two (origins, kv heads, packed slots, head dim)."""
        assert self._cache.prefix is not None
        own = self._cache.read_own(layer, self._own)
        prefix = self._cache.prefix
        return self._joined(prefix.keys[layer], own[0]), self._joined(prefix.values[layer], own[1])

    def mask(self, window: int | None) -> Tensor | None:
        """True where a token sees a slot, (origins, 1, packed width, packed slots); None if every token sees every slot."""
        return packed_slots(
            self._positions,
            self._cuts,
            self._width,
            self._own,
            group=self.size,
            window=window,
            device=self._cache.keys[0].device,
        )

    def by_position(self, rows: Tensor, length: int) -> Tensor:
        """(origins, packed width, packed slots) -> each row's positions below ``length``: (rows, width, length)."""
        packed = rows.view(len(self._origins), self.size, self._width, -1)
        own = packed[..., self._cut :].unflatten(-1, (self.size, self._own))
        own = own.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
        shared = packed[..., : self._cut].flatten(0, 1)
        out = rows.new_zeros(len(self._cuts), self._width, max(length, self._cut + self._own))
        for row, cut in enumerate(self._cuts):
            out[row, :, :cut] = shared[row, :, :cut]
            out[row, :, cut : cut + self._own] = own[row]
        out = out[..., :length]
        return out if self._back is None else out.index_select(0, self._back)

    def _joined(self, shared: Tensor, own: Tensor) -> Tensor:
        """The origins' slots, and behind them those of their rows, side by side."""
        behind = self.fold(own)
        if len(self._origins) == 1:
            first = self._origins[0]
            return torch.cat([shared[first : first + 1, :, : self._cut], behind], 2)
        whole = behind.new_zeros(*behind.shape[:2], self._cut + behind.shape[2], behind.shape[3])
        for place, origin in enumerate(self._origins):
            cut = max(self._cuts[place * self.size : (place + 1) * self.size])
            whole[place, :, :cut] = shared[origin, :, :cut]
        whole[:, :, self._cut :] = behind
        return whole
