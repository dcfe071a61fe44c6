"""The key-value cache of a decoder: preallocated, rolled back by forgetting, forked without copying its prefix.

Row b of layer l stands in ``keys[l][b]`` and ``values[l][b]``, (kv heads, capacity, head dimension); slot p belongs to
position p. A token at position p sees slots 0..p and nothing else, so what stands beyond a row's length is invisible.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError


class Cache:
    """Keys and values of every layer for ``batch`` rows. Draft and verification share one: there is no second copy.

    ``lengths[b]`` is the number of committed tokens of row b. ``generation`` changes whenever storage moves.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Cache | None = None,
    ) -> None:
        self.batch = batch
        self.capacity = max(1, capacity)
        self.prefix = prefix
        """The cache whose row 0 holds slots below ``prefix_length`` for all rows of this one; None if not a fork."""
        self.prefix_length: int = prefix.lengths[0] if prefix else 0
        self.lengths: list[int] = [self.prefix_length] * batch
        self.generation = 0
        self.native_view: tuple[int, Any] | None = None
        """The native step's pointers into this cache and the generation they are of."""
        self._shape = (kv_heads, head_dim)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._executions = [0] * (layers + 1)
        self.keys = [self._empty() for _ in range(layers)]
        self.values = [self._empty() for _ in range(layers)]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    def reserve(self, length: int) -> None:
        """Have room for positions below ``length``; grows by doubling, so that appending is linear in all."""
        needed = length - self.prefix_length
        if needed <= self.capacity:
            return
        kept = self.capacity
        while self.capacity < needed:
            self.capacity *= 2
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                grown = self._empty()
                grown[:, :, :kept] = old
                tensors[index] = grown
        self.generation += 1

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Set how many tokens of each row count; O(batch), no tensor is touched. One number serves all rows.

        Raises :class:`~telltale.errors.ConfigError` for a length that a fork shares or the capacity cannot hold.
        """
        new = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        if len(new) != self.batch:
            raise ConfigError(f"{len(new)} lengths were given for a cache of {self.batch} rows.")
        for length in new:
            if not self.prefix_length <= length <= self.prefix_length + self.capacity:
                raise ConfigError(
                    f"length {length} is outside {self.prefix_length}..{self.prefix_length + self.capacity}."
                )
        self.lengths = new

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only ``rows``, in this order: a finished row leaves and costs nothing any more."""
        if list(rows) == list(range(self.batch)):
            return
        index = torch.tensor(list(rows), device=self._options["device"])
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.batch = len(rows)
        self.generation += 1

    def fork(self, count: int, *, capacity: int = 64) -> Cache:
        """``count`` rows that go on from this single-row cache, its committed tokens shared and not copied.

        They see the storage that this cache has now: it may grow later, but must not write over the shared tokens.
        Raises :class:`~telltale.errors.ConfigError` if this cache has several rows or is a fork itself.
        """
        if self.batch != 1 or self.prefix is not None:
            raise ConfigError("only a cache of one row that is not itself a fork can be forked.")
        return Cache(
            layers=self.layers,
            batch=count,
            kv_heads=self._shape[0],
            head_dim=self._shape[1],
            capacity=capacity,
            dtype=self.keys[0].dtype,
            device=self.keys[0].device,
            prefix=self.row(0),
        )

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Sequence[int]) -> None:
        """Store (batch, kv heads, width, head dim) from position ``positions[b]`` on in each row b."""
        width = keys.shape[2]
        if len(set(positions)) == 1:
            first = positions[0] - self.prefix_length
            self.keys[layer][:, :, first : first + width] = keys
            self.values[layer][:, :, first : first + width] = values
            return
        for row, position in enumerate(positions):
            first = position - self.prefix_length
            self.keys[layer][row, :, first : first + width] = keys[row]
            self.values[layer][row, :, first : first + width] = values[row]

    def row(self, row: int) -> Cache:
        """A view of one row: it shares storage with this cache until this one grows or drops rows."""
        view = copy.copy(self)
        view.keys = [keys[row : row + 1] for keys in self.keys]
        view.values = [values[row : row + 1] for values in self.values]
        view.lengths = [self.lengths[row]]
        view.batch = 1
        view.native_view = None
        return view

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions below ``length``: two (batch, kv heads, length, head dim)."""
        own = length - self.prefix_length
        keys, values = self.keys[layer][:, :, :own], self.values[layer][:, :, :own]
        if self.prefix is None:
            return keys, values
        shared_keys = self.prefix.keys[layer][:, :, : self.prefix_length].expand(self.batch, -1, -1, -1)
        shared_values = self.prefix.values[layer][:, :, : self.prefix_length].expand(self.batch, -1, -1, -1)
        return torch.cat([shared_keys, keys], 2), torch.cat([shared_values, values], 2)

    def count(self, start: int, stop: int, tokens: int) -> None:
        """Note that ``tokens`` tokens went through layers start..stop-1."""
        self._executions[start] += tokens
        self._executions[stop] -= tokens

    def layer_executions(self) -> list[int]:
        """Tokens that each layer has processed: equal for all layers when nothing was computed twice."""
        totals, running = [], 0
        for change in self._executions[:-1]:
            running += change
            totals.append(running)
        return totals

    def _empty(self) -> Tensor:
        return torch.zeros(self.batch, self._shape[0], self.capacity, self._shape[1], **self._options)
