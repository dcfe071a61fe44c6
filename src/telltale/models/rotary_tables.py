"""Rotary embeddings as tables over positions, made by the family's own module; layers that turn alike share one.

A table has the cosines and the signed sines of all positions so far, (positions, rotary dim), in the model's dtype. Families that
give each kind of layer its own angles (a local and a global base, say) have several tables, and layers that do not turn have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.models.arithmetic import turns, turns_neighbours
from telltale.models.families import Parts
from telltale.models.seam import FamilySeam

_AT_ONCE = 1024
"""Positions that the family is asked for in one pass: some families make a mask of that size squared beside."""
Angles = tuple[Tensor, Tensor]


class RotaryTables:
    """Tables of a model's layers: ``of_layer[i]`` is the number of layer i's table, None where it does not turn."""

    def __init__(self, model: Any, parts: Parts, hidden_size: int) -> None:
        self._model, self._parts, self._hidden = model, parts, hidden_size
        self.neighbours = turns_neighbours(parts.layers[0])
        """Whether lanes 2i and 2i + 1 turn together, not those of two halves."""
        self.of_layer: list[int | None] = [0] * len(parts.layers)
        self.tables: list[Angles] = []
        self._source: Callable[[Tensor], list[Angles]] = self._from_module if parts.family.listed else self._from_seam()
        self._frequencies: Any = None
        self.grow(64)

    @property
    def length(self) -> int:
        """Positions that the tables have."""
        return self.tables[0][0].shape[0] if self.tables else 1 << 62

    @property
    def dim(self) -> int:
        """Lanes of a head that turn."""
        return int(self.tables[0][0].shape[1]) if self.tables else 0

    def outdated(self) -> bool:
        """Whether the module's frequencies have changed since; the tables have then been made anew."""
        if _same(self._frequencies, _frequencies(self._parts.rotary)):
            return False
        self.tables, size = [], self.length if self.tables else 64
        self.grow(size)
        return True

    def grow(self, length: int) -> None:
        """Have tables for positions below ``length``."""
        size = self.length if self.tables else 64
        while size < length:
            size *= 2
        device = self._parts.embedding.weight.device
        with torch.inference_mode():
            pieces = [
                self._source(torch.arange(first, min(first + _AT_ONCE, size), device=device).unsqueeze(0))
                for first in range(0, size, _AT_ONCE)
            ]
        self.tables = [
            self._signed(torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts]))
            for parts in zip(*pieces, strict=True)
        ]
        self._frequencies = _frequencies(self._parts.rotary)

    def at(self, positions: Sequence[int], width: int) -> list[Angles]:
        """Of each table the rows of tokens that begin at ``positions``: (width, dim), or (batch, width, dim) if they differ."""
        if max(positions) + width > self.length:
            self.grow(max(positions) + width)
        if len(set(positions)) == 1:
            rows: Any = slice(positions[0], positions[0] + width)
        else:
            device = self._parts.embedding.weight.device
            rows = torch.tensor(positions, device=device).view(-1, 1) + torch.arange(width, device=device)
        return [(cos[rows], sin[rows]) for cos, sin in self.tables]

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads (..., heads, head dim) turned by (..., dim)."""
        dim = cos.shape[-1]
        if dim < x.shape[-1]:
            return torch.cat([self.turned(x[..., :dim], cos, sin), x[..., dim:]], -1)
        if self.neighbours:
            other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            other = torch.cat([second, first], -1)
        return (x * cos.unsqueeze(-2) + other * sin.unsqueeze(-2)).to(x.dtype)

    def _from_module(self, place: Tensor) -> list[Angles]:
        cos, sin = self._parts.rotary(self._like(1), position_ids=place)
        return [(cos[0], sin[0])]

    def _from_seam(self) -> Callable[[Tensor], list[Angles]]:
        """A source that reads what each layer is called with; finds out which layers share a table and which do not turn."""
        seam = FamilySeam(self._model, self._parts)
        first = torch.arange(3, device=self._parts.embedding.weight.device).unsqueeze(0)
        with torch.inference_mode():
            given = [one.get("position_embeddings") for one in seam.arguments(self._like(3), first)]
        kinds: dict[int, int] = {}
        for index, (layer, own) in enumerate(zip(self._parts.layers, given, strict=True)):
            self.of_layer[index] = None
            if own is not None and turns(layer, own, self._hidden):
                self.of_layer[index] = kinds.setdefault(id(own[0]), len(kinds))
        leaders = [self.of_layer.index(kind) for kind in range(len(kinds))]

        def source(place: Tensor) -> list[Angles]:
            found = [one.get("position_embeddings") for one in seam.arguments(self._like(place.shape[1]), place)]
            return [(found[leader][0][0], found[leader][1][0]) for leader in leaders]

        return source

    def _like(self, width: int) -> Tensor:
        weight = self._parts.embedding.weight
        return torch.zeros(1, width, self._hidden, dtype=weight.dtype, device=weight.device)

    def _signed(self, cos: Tensor, sin: Tensor) -> Angles:
        half = cos.shape[-1] // 2
        if not self.neighbours:
            return cos.contiguous(), torch.cat([-sin[:, :half], sin[:, half:]], -1).contiguous()
        if not torch.equal(cos[:, ::2], cos[:, 1::2]):  # two halves that are alike, as for halves that turn
            cos, sin = cos[:, :half].repeat_interleave(2, -1), sin[:, :half].repeat_interleave(2, -1)
        sign = sin.new_tensor([-1.0, 1.0]).repeat(half)
        return cos.contiguous(), (sin * sign).contiguous()


def _frequencies(rotary: Any) -> Any:
    """A copy of what tables are made from; None if no one module makes them."""
    if rotary is None:
        return None
    scaling = {name: value for name, value in vars(rotary).items() if name.endswith("attention_scaling")}
    return {name: buffer.clone() for name, buffer in rotary.named_buffers()}, scaling


def _same(before: Any, now: Any) -> bool:
    """Whether tables made from ``before`` still hold."""
    if before is None or now is None:
        return before is now
    tensors, others = before
    same = tensors.keys() == now[0].keys() and others == now[1]
    return same and all(torch.equal(tensors[name], now[0][name]) for name in tensors)
