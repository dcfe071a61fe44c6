"""The target's side where the draft is the first layers of the same model: the layers above, over the same cache.

LayerSkip's self-speculation (arXiv 2404.16710, section 4.3) at the level of steps. What the draft computed is never computed again:
this side starts from the states that the draft's side kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from telltale.decode.step_verified.passes import Passed, Seat, Work, append_masses, cut_masses
from telltale.decode.step_verified.sides import Side, sum_by_layer
from telltale.models.cache import Cache


class UpperSide(Side):
    """The layers above those of ``lower``, the draft's side of the same model: together the target. They share one cache."""

    def __init__(self, lower: Side, *, attention_layers: int = 0) -> None:
        super().__init__(
            lower.decoder,
            slots=len(lower.seats),
            attention_layers=attention_layers,
            vocabulary=lower.vocabulary,
            whole_rows=lower.whole_rows,
        )
        self.start = lower.stop
        self.attention_layers = min(attention_layers, self.stop - self.start)
        self.lower = lower
        lower.keeps_states = True
        self.cache = lower.cache

    @property
    def layer_executions(self) -> list[int]:
        """See :attr:`Side.layer_executions`; the lower side's included."""
        own = self._pool.layer_executions() if self._pool else []
        return sum_by_layer(self.lower.layer_executions, self._executed, own)

    @property
    def cache_bytes(self) -> int:
        """See :attr:`Side.cache_bytes`; the rows' own are the lower side's."""
        return 0 if self._pool is None else self._pool.nbytes

    def add_slots(self, count: int) -> None:
        """See :meth:`Side.add_slots`; the cache is the lower side's."""
        self.seats += [Seat() for _ in range(count)]

    def clear(self, slot: int) -> None:
        """See :meth:`Side.clear`."""
        self.seats[slot] = Seat()

    def release_storage(self) -> None:
        """See :meth:`Side.release_storage`; the lower side comes first."""
        self._executed = sum_by_layer(self._executed, self._pool.layer_executions() if self._pool else [])
        self.cache = self.lower.cache
        self._pool, self._free = None, []

    def prefill(self, slot: int, tokens: Sequence[int]) -> None:
        """See :meth:`Side.prefill`; the lower layers run first where they have not yet."""
        missing = list(tokens)[self._ahead(slot) :]
        if missing:
            self.lower.prefill(slot, missing)
        super().prefill(slot, tokens)

    def feed(self, work: Sequence[Work]) -> list[Passed]:
        """See :meth:`Side.feed`."""
        missing = [Work(one.slot, one.tokens[self._ahead(one.slot) :]) for one in work]
        missing = [one for one in missing if one.tokens]
        if missing:
            self.lower.feed(missing)
        return super().feed(work)

    def rewind(self, slot: int, length: int, tail: Tensor | None) -> None:
        """See :meth:`Side.rewind`. To be called before the lower side's."""
        seat = self.seats[slot]
        if seat.length > length:
            seat.length, seat.tail = length, tail
            cut_masses(seat, length)

    def branch(self, slot: int, count: int) -> list[int]:
        """See :meth:`Side.branch`."""
        taken = super().branch(slot, count)
        masses = self.lower.seats[slot].masses
        if masses is not None:
            self._lower_masses |= dict.fromkeys(taken, masses)
        return taken

    def take(self, slot: int, branch: int, passed: Sequence[Passed]) -> None:
        """See :meth:`Side.take`; a branch of this side has gone through the layers of both."""
        self._absorb(branch)
        seat, lower = self.seats[slot], self.lower.seats[slot]
        seat.length = lower.length = self.cache.lengths[slot]
        append_masses(seat, passed)
        below = [one.lower for one in passed if one.lower is not None]
        append_masses(lower, below)
        if passed:
            seat.tail, lower.tail = passed[-1].states[-1], below[-1].states[-1]

    def _ahead(self, slot: int) -> int:
        """Tokens of a row that the lower side has processed and this one has not."""
        return self.lower.seats[slot].length - self.seats[slot].length

    def _entering(self, work: Sequence[Work], width: int) -> Tensor:
        rows = []
        for one in work:
            own = torch.cat(self.lower.seats[one.slot].kept)[: len(one.tokens)]
            rows.append(torch.cat([own, own.new_zeros(width - len(own), own.shape[1])]))
        return torch.stack(rows)

    def _note(self, slot: int, count: int, passed: Passed) -> None:
        seat, lower = self.seats[slot], self.lower.seats[slot]
        seat.length += count
        seat.tail = passed.states[-1]
        append_masses(seat, [passed])
        left = torch.cat(lower.kept)[count:]
        lower.kept = [left] if len(left) else []

    def _whole(self, ids: Tensor, view: Cache, positions: Sequence[int], since: Sequence[int] | None) -> list[Passed]:
        below = self.lower._whole(ids, view, positions, None)
        entering = torch.stack([one.states for one in below])
        passed = self._passed(*self._layers(entering, view, positions, since))
        for one, lower in zip(passed, below, strict=True):
            one.lower = lower
        return passed
