"""How prompts are read: in pieces between the turns of those who decode, once for all who have the same, and not at all where a
cache of prefixes knows what the models made of them.

A prompt's rounding does not depend on which rows decode meanwhile, nor on what was cached: where a pass rounds by its width, pieces
end at fixed places, and elsewhere they may end anywhere, so that others wait no longer than they should.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.decode.model_state import LateLayersState, ModelState, PassInput
from telltale.decode.pass_costs import clock_of
from telltale.decode.prefix_cache import PrefixCache
from telltale.decode.rows import Row, Scoring, refuse_no_distribution
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder
from telltale.models.weights import contents_of

PIECE = 64
"""Tokens of a prompt that the native kernels read at once; wider passes are no faster, and others wait for the end of one."""
PIECE_BY_PYTORCH = 128
"""The same for PyTorch's own kernels on a CPU: narrower passes are slower, and in wider ones others wait for long."""
PIECE_ACCELERATED = 512
"""The same on a GPU, where narrow passes cost as much as wide ones."""
PATIENCE, SHORTEST = 0.08, 16
"""Seconds that others wait for what is read of a prompt in a turn, and the fewest tokens that are read; where a pass rounds by its
width, pieces stay whole."""
SCORED = 64
"""Tokens whose logits are held at a time while a prompt is scored."""


def piece_of(decoder: Decoder) -> int:
    """Tokens of a piece for this decoder."""
    if decoder.device.type != "cpu":
        return PIECE_ACCELERATED
    return PIECE if decoder.reads_exactly else PIECE_BY_PYTORCH


