"""One model's progress through every row. The target has a state, and so has a draft.

A row has a slot in the state's cache. Candidates of a step are branches that share the row's cache without copying it; a
single candidate is written behind the row itself and removed by truncating. Tokens are fed as ids, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from telltale.models.cache import Cache
from telltale.models.decoder import Decoder

WASTE = 1.5
"""Rows of different widths share a pass as long as padding does not make it this much larger."""
CAPACITY = 64
"""Initial capacity of a row or a branch, in tokens."""
_VIEWS = 64
"""Views of a cache that are kept for the next pass over the same rows."""


@dataclass
class RowState:
    """What a model has processed of a row: ``length`` tokens, and ``last_hidden`` (hidden,), its state after the last of them if
    it may still be needed."""

    length: int = 0
    last_hidden: Tensor | None = None
    pending_states: list[Tensor] = field(default_factory=list)
    """States (n, hidden) that the layers above have not seen yet; empty unless one model has both roles."""


@dataclass
class PassInput:
    """Tokens to be processed behind a row.

    ``since``: the position where its step starts, if attention is asked for. ``length``: that of the prompt of which they are a
    part, None if they end it.
    """

    slot: int
    tokens: list[int]
    since: int | None = None
    length: int | None = None


@dataclass
class PassOutput:
    """What a pass gives of one row.

    ``states`` (T, hidden) after the model's last layer, before the final norm; ``blocks`` (layers, step tokens, step tokens), the
    attention of the step's tokens on the step, averaged over heads, None unless asked for; ``lower`` what the draft's layers gave
    where one model has both roles and a branch of the whole model grew.
    """

    states: Tensor
    blocks: Tensor | None = None
    lower: PassOutput | None = None


@dataclass
class Part:
    """What a state has made of a row's tokens ``start`` to ``stop`` - 1, for other rows that begin with the same tokens: keys and
    values by layer."""

    start: int
    stop: int
    cached: list[tuple[Tensor, Tensor]]
    last_hidden: Tensor | None = None
    """The state after the last of them, if it was known."""
    pending: Tensor | None = None
    """States (n, hidden) that the layers above had not seen, where one model has both roles."""
    lower: Part | None = None
    """Of the layers below, where one model has both roles."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        own = sum(keys.nbytes + values.nbytes for keys, values in self.cached)
        own += sum(state.nbytes for state in (self.last_hidden, self.pending) if state is not None)
        return own + (0 if self.lower is None else self.lower.nbytes)


