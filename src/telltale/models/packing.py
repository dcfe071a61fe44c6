"""Candidates of one prompt as one sequence: the prompt's keys once, behind them each candidate's own, and a mask.

Rows of a fork that go on from the same row become more queries of one attention instead of more rows of a batch, so their
shared prefix is copied once and read once however many they are. This is tree packing: a token sees its prefix and its own
branch. Groups of unequal size are filled up with repeats of their first row, which the way back drops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from telltale.models.cache import Cache
from telltale.models.masks import packed_slots


class Packing:
    """How the rows of a pass over ``cache``, a fork or branches, stand as (origins, rows of each): made once per pass.

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
        """What (origins, packed width, packed slots) says of each row's positions below ``length``: (rows, width, length)."""
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