class PromptReader:
    """Reads the prompts of an engine's ``rows`` with its ``states``, the target's the last.

    ``together``: all rows come before the first turn and their prompts share one pass. ``prefix_cache``: bytes
    for what was read before, None to read everything.
    """

    def __init__(
        self,
        states: list[ModelState],
        rows: dict[int, Row],
        *,
        together: bool,
        prefix_cache: int | None,
    ) -> None:
        self.unread: set[int] = set()
        """Numbers of rows that may have something to read."""
        self.prefixes: PrefixCache | None = None
        """What was read before; None where it is not kept."""
        self._states = states
        self._target = states[-1]
        self._draft = states[0] if len(states) > 1 else None
        self._rows = rows
        self._together = together
        self._clock = clock_of(self._target.decoder)
        self._piece = piece_of(self._target.decoder)
        if prefix_cache is not None and all(state.decoder.reads_alike for state in states):
            exact = all(state.reads_exactly for state in states)
            self.prefixes = PrefixCache(prefix_cache, piece=self._piece, exact=exact)
        self._contents: list[list[Any]] | None = None
        """The weights as they were when they were last looked at."""
        self._pace: float | None = None
        """Seconds that a prompt's token took when the last ones were read: more, the longer the text before it."""
        self._turns = itertools.count()
        self._since: dict[int, int] = {}
        """When a row came or last had its turn, by number."""

    def _look_at_weights(self) -> None:
        """Forget what was read with weights that are others now: whatever is written into a model counts from then on."""
        decoders = {id(state.decoder): state.decoder for state in self._states}.values()
        # One model may serve several states; its weights are read once.
        models = {id(decoder.model): decoder.model for decoder in decoders}
        if self._target.shared:
            for decoder in decoders:
                decoder.look_at_weights()
            if self.prefixes is None:
                return
            compared = {id(decoder.model) for decoder in decoders if decoder.weight_format == "int8"}
            now = [contents_of(model, shared=True, compared=place in compared) for place, model in models.items()]
        else:
            now = [contents_of(model, shared=False) for model in models.values()]
            if now != self._contents:
                for decoder in decoders:
                    decoder.look_at_weights()
        if self.prefixes is not None and self._contents is not None and now != self._contents:
            self.prefixes.clear()
        self._contents = now

    def add(self, number: int) -> None:
        """A row has come, or needs a state that has not read its prompt."""
        if number not in self._since and len(self._rows) == 1:
            self._look_at_weights()
        self.unread.add(number)
        self._since[number] = next(self._turns)

    def drop(self, number: int) -> None:
        """A row has gone."""
        self.unread.discard(number)
        self._since.pop(number, None)

    def ready(self) -> list[Row]:
        """Rows whose prompts the models have read as far as they are needed now; others get a piece read."""
        if not self.unread:
            return list(self._rows.values())
        if self._together:
            rows = [self._rows[number] for number in sorted(self.unread)]
            self._target.prefill([PassInput(row.slot, row.prompt) for row in rows])
            self.unread.clear()
            return list(self._rows.values())
        ready, reading = [], []
        for row in self._rows.values():
            waiting = self._waiting(row) if row.number in self.unread else []
            if waiting:
                if self._reads(row):
                    reading.append((row, waiting))
            else:
                ready.append(row)
                self.unread.discard(row.number)
        # Who has waited longest, since its arrival or its last piece: a short prompt waits for one piece of each long one, and no
        # long one is overtaken for good.
        reading.sort(key=lambda one: self._since[one[0].number])
        # While some row decodes a turn reads one piece at most, else one of each row: new rows and leavers are seen in between.
        budget = self._short_piece() if ready else self._piece * len(reading)
        for row, waiting in reading:
            for state in waiting:
                budget -= self._read(row, state, min(budget, self._piece))
            self._since[row.number] = next(self._turns)
            if not self._waiting(row):
                ready.append(row)
                self.unread.discard(row.number)
            if budget <= 0:
                break
        return ready

    def keep(self, row: Row) -> None:
        """Keep what was made of a row that leaves, its output included, where that is exact."""
        if self.prefixes is None or not self.prefixes.exact or row.failure is not None:
            return
        for place, state in enumerate(self._states):
            # States that wait for the layers above are gone, and without them the lower layers' part is of no use alone.
            if not state.keeps_states:
                self._store(row, place, 0, min(state.rows[row.slot].length, row.length))

    def note_boundary(self, row: Row) -> None:
        """Whether the row will reach the position at which the target reads it anew; where that cannot be done it is refused."""
        last = len(row.prompt) + row.stopping.limit
        for state in self._states:
            boundary = state.decoder.rereads_at
            if boundary is None or not len(row.prompt) <= boundary < last:
                continue
            if row.by_steps or isinstance(self._target, LateLayersState):
                raise ConfigError(
                    f"the prompt has {len(row.prompt)} tokens and may grow to {last}; this {state.decoder.family} model reads the "
                    f"whole text anew at {boundary + 1} tokens, which cannot be done in the middle of a drafted step. Lower "
                    f"max_new_tokens, or decode token by token."
                )
            if state is self._target:
                row.rereads_at = boundary

    def reread(self, row: Row) -> None:
        """Read a row anew with the rotary embeddings of a long text, as its family does when it gets there."""
        row.rereads_at = None
        self._target.truncate(row.slot, 0)
        tokens = row.tokens_from(0)[:-1]
        piece = self._piece
        for start in range(0, len(tokens), piece):
            self._target.prefill([PassInput(row.slot, tokens[start : start + piece], length=row.length)])

    def _waiting(self, row: Row) -> list[ModelState]:
        """The states that are needed now and have not read the row's whole prompt."""
        states: Iterable[ModelState] = self._states
        if self._draft is not None and row.by_steps and not row.redoing and not row.config.target_scores:
            # Where its steps are scored beside, the target reads the prompt as well.
            states = [self._draft] if row.beside is None else self._states
        elif not row.by_steps and (row.plan is None or row.plan.drafter != "model"):
            states = [self._target]
        found = []
        for state in states:
            if state.rows[row.slot].length < len(row.prompt):
                self._take_over(row, state)
            if state.rows[row.slot].length < len(row.prompt):
                found.append(state)
        return found

    def _reads(self, row: Row) -> bool:
        """Whether it is for this row to read its prompt; of rows that share one, a single row does."""
        shared = row.shared
        if shared is None:
            return True
        reader = self._rows.get(shared.reader)
        if reader is None or reader.shared is not shared or reader.number not in self.unread:
            shared.reader = row.number
        return shared.reader == row.number

    def _take_over(self, row: Row, state: ModelState) -> None:
        """Go on as a row that has read the same: another one of the request, or one that the cache remembers."""
        place, own = self._states.index(state), state.rows[row.slot]
        found = None if row.shared is None else row.shared.read.get(place)
        if found is not None and not own.length:
            state.take_over(row.slot, found)
            if state is self._target:
                row.reused_tokens = len(row.prompt)
            return
        if self.prefixes is None or not self._reads(row):
            return
        # The last token is read anew where its state is needed and any piece would do: a part that ends earlier has no other.
        most = len(row.prompt) - (1 if self.prefixes.exact else 0)
        if row.scoring is not None:
            most = min(most, row.scoring.start - 1)
        pending = state.keeps_states and row.by_steps
        while own.length < most:
            known = self.prefixes.find(place, row.prompt, own.length, most, pending=pending)
            if known is None:
                return
            part, count = known
            if state is self._target and self._draft is not None and self._draft.keeps_states:
                ahead = self._draft.rows[row.slot].length - own.length
                count = min(count, ahead) if ahead else count
            state.take_over(row.slot, part, count)
            if state is self._target:
                row.reused_tokens += count
                row.cached_tokens += count

    def _short_piece(self) -> int:
        """Tokens of a prompt that may be read while others wait."""
        if self._pace is None or not all(state.reads_exactly for state in self._states):
            return self._piece
        return min(self._piece, max(SHORTEST, int(PATIENCE / max(self._pace, 1e-9))))

    def _read(self, row: Row, state: ModelState, budget: int) -> int:
        """Read pieces of a row's prompt until ``budget`` is used up; how many tokens it took."""
        prompt, taken, place = row.prompt, 0, self._states.index(state)
        began = self._clock()
        if not state.rows[row.slot].length:
            # Now, when there is nothing of it to be moved: others would wait for that.
            state.cache.reserve([len(prompt) if slot == row.slot else 0 for slot in range(state.cache.batch)])
        while state.rows[row.slot].length < len(prompt) and taken < budget:
            start = state.rows[row.slot].length
            first = start - start % self._piece
            stop = min(len(prompt), first + self._piece)
            if state.reads_exactly:
                stop = min(stop, start + budget - taken)
            piece = PassInput(row.slot, prompt[start:stop], length=len(prompt))
            if row.scoring is not None and stop > row.scoring.start - 1:
                self._score(row, row.scoring, piece, start)
            else:
                state.prefill([piece])
            taken += stop - start
            whole = stop % self._piece == 0 or stop == len(prompt)
            plain = row.scoring is None or stop < row.scoring.start
            if self.prefixes is not None and whole and (plain or self.prefixes.exact):
                self._store(row, place, first, stop)
        if row.shared is not None and state.rows[row.slot].length == len(prompt):
            row.shared.read[place] = state.part(row.slot, 0, len(prompt))
        if taken:
            self._pace = (self._clock() - began) / taken
        return taken

    def _store(self, row: Row, place: int, start: int, stop: int) -> None:
        """Keep the pieces of a row's tokens between ``start``, where one begins, and ``stop``."""
        assert self.prefixes is not None
        state, tokens = self._states[place], row.tokens_from(0)
        for first in range(start, stop, self._piece):
            last = min(first + self._piece, stop)
            if self.prefixes.wants(place, tokens, first, last):
                part = state.part(row.slot, first, last)
                if not state.keeps_states or part.pending is not None:
                    self.prefixes.put(place, tokens, part)

    def _score(self, row: Row, scoring: Scoring, given: PassInput, start: int) -> None:
        """Read a piece of a row's prompt, from ``start`` on, and note how likely the target finds its tokens."""
        before = self._target.rows[row.slot].last_hidden
        [passed] = self._target.feed([given])
        piece = given.tokens
        states = passed.states[:-1] if before is None else torch.cat([before.unsqueeze(0), passed.states[:-1]])
        first = start + len(piece) - len(states)
        skipped = max(0, scoring.start - first)
        note_scores(self._target, row, scoring, states[skipped:], piece[len(piece) - len(states) + skipped :])


def note_scores(target: ModelState, row: Row, scoring: Scoring, states: Tensor, tokens: list[int]) -> None:
    """Note how likely ``target`` finds each of a row's ``tokens`` from its states (n, hidden) before them."""
    for place in range(0, len(tokens), SCORED):
        logits = target.head(states[place : place + SCORED])
        logits = refuse_no_distribution(logits, [row] * len(logits), "target")
        scoring.add(logits, tokens[place : place + SCORED])


def score_beside(target: ModelState, rows: Sequence[Row]) -> None:
    """Read the new tokens of ``rows`` that are scored while they are decoded, whoever wrote them, in places of their own."""
    work = []
    for row in rows:
        state = target.rows[row.beside_slot]
        if not state.length and len(row.prompt) > 1:
            target.take_over(row.beside_slot, target.part(row.slot, 0, len(row.prompt) - 1))
        work.append(PassInput(row.beside_slot, row.tokens_from(target.rows[row.beside_slot].length)[:-1]))
    for row, given, passed in zip(rows, work, target.feed(work), strict=True):
        assert row.beside is not None
        first = target.rows[row.beside_slot].length - len(given.tokens) + 1
        note_scores(target, row, row.beside, passed.states, row.tokens_from(first))