class ModelState:
    """Layers 0..``stop``-1 of a model over all rows.

    ``attention_layers``: the last ones whose attention can be asked for. ``vocabulary``: tokens that both models know; logits
    of padding beyond them are cut off.
    """

    start = 0

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop: int | None = None,
        slots: int = 1,
        capacity: int = CAPACITY,
        attention_layers: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.vocabulary = decoder.vocabulary_size if vocabulary is None else vocabulary
        self.stop = decoder.layers if stop is None else stop
        self.attention_layers = min(attention_layers, self.stop)
        self.passes = 0
        """Forward passes so far, each over any number of rows."""
        self.reads_exactly = False
        """Whether prompts are read by passes whose rounding does not depend on their width, so that pieces may end anywhere."""
        self.shared = True
        """Whether others may write into the model's weights uncounted (:meth:`telltale.decode.StepVerified.engine`)."""
        self.keeps_states = False
        self.cache = decoder.new_storage(slots, capacity)
        self.rows = [RowState() for _ in range(slots)]
        self._pool: Cache | None = None
        self._free: list[int] = []
        self._executed = [0] * decoder.layers
        self._views: dict[tuple[Any, ...], Cache] = {}

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
        """Keys and values of all rows and branches; a cache that two states share counts for one of them."""
        return self.cache.nbytes + (0 if self._pool is None else self._pool.nbytes)

    @property
    def knows_every_token(self) -> bool:
        """Whether no logits are cut off, so that a decoder's own greedy choice is the state's."""
        return self.vocabulary == self.decoder.vocabulary_size

    def add_slots(self, count: int) -> None:
        """Add ``count`` empty rows."""
        self.cache.add_rows(count)
        self.rows += [RowState() for _ in range(count)]

    def clear(self, slot: int) -> None:
        """Forget a row; the slot is free for another."""
        self.rows[slot] = RowState()
        self.cache.truncate(slot, 0)

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot, so that the rows under way are adjacent."""
        self.cache.move(source, target)
        self.rows[target], self.rows[source] = self.rows[source], RowState()

    def release_storage(self) -> None:
        """Free the storage that long rows have used. Only while there is no row."""
        if self.cache.capacity > CAPACITY or len(self.rows) > 1 or self._pool is not None:
            self._executed = self.layer_executions
            self.cache, self.rows = self.decoder.new_storage(1, CAPACITY), [RowState()]
            self._pool, self._free = None, []
            self._views.clear()

    def part(self, slot: int, start: int, stop: int) -> Part:
        """A copy of what has been made of a row's tokens ``start`` to ``stop`` - 1; :meth:`take_over` gives it to another row."""
        row, pending = self.rows[slot], None
        if row.pending_states:
            states = torch.cat(row.pending_states)
            first = row.length - len(states)
            pending = states[start - first : stop - first].clone() if first <= start else None
        last = row.last_hidden.clone() if stop == row.length and row.last_hidden is not None else None
        return Part(start, stop, self.cache.copied(slot, start, stop, range(self.start, self.stop)), last, pending)

    def take_over(self, slot: int, part: Part, count: int | None = None) -> None:
        """Have a row that has processed ``part.start`` tokens go on as the one that ``part`` is of, for its first ``count`` tokens.

        None takes all of them. To the bit, and without a pass.
        """
        row, whole = self.rows[slot], part.stop - part.start
        count = whole if count is None else count
        row.length = part.start + count
        self.cache.put(slot, part.start, row.length, part.cached, range(self.start, self.stop))
        row.last_hidden = part.last_hidden if count == whole else None
        if part.pending is not None:
            row.pending_states.append(part.pending[:count])
        self.cache.truncate(slot, row.length)

    def select(self, slots: Sequence[int]) -> Cache:
        """The cache's rows ``slots`` as a batch, for passes of the decoder."""
        return self._selected(self.cache, slots)

    def prefill(self, work: Sequence[PassInput]) -> None:
        """Process parts of prompts in one pass of their own."""
        self._advance(work, prefill=True)
        for one in work:
            row = self.rows[one.slot]
            if row.last_hidden is not None:
                # Not a view, which would keep all states of the prompt.
                row.last_hidden = row.last_hidden.clone()

    def feed(self, work: Sequence[PassInput]) -> list[PassOutput]:
        """Process each row's tokens behind it. They count from then on; :meth:`truncate` takes them back."""
        found: dict[int, PassOutput] = {}
        for group in self._groups(work):
            found |= zip(group, self._advance([work[index] for index in group]), strict=True)
        return [found[index] for index in range(len(work))]

    def advance(self, slot: int, length: int, *, passes: int = 0) -> None:
        """Note that all layers have processed ``length`` tokens of a row, by calls of the decoder on :meth:`select`,
        ``passes`` of them now.
        """
        self.passes += passes
        row = self.rows[slot]
        row.length, row.last_hidden = length, None
        self.cache.truncate(slot, length)

    def truncate(self, slot: int, length: int, last_hidden: Tensor | None = None) -> None:
        """Have processed no more than ``length`` tokens of a row; ``last_hidden`` is the state after the last that stays."""
        row = self.rows[slot]
        if row.length <= length:
            return
        if row.pending_states:
            states = torch.cat(row.pending_states)
            left = len(states) - (row.length - length)
            row.pending_states = [states[:left]] if left > 0 else []
        row.length, row.last_hidden = length, last_hidden
        self.cache.truncate(slot, length)

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
        # The lowest first: branches of one row are then mostly adjacent.
        self._free.sort()
        taken, self._free = self._free[:count], self._free[count:]
        pool.point(taken, [slot] * count)
        return taken

    def grow(self, branches: Sequence[int], tokens: Sequence[int], since: Sequence[int] | None) -> list[PassOutput]:
        """One more token for each branch. ``since``: where the step of each starts, if attention is asked for."""
        pool = self._pool
        assert pool is not None
        ids = torch.tensor(tokens, device=self.decoder.device).view(-1, 1)
        positions = [pool.lengths[branch] for branch in branches]
        found = self._whole(ids, self._selected(pool, branches), positions, since)
        for branch in branches:
            pool.truncate(branch, pool.lengths[branch] + 1)
        return found

    def take(self, slot: int, branch: int, passed: Sequence[PassOutput]) -> None:
        """Make a branch the continuation of its row; ``passed`` is what each of its tokens gave."""
        self._absorb(branch)
        row = self.rows[slot]
        row.length = self.cache.lengths[slot]
        if passed:
            row.last_hidden = passed[-1].states[-1]
            if self.keeps_states:
                row.pending_states += [one.states for one in passed]

    def head(self, states: Tensor) -> Tensor:
        """Raw logits (rows, vocabulary), float32, of what follows states (rows, hidden)."""
        return self.decoder.logits(states)[:, : self.vocabulary]

    def free(self, branches: Iterable[int]) -> None:
        """Free these branches."""
        self._free += branches

    def _selected(self, cache: Cache, rows: Sequence[int]) -> Cache:
        if len(rows) == cache.batch and list(rows) == list(range(cache.batch)):
            return cache
        key = (id(cache), *rows)
        view = self._views.get(key)
        if view is None or view.base is not cache or view.generation != cache.generation:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            view = self._views[key] = cache.select(rows)
        return view

    def _absorb(self, branch: int) -> None:
        assert self._pool is not None
        self.cache.absorb(self._pool, [branch])

    def _advance(self, work: Sequence[PassInput], *, prefill: bool = False) -> list[PassOutput]:
        width = max(len(one.tokens) for one in work)
        slots = [one.slot for one in work]
        positions = [self.rows[slot].length for slot in slots]
        asked = any(one.since is not None for one in work)
        # A step may begin within the pass, behind tokens that were still to be processed: its attention is cut out below.
        first = [p if one.since is None else min(one.since, p) for one, p in zip(work, positions, strict=True)]
        hidden, attention = self._layers(
            self._entering(work, width),
            self.select(slots),
            positions,
            first if asked else None,
            lengths=self._prompt_lengths(work) if prefill else None,
        )
        found = []
        for place, (one, position) in enumerate(zip(work, positions, strict=True)):
            count = len(one.tokens)
            passed = PassOutput(hidden[place, :count])
            if attention is not None and one.since is not None:
                skipped = max(0, one.since - position)
                columns = slice(one.since - first[place], position + count - first[place])
                passed.blocks = attention[:, place, skipped:count, columns]
            self._note(one.slot, count, passed)
            found.append(passed)
        return found

    def _entering(self, work: Sequence[PassInput], width: int) -> Tensor:
        """What enters the first layer, (rows, width, hidden), rows filled up on the right, where the position hides it."""
        ids = [one.tokens + [0] * (width - len(one.tokens)) for one in work]
        return self.decoder.embed(torch.tensor(ids, device=self.decoder.device))

    def _prompt_lengths(self, work: Sequence[PassInput]) -> list[int]:
        return [self.rows[one.slot].length + len(one.tokens) if one.length is None else one.length for one in work]

    def _note(self, slot: int, count: int, passed: PassOutput) -> None:
        row = self.rows[slot]
        row.length += count
        row.last_hidden = passed.states[-1]
        if self.keeps_states:
            row.pending_states.append(passed.states)
        self.cache.truncate(slot, row.length)

    def _whole(
        self, ids: Tensor, view: Cache, positions: Sequence[int], since: Sequence[int] | None
    ) -> list[PassOutput]:
        """Tokens (rows, 1) of branches from the embedding to the last layer."""
        return _by_row(*self._layers(self.decoder.embed(ids), view, positions, since))

    def _layers(
        self,
        hidden: Tensor,
        view: Cache,
        positions: Sequence[int],
        since: Sequence[int] | None,
        *,
        lengths: list[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layers, and attention (layers, rows, T, span) from ``since`` on if that is given; ``lengths``: of the prompts."""
        self.passes += 1
        if since is None:
            prefill = lengths is not None and not self.reads_exactly
            return (
                self.decoder.run(hidden, self.start, self.stop, view, positions, prefill=prefill, lengths=lengths),
                None,
            )
        return self.decoder.run_with_blocks(
            hidden,
            self.start,
            self.stop,
            view,
            positions,
            since=since,
            first_layer=self.stop - self.attention_layers,
        )

    def _groups(self, work: Sequence[PassInput]) -> list[list[int]]:
        """Rows that share a pass: of like widths, and none padded beyond the model's positions."""
        if len(work) == 1:
            return [[0]]
        groups: list[list[int]] = []
        total = 0
        for index in sorted(range(len(work)), key=lambda place: -len(work[place].tokens)):
            own = len(work[index].tokens)
            if groups:
                width = len(work[groups[-1][0]].tokens)
                fits = self.rows[work[index].slot].length + width <= self.decoder.max_positions
                if fits and width * (len(groups[-1]) + 1) <= WASTE * (total + own):
                    groups[-1].append(index)
                    total += own
                    continue
            groups.append([index])
            total = own
        return groups


class LateLayersState(ModelState):
    """The target's state where the draft is the first layers of the same model: the layers above ``lower``, over one cache.

    LayerSkip's self-speculation (arXiv 2404.16710, section 4.3) at the level of steps. What the draft computed is never computed
    again: this state goes on from the states that the draft's has kept.
    """

    def __init__(self, lower: ModelState, *, attention_layers: int = 0) -> None:
        super().__init__(
            lower.decoder, slots=len(lower.rows), attention_layers=attention_layers, vocabulary=lower.vocabulary
        )
        self.start = lower.stop
        self.attention_layers = min(attention_layers, self.stop - self.start)
        self.lower = lower
        lower.keeps_states = True
        self.cache = lower.cache

    @property
    def layer_executions(self) -> list[int]:
        """See :attr:`ModelState.layer_executions`; the lower state's included."""
        own = self._pool.layer_executions() if self._pool else []
        return sum_by_layer(self.lower.layer_executions, self._executed, own)

    @property
    def cache_bytes(self) -> int:
        """See :attr:`ModelState.cache_bytes`; the rows' own are the lower state's."""
        return 0 if self._pool is None else self._pool.nbytes

    def add_slots(self, count: int) -> None:
        """See :meth:`ModelState.add_slots`; the cache is the lower state's."""
        self.rows += [RowState() for _ in range(count)]

    def clear(self, slot: int) -> None:
        """See :meth:`ModelState.clear`."""
        self.rows[slot] = RowState()

    def move(self, source: int, target: int) -> None:
        """See :meth:`ModelState.move`; the cache is the lower state's."""
        self.rows[target], self.rows[source] = self.rows[source], RowState()

    def release_storage(self) -> None:
        """See :meth:`ModelState.release_storage`; the lower state comes first."""
        self._executed = sum_by_layer(self._executed, self._pool.layer_executions() if self._pool else [])
        self.cache, self.rows = self.lower.cache, [RowState()]
        self._pool, self._free = None, []
        self._views.clear()

    def part(self, slot: int, start: int, stop: int) -> Part:
        """See :meth:`ModelState.part`; the lower layers' are for rows of which these have processed nothing more."""
        found = super().part(slot, start, stop)
        found.lower = self.lower.part(slot, start, stop)
        found.lower.pending = None
        return found

    def take_over(self, slot: int, part: Part, count: int | None = None) -> None:
        """See :meth:`ModelState.take_over`; what the lower layers have processed beyond that stays."""
        row, lower = self.rows[slot], self.lower.rows[slot]
        whole = part.stop - part.start
        count = whole if count is None else count
        if lower.length == row.length:
            assert part.lower is not None
            self.lower.take_over(slot, part.lower, count)
        else:
            left = torch.cat(lower.pending_states)[count:]
            lower.pending_states = [left] if len(left) else []
        row.length = part.start + count
        self.cache.put(slot, part.start, row.length, part.cached, range(self.start, self.stop))
        row.last_hidden = part.last_hidden if count == whole else None

    def prefill(self, work: Sequence[PassInput]) -> None:
        """See :meth:`ModelState.prefill`; the lower layers run first where they have not yet."""
        missing = self._missing(work)
        if missing:
            self.lower.prefill(missing)
        super().prefill(work)

    def feed(self, work: Sequence[PassInput]) -> list[PassOutput]:
        """See :meth:`ModelState.feed`."""
        missing = self._missing(work)
        if missing:
            self.lower.feed(missing)
        return super().feed(work)

    def advance(self, slot: int, length: int, *, passes: int = 0) -> None:
        """See :meth:`ModelState.advance`; both states are then at the same position."""
        super().advance(slot, length, passes=passes)
        self.lower.rows[slot] = RowState(length)

    def truncate(self, slot: int, length: int, last_hidden: Tensor | None = None) -> None:
        """See :meth:`ModelState.truncate`. To be called before the lower state's."""
        row = self.rows[slot]
        if row.length > length:
            row.length, row.last_hidden = length, last_hidden

    def take(self, slot: int, branch: int, passed: Sequence[PassOutput]) -> None:
        """See :meth:`ModelState.take`; a branch of this state has gone through the layers of both."""
        self._absorb(branch)
        row, lower = self.rows[slot], self.lower.rows[slot]
        row.length = lower.length = self.cache.lengths[slot]
        below = [one.lower for one in passed if one.lower is not None]
        if passed:
            row.last_hidden, lower.last_hidden = passed[-1].states[-1], below[-1].states[-1]

    def _missing(self, work: Sequence[PassInput]) -> list[PassInput]:
        """What of ``work`` the lower layers have not processed."""
        ahead = [self.lower.rows[one.slot].length - self.rows[one.slot].length for one in work]
        missing = [
            PassInput(one.slot, one.tokens[count:], length=one.length) for one, count in zip(work, ahead, strict=True)
        ]
        return [one for one in missing if one.tokens]

    def _entering(self, work: Sequence[PassInput], width: int) -> Tensor:
        rows = []
        for one in work:
            own = torch.cat(self.lower.rows[one.slot].pending_states)[: len(one.tokens)]
            rows.append(torch.cat([own, own.new_zeros(width - len(own), own.shape[1])]))
        return torch.stack(rows)

    def _note(self, slot: int, count: int, passed: PassOutput) -> None:
        row, lower = self.rows[slot], self.lower.rows[slot]
        row.length += count
        row.last_hidden = passed.states[-1]
        left = torch.cat(lower.pending_states)[count:]
        lower.pending_states = [left] if len(left) else []

    def _whole(
        self, ids: Tensor, view: Cache, positions: Sequence[int], since: Sequence[int] | None
    ) -> list[PassOutput]:
        below = self.lower._whole(ids, view, positions, None)
        entering = torch.stack([one.states for one in below])
        passed = _by_row(*self._layers(entering, view, positions, since))
        for one, lower in zip(passed, below, strict=True):
            one.lower = lower
        return passed


def sum_by_layer(*counts: Sequence[int]) -> list[int]:
    """Counts per layer added up; shorter ones have none of the later layers."""
    return [sum(layer) for layer in zip_longest(*counts, fillvalue=0)]


def _by_row(hidden: Tensor, attention: Tensor | None) -> list[PassOutput]:
    if attention is None:
        return [PassOutput(state) for state in hidden]
    return [PassOutput(state, attention[:, row]) for row, state in enumerate(hidden)]
