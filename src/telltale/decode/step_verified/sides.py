"""One model's side of all rows: what it has processed of each, and how it goes on. Draft and target each have one.

A row has a seat in the side's cache. Candidates of a step stand in branches that share the row's cache without copying it; a
single candidate is written behind the row itself, where forgetting a length takes it back. Tokens are fed as ids, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from telltale.decode.step_verified.passes import Passed, Seat, WholeRows, Work, append_masses, cut_masses
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder

PREFILL_CHUNK = 512
"""Tokens of a prompt that are run at once; between two chunks other rows get their turn."""
WASTE = 1.5
"""Rows of different widths share a pass as long as padding does not make it this much larger."""
CAPACITY = 64
"""Tokens that a row or a branch has room for at first."""


class Side:
    """Layers 0..``stop``-1 of a model over all rows.

    ``attention_layers``: the last ones whose attention can be asked for. ``vocabulary``: tokens that both models know; logits
    of padding beyond them are cut off. ``whole_rows``: keep account of whole rows of attention, which costs a second product
    of queries and keys in those layers at every pass.
    """

    start = 0

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop: int | None = None,
        slots: int = 1,
        attention_layers: int = 0,
        vocabulary: int | None = None,
        whole_rows: WholeRows | None = None,
    ) -> None:
        self.decoder = decoder
        self.whole_rows = whole_rows
        self.vocabulary = decoder.vocabulary_size if vocabulary is None else vocabulary
        self.stop = decoder.layers if stop is None else stop
        self.attention_layers = min(attention_layers, self.stop)
        self.passes = 0
        """Forward passes so far, each over any number of rows."""
        self.processed = 0
        """Tokens so far, those of dropped candidates and padding included."""
        self.keeps_states = False
        self.cache = decoder.new_cache(slots, CAPACITY)
        self.seats = [Seat() for _ in range(slots)]
        self._pool: Cache | None = None
        self._free: list[int] = []
        self._branch_masses: dict[int, Tensor] = {}
        self._lower_masses: dict[int, Tensor] = {}
        self._executed = [0] * decoder.layers

    @property
    def layer_executions(self) -> list[int]:
        """Tokens that each layer of the model has processed, candidates' and padding included."""
        return sum_by_layer(
            self._executed, self.cache.layer_executions(), self._pool.layer_executions() if self._pool else []
        )

    @property
    def branches_in_use(self) -> int:
        """Branches that some candidate holds."""
        return 0 if self._pool is None else self._pool.batch - len(self._free)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all rows and branches; a cache that two sides share counts for one of them."""
        return self.cache.nbytes + (0 if self._pool is None else self._pool.nbytes)

    def add_slots(self, count: int) -> None:
        """Seats for ``count`` more rows."""
        self.cache.add_rows(count)
        self.seats += [Seat() for _ in range(count)]

    def clear(self, slot: int) -> None:
        """Forget a row; the seat is free for another."""
        self.seats[slot] = Seat()
        self.cache.lengths[slot] = 0

    def release_storage(self) -> None:
        """Give back the room that long rows have taken. Only while no row is seated."""
        if self.cache.capacity > CAPACITY or self._pool is not None:
            self._executed = self.layer_executions
            self.cache = self.decoder.new_cache(len(self.seats), CAPACITY)
            self._pool, self._free = None, []

    def prefill(self, slot: int, tokens: Sequence[int]) -> None:
        """Process part of a prompt, as a pass of its own."""
        self._advance([Work(slot, list(tokens))], prefill=True)

    def feed(self, work: Sequence[Work]) -> list[Passed]:
        """Process each row's tokens behind it. They count from then on; :meth:`rewind` takes them back."""
        found: dict[int, Passed] = {}
        for group in self._groups(work):
            found |= zip(group, self._advance([work[index] for index in group]), strict=True)
        return [found[index] for index in range(len(work))]

    def rewind(self, slot: int, length: int, tail: Tensor | None) -> None:
        """Have processed no more than ``length`` tokens of a row; ``tail`` is the state after the last that stays."""
        seat = self.seats[slot]
        if seat.length <= length:
            return
        if seat.kept:
            states = torch.cat(seat.kept)
            left = len(states) - (seat.length - length)
            seat.kept = [states[:left]] if left > 0 else []
        seat.length, seat.tail = length, tail
        cut_masses(seat, length)
        self.cache.lengths[slot] = length

    def branch(self, slot: int, count: int) -> list[int]:
        """``count`` branches that go on from what is processed of a row."""
        pool = self._pool
        if pool is None:
            pool = self._pool = self.cache.branches(count, capacity=CAPACITY, layers=self.stop)
            self._free = list(range(count))
        if len(self._free) < count:
            more = max(count - len(self._free), pool.batch)
            self._free += range(pool.batch, pool.batch + more)
            pool.add_rows(more)
        # The lowest first: branches of one row then mostly stand side by side.
        self._free.sort()
        taken, self._free = self._free[:count], self._free[count:]
        pool.point(taken, [slot] * count)
        masses = self.seats[slot].masses
        if masses is not None:
            self._branch_masses |= dict.fromkeys(taken, masses)
        return taken

    def grow(self, branches: Sequence[int], tokens: Sequence[int], since: Sequence[int] | None) -> list[Passed]:
        """One more token for each branch. ``since``: where the step of each starts, if attention is asked for."""
        pool = self._pool
        assert pool is not None
        view = pool.select(branches)
        ids = torch.tensor(tokens, device=self.decoder.device).view(-1, 1)
        passed = self._whole(ids, view, view.lengths, since)
        for branch, one in zip(branches, passed, strict=True):
            self._note_masses(one, self._branch_masses, branch, pool.lengths[branch])
            if one.lower is not None:
                self._note_masses(one.lower, self._lower_masses, branch, pool.lengths[branch])
            pool.lengths[branch] += 1
        return passed

    def _note_masses(self, passed: Passed, known: dict[int, Tensor], branch: int, position: int) -> None:
        if self.whole_rows is not None and passed.rows is not None:
            passed.rows = self.whole_rows.kept(passed.rows[..., : position + 1])
            passed.masses = self.whole_rows.masses(passed.rows, known[branch], position)
            known[branch] = torch.cat([known[branch], passed.masses], 1)

    def take(self, slot: int, branch: int, passed: Sequence[Passed]) -> None:
        """Make a branch the continuation of its row; ``passed`` is what each of its tokens gave."""
        self._absorb(branch)
        seat = self.seats[slot]
        seat.length = self.cache.lengths[slot]
        append_masses(seat, passed)
        if passed:
            seat.tail = passed[-1].states[-1]
            if self.keeps_states:
                seat.kept += [one.states for one in passed]

    def head(self, states: Tensor) -> Tensor:
        """Raw logits (rows, vocabulary), float32, of what follows states (rows, hidden)."""
        return self.decoder.logits(states)[:, : self.vocabulary]

    def free(self, branches: Iterable[int]) -> None:
        """Nobody needs these branches any more."""
        for branch in branches:
            self._free.append(branch)
            self._branch_masses.pop(branch, None)
            self._lower_masses.pop(branch, None)

    def _absorb(self, branch: int) -> None:
        assert self._pool is not None
        self.cache.absorb(self._pool, [branch])

    def _advance(self, work: Sequence[Work], *, prefill: bool = False) -> list[Passed]:
        width = max(len(one.tokens) for one in work)
        slots = [one.slot for one in work]
        positions = [self.seats[slot].length for slot in slots]
        asked = any(one.since is not None for one in work)
        # A step may begin within the pass, behind tokens that were still to be processed: its attention is cut out below.
        first = [p if one.since is None else min(one.since, p) for one, p in zip(work, positions, strict=True)]
        hidden, attention = self._layers(
            self._entering(work, width), self.cache.select(slots), positions, first if asked else None, prefill=prefill
        )
        found = []
        for place, (one, position) in enumerate(zip(work, positions, strict=True)):
            count = len(one.tokens)
            passed = Passed(hidden[place, :count])
            skipped = 0 if one.since is None else max(0, one.since - position)
            if self.whole_rows is not None and attention is not None:
                # Padding is cut off first: what it looks at may leave nothing to renormalise.
                rows = self.whole_rows.kept(attention[:, place, :, :count, : position + count])
                passed.masses = self.whole_rows.masses(rows, self.seats[one.slot].masses, position)
                passed.rows = rows[:, skipped:]
            elif attention is not None and one.since is not None:
                columns = slice(one.since - first[place], position + count - first[place])
                passed.blocks = attention[:, place, skipped:count, columns]
            self._note(one.slot, count, passed)
            found.append(passed)
        return found

    def _entering(self, work: Sequence[Work], width: int) -> Tensor:
        """What enters this side's first layer, (rows, width, hidden), rows filled up on the right."""
        ids = [one.tokens + [0] * (width - len(one.tokens)) for one in work]
        return self.decoder.embed(torch.tensor(ids, device=self.decoder.device))

    def _note(self, slot: int, count: int, passed: Passed) -> None:
        seat = self.seats[slot]
        seat.length += count
        seat.tail = passed.states[-1]
        append_masses(seat, [passed])
        if self.keeps_states:
            seat.kept.append(passed.states)
        self.cache.lengths[slot] = seat.length

    def _whole(self, ids: Tensor, view: Cache, positions: Sequence[int], since: Sequence[int] | None) -> list[Passed]:
        """Tokens (rows, 1) of branches from the embedding to this side's last layer."""
        return self._passed(*self._layers(self.decoder.embed(ids), view, positions, since))

    def _passed(self, hidden: Tensor, attention: Tensor | None) -> list[Passed]:
        found = [Passed(state) for state in hidden]
        if attention is not None:
            for row, one in enumerate(found):
                if self.whole_rows is None:
                    one.blocks = attention[:, row]
                else:
                    one.rows = attention[:, row]
        return found

    def _layers(
        self,
        hidden: Tensor,
        view: Cache,
        positions: Sequence[int],
        since: Sequence[int] | None,
        *,
        prefill: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """This side's layers, and attention: blocks (layers, rows, T, span), or whole rows with heads apart, for ``whole_rows``."""
        self.passes += 1
        self.processed += hidden.shape[0] * hidden.shape[1]
        first = self.stop - self.attention_layers
        if self.whole_rows is not None:
            layers = range(first, self.stop)
            hidden, rows = self.decoder.run_with_rows(
                hidden, self.start, self.stop, view, positions, rows=layers, prefill=prefill
            )
            return hidden, torch.stack([rows[index] for index in layers])
        if since is None:
            return self.decoder.run(hidden, self.start, self.stop, view, positions, prefill=prefill), None
        return self.decoder.run_with_blocks(
            hidden, self.start, self.stop, view, positions, since=since, first_layer=first
        )

    def _groups(self, work: Sequence[Work]) -> list[list[int]]:
        """Rows that share a pass: of like widths, and none padded beyond the model's positions."""
        groups: list[list[int]] = []
        total = 0
        for index in sorted(range(len(work)), key=lambda place: -len(work[place].tokens)):
            own = len(work[index].tokens)
            if groups:
                width = len(work[groups[-1][0]].tokens)
                fits = self.seats[work[index].slot].length + width <= self.decoder.max_positions
                if fits and width * (len(groups[-1]) + 1) <= WASTE * (total + own):
                    groups[-1].append(index)
                    total += own
                    continue
            groups.append([index])
            total = own
        return groups


def sum_by_layer(*counts: Sequence[int]) -> list[int]:
    """Counts per layer added up; shorter ones have none of the later layers."""
    return [sum(layer) for layer in zip_longest(*counts, fillvalue=0)]
