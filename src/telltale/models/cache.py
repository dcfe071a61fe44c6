"""The key-value cache of a decoder: preallocated, rolled back by forgetting, forked without copying its prefix.

Row b of layer l is in ``keys[l][b]`` and ``values[l][b]``, (kv heads, capacity, head dimension); slot p belongs to
position p. A token at position p sees slots 0..p and nothing else, so what is stored beyond a row's length is invisible.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.errors import ConfigError

_LARGE = 1 << 20
"""Bytes from which on a mapping of its own pays."""


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
        prefix_rows: Sequence[int] = (),
    ) -> None:
        self.batch = batch
        self.capacity = max(1, capacity)
        self.prefix = prefix
        """The cache whose row ``prefix_rows[b]`` holds row b's slots below ``prefix_lengths[b]``; None if not a fork."""
        self.prefix_rows: list[int] = list(prefix_rows)
        self.prefix_lengths: list[int] = [prefix.lengths[row] for row in prefix_rows] if prefix else [0] * batch
        self.lengths: list[int] = list(self.prefix_lengths)
        self.generation = 0
        self.native_view: tuple[tuple[int, int], Any] | None = None
        """The native step's pointers into this cache and the generations (own, prefix) they are of."""
        self.base: Cache | None = None
        """The cache that this one is some rows of; None if it has storage of its own."""
        self.own_rows: list[int] | None = None
        """The index of row b in ``keys`` and ``values``; None if in place b."""
        self.span: tuple[int, int] | None = None
        """The rows of ``base`` that ``keys`` and ``values`` are slices of; None if they are not."""
        self._written = [0] * batch
        """Places of each row that have been reserved, and so perhaps written: what growing has to copy."""
        self._shape = (kv_heads, head_dim)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._executions = [0] * (layers + 1)
        self.keys = [self._empty() for _ in range(layers)]
        self.values = [self._empty() for _ in range(layers)]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of its own storage."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reserve(self, lengths: int | Sequence[int]) -> None:
        """Reserve storage for positions below ``lengths`` of each row (one number serves all); grows by doubling, so that
        appending is linear in all."""
        rows = [lengths] * self.batch if isinstance(lengths, int) else lengths
        own = [length - shared for length, shared in zip(rows, self.prefix_lengths, strict=True)]
        storage = self if self.base is None else self.base
        for row, length in enumerate(own):
            place = row if self.own_rows is None else self.own_rows[row]
            place += 0 if self.span is None else self.span[0]
            storage._written[place] = max(storage._written[place], length)
        needed = max(own)
        if needed <= self.capacity:
            return
        if self.base is not None:
            self.base._grow(needed)
            self._share(self.base)
        else:
            self._grow(needed)

    def _grow(self, needed: int) -> None:
        kept = self.capacity
        while self.capacity < needed:
            self.capacity *= 2
        # Most rows of a server's storage wait for a request or are short: to copy all places of all of them takes longer than
        # others should wait, and memory that nobody uses.
        committed = [length - shared for length, shared in zip(self.lengths, self.prefix_lengths, strict=True)]
        counts = [min(kept, max(both)) for both in zip(self._written, committed, strict=True)]
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                grown = self._empty()
                for row, count in enumerate(counts):
                    grown[row, :, :count] = old[row, :, :count]
                tensors[index] = grown
        self.generation += 1

    def truncate(self, row: int, length: int) -> None:
        """Set how many tokens of ``row`` count; O(1), no tensor is touched. What lies beyond is forgotten.

        Raises :class:`~telltale.errors.ConfigError` for a length that a fork shares or the capacity cannot hold.
        """
        shared = self.prefix_lengths[row]
        if not shared <= length <= shared + self.capacity:
            raise ConfigError(f"length {length} is outside {shared}..{shared + self.capacity}.")
        self.lengths[row] = length

    def fork(self, count: int, *, rows: Sequence[int] | None = None, capacity: int = 64) -> Cache:
        """``count`` rows for each of ``rows`` (None: all) that go on from it, its committed tokens shared and not copied.

        Rows of one origin are adjacent, in the order of ``rows``. They see the storage that this cache has now: it may
        grow later, but must not write over the shared tokens.
        Raises :class:`~telltale.errors.ConfigError` if this cache is a fork itself.
        """
        if self.prefix is not None:
            raise ConfigError("a fork cannot be forked again; fork the cache that it came from.")
        origins = [row for row in (range(self.batch) if rows is None else rows) for _ in range(count)]
        return Cache(
            layers=self.layers,
            batch=len(origins),
            kv_heads=self._shape[0],
            head_dim=self._shape[1],
            capacity=capacity,
            dtype=self.keys[0].dtype,
            device=self.keys[0].device,
            prefix=self._view(),
            prefix_rows=origins,
        )

    def select(self, rows: Sequence[int]) -> Cache:
        """``rows`` of this cache as a batch of their own, for one pass: same storage, nothing copied.

        It shares storage with this cache: what is written to it is written here, and growing it grows this
        one. Good until this cache drops rows.
        """
        view = self._view()
        view.base = self if self.base is None else self.base
        own = [row if self.own_rows is None else self.own_rows[row] for row in rows]
        if self.span is not None:
            own = [self.span[0] + row for row in own]
        view.own_rows, view.span = own, None
        if own == list(range(own[0], own[0] + len(own))):
            # Adjacent rows are a slice, which costs no more than a cache of their own.
            view.own_rows, view.span = None, (own[0], own[-1] + 1)
        view._share(view.base)
        view.batch = len(own)
        view.lengths = [self.lengths[row] for row in rows]
        view.prefix_lengths = [self.prefix_lengths[row] for row in rows]
        if self.prefix is not None:
            view.prefix_rows = [self.prefix_rows[row] for row in rows]
        return view

    def move(self, source: int, target: int) -> None:
        """Have row ``target`` hold what row ``source`` holds, which is empty then."""
        length = self.lengths[source]
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target], self.lengths[source] = length, 0
        self._written[target] = max(self._written[target], length)

    def branches(self, count: int, *, capacity: int = 64, layers: int | None = None) -> Cache:
        """``count`` rows that :meth:`point` can make go on from any row of this cache, again and again; no token yet.

        Unlike a fork's, their prefix is this cache as it is at each pass. ``layers`` None takes all of them.
        """
        return Cache(
            layers=self.layers if layers is None else layers,
            batch=count,
            kv_heads=self._shape[0],
            head_dim=self._shape[1],
            capacity=capacity,
            prefix=self,
            prefix_rows=[0] * count,
            **self._options,
        )

    def point(self, rows: Sequence[int], origins: Sequence[int]) -> None:
        """Have branch ``rows`` go on from ``origins``, rows of the cache they branch from, at what these have committed."""
        if self.prefix is None:
            raise ConfigError("only branches can be pointed at a row; this cache has storage of its own.")
        for row, origin in zip(rows, origins, strict=True):
            self.prefix_rows[row] = origin
            self.prefix_lengths[row] = self.lengths[row] = self.prefix.lengths[origin]
        self.generation += 1

    def add_rows(self, count: int) -> None:
        """``count`` more rows, empty, behind the others."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                grown = old.new_zeros(self.batch + count, *old.shape[1:])
                grown[: self.batch] = old
                tensors[layer] = grown
        self.lengths += [0] * count
        self._written += [0] * count
        self.prefix_lengths += [0] * count
        if self.prefix is not None:
            self.prefix_rows += [0] * count
        self.batch += count
        self.generation += 1

    def absorb(self, fork: Cache, rows: Sequence[int]) -> None:
        """Take over what ``rows`` of ``fork`` hold beyond their prefix, each into the row of this cache that it came from.

        Only committed tokens (``fork.lengths``) of the layers it has are copied, and count here from then on. Raises
        :class:`~telltale.errors.ConfigError` for a cache that is no fork, or rows of which the origin has changed since the fork.
        """
        if fork.prefix is None:
            raise ConfigError("only a fork can be absorbed; this cache has storage of its own.")
        origins = [fork.prefix_rows[row] for row in rows]
        if len(set(origins)) < len(origins) or any(
            self.lengths[origin] != fork.prefix_lengths[row] for origin, row in zip(origins, rows, strict=True)
        ):
            raise ConfigError("the rows do not continue this cache where they forked off; absorb one for each origin.")
        lengths = list(self.lengths)
        for origin, row in zip(origins, rows, strict=True):
            lengths[origin] = fork.lengths[row]
        self.reserve(lengths)
        for origin, row in zip(origins, rows, strict=True):
            first, last = self.lengths[origin], lengths[origin]
            for mine, theirs in ((self.keys, fork.keys), (self.values, fork.values)):
                for own, new in zip(mine, theirs, strict=False):
                    own[origin, :, first:last] = new[row, :, : last - first]
        self.lengths = lengths

    def copied(self, row: int, start: int, stop: int, layers: range) -> list[tuple[Tensor, Tensor]]:
        """Copies of the keys and values of ``row`` at positions ``start`` to ``stop`` - 1, of each of ``layers``: two
        (kv heads, stop - start, head dim)."""
        return [
            (self.keys[at][row, :, start:stop].clone(), self.values[at][row, :, start:stop].clone()) for at in layers
        ]

    def put(self, row: int, start: int, stop: int, kept: Sequence[tuple[Tensor, Tensor]], layers: range) -> None:
        """Have ``row`` hold what :meth:`copied` gave, from position ``start`` up to ``stop``, which may be earlier than where the
        copies end; the row's length is the caller's to set."""
        self.reserve([stop if place == row else 0 for place in range(self.batch)])
        for at, (keys, values) in zip(layers, kept, strict=True):
            self.keys[at][row, :, start:stop] = keys[:, : stop - start]
            self.values[at][row, :, start:stop] = values[:, : stop - start]

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Sequence[int]) -> None:
        """Store (batch, kv heads, width, head dim) from position ``positions[b]`` on in each row b."""
        width = keys.shape[2]
        places = [position - shared for position, shared in zip(positions, self.prefix_lengths, strict=True)]
        if len(set(places)) == 1 and self.own_rows is None:
            first = places[0]
            self.keys[layer][:, :, first : first + width] = keys
            self.values[layer][:, :, first : first + width] = values
            return
        device = self._options["device"]
        rows = torch.tensor(range(self.batch) if self.own_rows is None else self.own_rows, device=device).view(-1, 1)
        slots = torch.tensor(places, device=device).view(-1, 1) + torch.arange(width, device=device)
        self.keys[layer][rows, :, slots] = keys.transpose(1, 2)
        self.values[layer][rows, :, slots] = values.transpose(1, 2)

    def row(self, row: int) -> Cache:
        """A view of one row: it shares storage with this cache until this one grows or drops rows."""
        view = self._view()
        own = row if self.own_rows is None else self.own_rows[row]
        view.keys = [keys[own : own + 1] for keys in self.keys]
        view.values = [values[own : own + 1] for values in self.values]
        view.base = view.own_rows = view.span = None
        view.lengths, view.prefix_lengths = [self.lengths[row]], [self.prefix_lengths[row]]
        view.prefix_rows = self.prefix_rows[row : row + 1]
        view.batch = 1
        return view

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions below ``length``: two (batch, kv heads, length, head dim)."""
        keys, values = self._own(self.keys[layer]), self._own(self.values[layer])
        if self.prefix is None:
            return keys[:, :, :length], values[:, :, :length]
        return (
            self._joined(self.prefix.keys[layer], keys, length),
            self._joined(self.prefix.values[layer], values, length),
        )

    def read_own(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of each row's first ``count`` slots of its own: two (batch, kv heads, count, head dim)."""
        return self._own(self.keys[layer][:, :, :count]), self._own(self.values[layer][:, :, :count])

    def count(self, start: int, stop: int, tokens: int) -> None:
        """Note that ``tokens`` tokens went through layers start..stop-1."""
        if self.base is not None:
            self.base.count(start, stop, tokens)
            return
        self._executions[start] += tokens
        self._executions[stop] -= tokens

    def layer_executions(self) -> list[int]:
        """Tokens that each layer has processed: equal for all layers when nothing was computed twice."""
        totals, running = [], 0
        for change in self._executions[:-1]:
            running += change
            totals.append(running)
        return totals

    def _joined(self, shared: Tensor, own: Tensor, length: int) -> Tensor:
        """Shared prefix and own slots of each row as one (batch, kv heads, length, head dim); zero beyond a row's storage."""
        first = self.prefix_lengths[0]
        if len(set(self.prefix_rows)) == 1 and len(set(self.prefix_lengths)) == 1:
            start = self.prefix_rows[0]
            prefix = shared[start : start + 1, :, : min(first, length)].expand(self.batch, -1, -1, -1)
            return torch.cat([prefix, own[:, :, : max(0, length - first)]], 2)
        whole = own.new_zeros(self.batch, self._shape[0], length, self._shape[1])
        for row, (start, first) in enumerate(zip(self.prefix_rows, self.prefix_lengths, strict=True)):
            first = min(first, length)
            tail = min(self.capacity, length - first)
            whole[row, :, :first] = shared[start, :, :first]
            whole[row, :, first : first + tail] = own[row, :, :tail]
        return whole

    def _own(self, stored: Tensor) -> Tensor:
        """This cache's rows of a layer, copied only if they are not adjacent."""
        rows = self.own_rows
        if rows is None:
            return stored
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return stored[rows[0] : rows[0] + len(rows)]
        return stored.index_select(0, torch.tensor(rows, device=stored.device))

    def _share(self, other: Cache) -> None:
        """Look at the storage that ``other`` has now."""
        self.keys, self.values = list(other.keys), list(other.values)
        if self.span is not None:
            first, last = self.span
            self.keys = [keys[first:last] for keys in self.keys]
            self.values = [values[first:last] for values in self.values]
        self.capacity, self.generation = other.capacity, other.generation
        self.native_view = None

    def _view(self) -> Cache:
        """The same storage under a second object: what this one does to its lists and tensors later does not show there."""
        view = copy.copy(self)
        view.keys, view.values = list(self.keys), list(self.values)
        view.lengths, view.prefix_lengths = list(self.lengths), list(self.prefix_lengths)
        view.native_view = None
        return view

    def _empty(self) -> Tensor:
        return lazy_zeros((self.batch, self._shape[0], self.capacity, self._shape[1]), **self._options)


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of ``shape``, large ones on a CPU in memory that the system hands out when it is first touched: a cache has places for
    many tokens that never come, and ``torch.zeros`` writes all of them."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # In small pages: NumPy asks for huge ones, and each that is touched is written whole.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
