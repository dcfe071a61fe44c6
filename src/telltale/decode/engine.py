"""The decoding loop: rows that come and go, each decoded plainly, by token-level speculation, or step by step.

At each turn every row gets something: a plain row a token, a speculating row a round, a row that drafts a step (SpecGuard, arXiv
2604.15244, algorithm 1) a token of each candidate or its verification, and a long prompt is read in pieces between the turns. So a
slow row holds up no other, and a row's output does not depend on the other rows. A single greedy row gets its tokens in blocks,
one call into the backend each, so that no Python runs between two tokens; tokens behind the end of an output are taken back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.decode import steps as drafting_steps
from telltale.decode.drafting import PLAIN, Choice, NgramIndex, OnlinePlan, Plan, clock_of
from telltale.decode.model_state import LateLayersState, ModelState, PassInput
from telltale.decode.results import StepRecord
from telltale.decode.rows import Row, Scoring, naming_place, refuse_no_distribution
from telltale.decode.speculative import SpeculativeRound, choose, speculate
from telltale.decode.steps import Encoder, Proposal, SignalsWanted, selected
from telltale.decode.stopping import FINAL_REASONS, StepText
from telltale.decode.verification import Verdict, Verification, Verifier
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder

BLOCK = 16
"""Plain tokens of a single greedy row between two turns."""
PREFILL_CHUNK = 512
"""Tokens of a prompt that are run at once; between two chunks other rows get their turn."""
SCORED = 64
"""Tokens whose logits are held at a time while a prompt is scored."""
_OBSERVED = 32
"""Prompt tokens at which every exit is read before the first plan."""


@dataclass(slots=True)
class Committed:
    """New tokens of one row. ``step`` is there when they end a step, ``reason`` when they end the output."""

    number: int
    tokens: list[int]
    step: StepRecord | None = None
    reason: str | None = None


class Engine:
    """Rows under way and the states of the models that write them. One thread at a time.

    ``steps`` and ``encoder`` are needed by rows that draft steps, ``draft`` by these and by drafts of a second model. ``together``:
    all rows come before the first turn and their prompts share one pass; otherwise prompts are read apart and in pieces.
    ``serving``: storage is given back when no row is left.
    """

    def __init__(
        self,
        target: ModelState,
        draft: ModelState | None = None,
        *,
        steps: StepText | None = None,
        encoder: Encoder | None = None,
        verifier: Verifier | None = None,
        together: bool = False,
        serving: bool = False,
    ) -> None:
        self.target = target
        self.draft = draft
        self.rows: dict[int, Row] = {}
        self.proposals: dict[int, Proposal] = {}
        """Steps under way, by row number."""
        self.verification: Verification | None = None
        if steps is not None and encoder is not None:
            self.verification = Verification(target, steps, encoder=encoder, verifier=verifier)
        self._together = together
        self._serving = serving
        self._unread: set[int] = set()
        self._free = list(range(len(target.rows)))
        self._holes = False
        self._admitted = 0
        self._clock = clock_of(target.decoder)

    @property
    def states(self) -> list[ModelState]:
        """The draft's state, if there is one, and the target's."""
        return [self.target] if self.draft is None else [self.draft, self.target]

    @torch.inference_mode()
    def admit(self, row: Row) -> int:
        """Take a row in; returns its number. Raises :class:`~telltale.errors.ConfigError` for a row that it cannot decode."""
        if self.draft is None and (row.by_steps or (row.plan is not None and row.plan.drafter == "model")):
            raise ConfigError(f"policy={row.config.policy!r} needs a draft; give one, or use policy='target'.")
        if row.by_steps:
            if self.verification is None:
                raise ConfigError("a row that drafts steps was given to an engine without a tokenizer for them.")
            if row.config.policy == "verifier" and self.verification.verifier is None:
                raise ConfigError("policy='verifier' needs a callable that scores steps; pass verifier=.")
            if row.greedy and row.config.compares_candidates:
                raise ConfigError(row.config.needs_candidates("temperature=0"))
        for state in self.states:
            state.decoder.check_capacity(len(row.prompt) + row.stopping.limit)
        self._note_boundary(row)
        if not self._free:
            more = len(self.target.rows)
            for state in self.states:
                state.add_slots(more)
            self._free = list(range(more, 2 * more))
        row.number, row.slot = self._admitted, heapq.heappop(self._free)
        self.rows[row.number] = row
        self._unread.add(row.number)
        self._admitted += 1
        return row.number

    def _note_boundary(self, row: Row) -> None:
        """Whether the row will reach the position at which the target reads it anew; where that cannot be done it is refused."""
        last = len(row.prompt) + row.stopping.limit
        for state in self.states:
            boundary = state.decoder.rereads_at
            if boundary is None or not len(row.prompt) <= boundary < last:
                continue
            if row.by_steps or isinstance(self.target, LateLayersState):
                raise ConfigError(
                    f"the prompt has {len(row.prompt)} tokens and may grow to {last}; this {state.decoder.family} model reads the "
                    f"whole text anew at {boundary + 1} tokens, which cannot be done in the middle of a drafted step. Lower "
                    f"max_new_tokens, or decode token by token."
                )
            if state is self.target:
                row.rereads_at = boundary

    @torch.inference_mode()
    def drop(self, number: int) -> None:
        """Drop a row at any stage; its slot and branches are free. Unknown numbers are ignored."""
        row = self.rows.pop(number, None)
        if row is None:
            return
        proposal = self.proposals.pop(number, None)
        if proposal is not None:
            proposal.close()
        for state in self.states:
            state.clear(row.slot)
        self._unread.discard(number)
        heapq.heappush(self._free, row.slot)
        self._holes = True
        if not self.rows and self._serving:
            for state in self.states:
                state.release_storage()
            self._free, self._holes = list(range(len(self.target.rows))), False

    @torch.inference_mode()
    def advance(self, block: int = BLOCK) -> list[Committed]:
        """One turn for every row. Returns what became final in it; a row that ended has left.

        ``block``: the most tokens that a single greedy row gets in one turn.
        """
        if self._holes:
            self._close_holes()
        ready = self._prefilled() if self._unread else list(self.rows.values())
        for row in ready:
            if row.rereads_at is not None and row.length > row.rereads_at:
                self._reread(row)
        if len(ready) > 1:
            ready.sort(key=_slot)
        scored = [row for row in ready if row.scoring is not None]
        plain: list[Row] = []
        speculating: dict[Plan, list[Row]] = {}
        stepping: list[Row] = []
        for row in ready:
            if row.scoring is not None:
                row.reason = "scored"
            elif row.by_steps and (not row.redoing or row.plan is None):
                stepping.append(row)
            elif row.plan is not None:
                speculating.setdefault(row.plan, []).append(row)
            else:
                plain.append(row)
        found = [Committed(row.number, [], reason=row.reason) for row in scored]
        if plain:
            found += self._plain(plain, block)
        for plan, rows in speculating.items():
            found += self._speculate(plan, rows, block)
        if stepping:
            found += self._step(stepping)
        for one in found:
            if one.reason is not None:
                self.drop(one.number)
        return found

    def _reread(self, row: Row) -> None:
        """Read a row anew with the rotary embeddings of a long text, as its family does when it gets there."""
        row.rereads_at = None
        self.target.truncate(row.slot, 0)
        tokens = row.tokens_from(0)[:-1]
        for start in range(0, len(tokens), PREFILL_CHUNK):
            self.target.prefill([PassInput(row.slot, tokens[start : start + PREFILL_CHUNK], length=row.length)])

    def _plain(self, rows: list[Row], block: int) -> list[Committed]:
        found, going = self._first_tokens(rows)
        if going:
            for row, new in zip(going, self._decoded(going, block), strict=True):
                found += self._extend(row, new, plain=True)
        return found

    def _unsettled(self, rows: Sequence[Row]) -> bool:
        """Whether there is a row of which the target has processed something else than all but the last token."""
        states = self.target.rows
        return any(states[row.slot].length != row.length - 1 for row in rows)

    def _first_tokens(self, rows: list[Row]) -> tuple[list[Committed], list[Row]]:
        """A token each for rows all of whose tokens the target has processed, and the rows that go on from their last token.

        This is the state behind a prompt. Where the target redoes a step, it first reads what the draft has written since.
        """
        states = self.target.rows
        if not self._unsettled(rows):
            return [], rows
        behind = [row for row in rows if states[row.slot].length < row.length - 1]
        if behind:
            for row in behind:
                row.stats.scored_tokens += row.drafted_from(states[row.slot].length)
            self.target.feed([PassInput(row.slot, row.tokens_from(states[row.slot].length)) for row in behind])
        fresh = [row for row in rows if states[row.slot].length == row.length]
        hidden = [states[row.slot].last_hidden for row in fresh]
        new = choose(self.target, fresh, torch.stack([state for state in hidden if state is not None]))
        found: list[Committed] = []
        for row, token in zip(fresh, new, strict=True):
            found += self._extend(row, [token], plain=True, first=True)
        kept = {row.number for row in fresh}
        return found, [row for row in rows if row.number not in kept]

    def _decoded(self, rows: list[Row], block: int) -> list[list[int]]:
        """New tokens of each row by the whole model: a block of a single greedy row, else one of each."""
        target, positions = self.target, [row.length - 1 for row in rows]
        decoder, view = target.decoder, target.select([row.slot for row in rows])
        if len(self.rows) == 1 and rows[0].sampling.plain_greedy and target.knows_every_token:
            [row] = rows
            new = naming_place(
                rows,
                "target",
                decoder.decode_greedy,
                row.tokens[-1],
                positions[0],
                count=min(block, row.draftable + 1),
                cache=view,
                stop_tokens=row.stopping.eos,
            )
            target.passes += len(new)
            return [new]
        ids = torch.tensor([row.tokens[-1] for row in rows], device=decoder.device).view(-1, 1)
        hidden = decoder.forward(ids, view, positions)
        target.passes += 1
        return [[token] for token in choose(target, rows, hidden[:, 0])]

    def _speculate(self, plan: Plan, rows: list[Row], block: int) -> list[Committed]:
        found, rows = self._first_tokens(rows)
        if not rows:
            return found
        started = self._clock()
        plan = plan.at(len(rows))
        match = 0
        copies = plan.drafter in ("ngram", "both")
        if copies:
            for row in rows:
                if row.ngrams is None:
                    row.ngrams = NgramIndex(row.prompt + row.tokens)
            matches = [row.ngrams.match for row in rows if row.ngrams is not None]
            match = max(matches) if plan.drafter == "ngram" else min(matches)
        choice = plan.next(match)
        draftable = rows[0].draftable if len(rows) == 1 else max(row.draftable for row in rows)
        length = min(choice.length, draftable)
        if choice.source == "observe":
            for row, new in zip(rows, self._observe(plan, rows), strict=True):
                found += self._extend(row, new, plain=True)
        elif length < 1:
            # With n-gram drafts, each new token may complete a match.
            decoded = self._decoded(rows, 1 if copies else block)
            plan.learn(PLAIN, match, 0, 0, (self._clock() - started) / len(decoded[0]))
            for row, new in zip(rows, decoded, strict=True):
                found += self._extend(row, new, plain=True)
        else:
            groups = [rows] if len(rows) == 1 else _fitting(rows, length, self.target.decoder.max_positions)
            for group in groups:
                if len(groups) > 1:
                    started = self._clock()
                    length = min(choice.length, max(row.draftable for row in group))
                asked = choice if length == choice.length else Choice(choice.source, choice.exit_layer, length)
                done = speculate(self.target, self.draft, group, asked, confidence=plan.confidence)
                seconds = self._clock() - started
                for place, row in enumerate(group):
                    plan.learn(choice, match, done.drafted[place], done.accepted[place], seconds)
                    found += self._confirmed(row, choice, done, place)
        return found

    def _confirmed(self, row: Row, choice: Choice, done: SpeculativeRound, place: int) -> list[Committed]:
        """Commit what a round gave of a row; drafts behind the end of the output or step do not count."""
        before, drafted = len(row.tokens), done.drafted[place]
        found = self._extend(row, done.emitted[place], plain=not drafted)
        kept = len(row.tokens) - before
        if drafted:
            row.stats.record_round(
                choice.source,
                exit_layer=choice.exit_layer,
                drafted=drafted,
                accepted=min(done.accepted[place], kept),
                kept=kept,
            )
        if self.draft is not None:
            self.draft.truncate(row.slot, row.length - 1)
        return found

    def _observe(self, plan: Plan, rows: Sequence[Row]) -> list[list[int]]:
        """A plain step that also reads every exit's prediction for the first row."""
        started = self._clock()
        target = self.target
        decoder, view = target.decoder, target.select([row.slot for row in rows])
        hidden = decoder.embed(torch.tensor([row.tokens[-1] for row in rows], device=decoder.device).view(-1, 1))
        positions, states = [row.length - 1 for row in rows], []
        for layer in range(decoder.layers):
            hidden = decoder.run(hidden, layer, layer + 1, view, positions)
            states.append(hidden[0])
        target.passes += 1
        new = [[token] for token in choose(target, rows, hidden[:, 0])]
        agreement = _agreement(decoder, torch.stack(states))
        plain = plan.costs.plain if isinstance(plan, OnlinePlan) else 0.0
        plan.observe_exits(agreement, max(self._clock() - started - plain, 0.0))
        return new

    def _extend(self, row: Row, new: list[int], *, plain: bool = False, first: bool = False) -> list[Committed]:
        """Append to a row what of ``new`` belongs to it, and note that the target has processed all of it but the last token."""
        tokens, stopping = row.tokens, row.stopping
        begin = len(tokens)
        found = []
        streams = not row.by_steps
        while new:
            count, reason = stopping.first_end(tokens, row.step_start, new)
            part, new = (new, []) if count == len(new) else (new[:count], new[count:])
            tokens += part
            one = Committed(row.number, part)
            if reason is not None:
                if stopping.steps is not None:
                    step = tuple(row.open_step)
                    record = StepRecord(step, stopping.steps.text(step), "target", reason, rejected=row.rejected)
                    one = self._close_step(row, record, part if streams else list(step))
                else:
                    one.reason = row.reason = reason
            if streams or reason is not None:
                found.append(one)
            if row.reason is not None or (reason is not None and row.by_steps):
                break
        kept = len(tokens) - begin
        if plain:
            row.stats.record_plain(kept, first=first)
        if row.ngrams is not None:
            row.ngrams.extend(tokens[begin:])
        self.target.advance(row.slot, row.length - 1)
        return found

    def _close_step(self, row: Row, record: StepRecord, tokens: list[int]) -> Committed:
        """The step at the end of a row's tokens is over. Returns ``tokens`` as committed with it."""
        row.repeats = row.repeats + 1 if row.steps and row.steps[-1].tokens == record.tokens else 1
        row.steps.append(record)
        row.step_start = len(row.tokens)
        row.stats.steps += 1
        row.stats.target_steps += record.source == "target"
        row.stats.tokens = len(row.tokens)
        row.redoing, row.rejected = False, None
        if record.end in FINAL_REASONS:
            row.reason = record.end
        elif row.by_steps and not row.config.never_accepts and row.repeats >= (row.config.repetition_limit or math.inf):
            # Where nothing is accepted the steps are the target's own, which may repeat itself.
            row.reason = "repetition"
        return Committed(row.number, tokens, record, row.reason)

    def _step(self, rows: Sequence[Row]) -> list[Committed]:
        """A token for every candidate; complete steps of the draft are verified, those of the target are accepted."""
        for row in rows:
            if row.number not in self.proposals:
                self.proposals[row.number] = self._proposal(row)
        proposals = [self.proposals[row.number] for row in rows]
        for state in self.states:
            going = [one for one in proposals if one.state is state]
            if going:
                drafting_steps.advance(state, going)
        done = [one for one in proposals if one.done]
        found = [self._redone(one) for one in done if one.role == "target"]
        return found + self._verified([one for one in done if one.role == "draft"])

    def _proposal(self, row: Row) -> Proposal:
        config = row.config
        if row.redoing:
            count = config.redone_samples(greedy=row.greedy)
            wanted = SignalsWanted(log_probabilities=count > 1 and config.selector == "log-probability")
            return Proposal(row, self.target, "target", count, wanted)
        assert self.draft is not None
        own = config.signal_model == "draft"
        wanted = SignalsWanted(
            log_probabilities=config.record_signals
            or (config.reads_log_probability and (own or config.score == "likelihood-ratio"))
            or config.selector == "log-probability",
            entropies=config.record_signals or (config.score == "entropy" and own and config.policy == "specguard"),
            grounding=config.record_signals or (config.reads_grounding and own),
        )
        wanted.own_row = wanted.grounding and config.row == "self" and not config.whole_rows
        return Proposal(row, self.draft, "draft", config.samples(greedy=row.greedy), wanted)

    def _redone(self, proposal: Proposal) -> Committed:
        """Accept the target's own step without verifying it."""
        assert self.verification is not None
        row = proposal.row
        place, _ = selected(proposal, self.verification.steps, self.verification.encoder)
        chosen = proposal.candidates[place]
        proposal.keep(place)
        del self.proposals[row.number]
        row.stats.target_tokens += len(chosen.tokens)
        row.stats.target_discarded_tokens += sum(len(c.tokens) for c in proposal.candidates) - len(chosen.tokens)
        assert chosen.end is not None
        text = self.verification.steps.text(chosen.tokens)
        row.tokens += chosen.tokens
        record = StepRecord(tuple(chosen.tokens), text, "target", chosen.end, rejected=row.rejected)
        return self._close_step(row, record, list(chosen.tokens))

    def _verified(self, proposals: Sequence[Proposal]) -> list[Committed]:
        """Accept, or have the target redo."""
        if not proposals:
            return []
        assert self.verification is not None
        found = []
        for verdict in self.verification.verify(proposals):
            row, record = verdict.proposal.row, verdict.record
            del self.proposals[row.number]
            if verdict.reason is None:
                verdict.proposal.keep(verdict.place)
                row.stats.accepted_steps += 1
                row.stats.accepted_tokens += len(record.tokens)
                row.tokens += record.tokens
                found.append(self._close_step(row, record, list(record.tokens)))
            else:
                self._reject(verdict)
        return found

    def _reject(self, one: Verdict) -> None:
        proposal, row = one.proposal, one.proposal.row
        one.record.reason = one.reason
        row.stats.rejected_steps += 1
        row.stats.rejected_tokens += len(one.record.tokens)
        if one.last_hidden is not None:
            self.target.truncate(row.slot, row.length, one.last_hidden)
        proposal.drop()
        row.rejected = one.record
        row.redoing = True
        self._unread.add(row.number)

    def _prefilled(self) -> list[Row]:
        """Rows whose prompts the models have read as far as they are needed now; others get a piece read."""
        if self._together:
            self._read_together([self.rows[number] for number in sorted(self._unread)])
            self._unread.clear()
            return list(self.rows.values())
        ready, reading = [], []
        for row in self.rows.values():
            waiting = self._waiting(row) if row.number in self._unread else []
            if waiting:
                if self._reads(row):
                    reading.append((row, waiting))
            else:
                ready.append(row)
                self._unread.discard(row.number)
        # The row with the fewest tokens read comes first, so that a short prompt never waits for a long one.
        reading.sort(key=lambda one: sum(state.rows[one[0].slot].length for state in self.states))
        # While some row decodes a turn reads one piece, else one of each row: new rows and leavers are seen in between.
        budget = PREFILL_CHUNK if ready else PREFILL_CHUNK * len(reading)
        for row, waiting in reading:
            for state in waiting:
                budget -= self._read(row, state, min(budget, PREFILL_CHUNK))
            if not self._waiting(row):
                ready.append(row)
                self._unread.discard(row.number)
            if budget <= 0:
                break
        return ready

    def _waiting(self, row: Row) -> list[ModelState]:
        """The states that are needed now and have not read the row's whole prompt."""
        states: Iterable[ModelState] = self.states
        if self.draft is not None and row.by_steps and not row.redoing and not row.config.target_scores:
            states = [self.draft]
        elif not row.by_steps and (row.plan is None or row.plan.drafter != "model"):
            states = [self.target]
        return [
            state
            for state in states
            if state.rows[row.slot].length < len(row.prompt) and not self._taken_over(row, state)
        ]

    def _reads(self, row: Row) -> bool:
        """Whether it is for this row to read its prompt; of rows that share one, a single row does."""
        shared = row.shared
        if shared is None:
            return True
        reader = self.rows.get(shared.reader)
        if reader is None or reader.shared is not shared or reader.number not in self._unread:
            shared.reader = row.number
        return shared.reader == row.number

    def _taken_over(self, row: Row, state: ModelState) -> bool:
        """Whether another row has read the prompt, so that this one has begun with what ``state`` made of it."""
        found = None if row.shared is None else row.shared.read.get(self.states.index(state))
        if found is None or state.rows[row.slot].length:
            return False
        state.take_over(row.slot, found)
        if state is self.target:
            row.reused_tokens = len(row.prompt)
        return True

    def _read(self, row: Row, state: ModelState, budget: int) -> int:
        """Read pieces of a row's prompt until ``budget`` is used up; how many tokens it took."""
        prompt, taken = row.prompt, 0
        while state.rows[row.slot].length < len(prompt) and taken < budget:
            start = state.rows[row.slot].length
            # Pieces end at fixed places, so that a prompt's rounding does not depend on which rows decode meanwhile.
            stop = min(len(prompt), start - start % PREFILL_CHUNK + PREFILL_CHUNK)
            piece = PassInput(row.slot, prompt[start:stop], length=len(prompt))
            if row.scoring is not None:
                self._score(row, row.scoring, piece, start)
            else:
                self._prefill(state, [piece], row.plan if not row.by_steps else None)
            taken += stop - start
        if row.shared is not None and state.rows[row.slot].length == len(prompt):
            row.shared.read[self.states.index(state)] = state.read_prompt(row.slot)
        return taken

    def _score(self, row: Row, scoring: Scoring, given: PassInput, start: int) -> None:
        """Read a piece of a row's prompt, from ``start`` on, and note how likely the target finds its tokens."""
        before = self.target.rows[row.slot].last_hidden
        [passed] = self.target.feed([given])
        piece = given.tokens
        states = passed.states[:-1] if before is None else torch.cat([before.unsqueeze(0), passed.states[:-1]])
        first = start + len(piece) - len(states)
        skipped = max(0, scoring.start - first)
        states, tokens = states[skipped:], piece[len(piece) - len(states) + skipped :]
        for place in range(0, len(tokens), SCORED):
            logits = self.target.head(states[place : place + SCORED])
            refuse_no_distribution(logits, [row] * len(logits), "target")
            scoring.add(logits, tokens[place : place + SCORED])

    def _read_together(self, rows: list[Row]) -> None:
        """Read the whole prompts of all rows in one pass, filled up on the right."""
        plan = rows[0].plan
        self._prefill(self.target, [PassInput(row.slot, row.prompt) for row in rows], plan)

    def _prefill(self, state: ModelState, work: list[PassInput], plan: Plan | None) -> None:
        plan = None if plan is None or state is not self.target else plan.at(len(work))
        if plan is None or not plan.wants_prompt or max(len(one.tokens) for one in work) < 2:
            state.prefill(work)
            return
        seen = state.prefill(work, window=_OBSERVED)
        if seen is not None:
            started = self._clock()
            plan.observe_exits(_agreement(state.decoder, seen), 0.0)
            # Reading the exits here helps the plan for its whole life; half of the cost is charged to this run.
            plan.observe_exits([[] for _ in seen], 0.5 * (self._clock() - started))

    def _close_holes(self) -> None:
        """Move the rows under way into adjacent slots, so that a pass over them copies nothing."""
        if self.proposals:
            return
        self._holes = False
        count = len(self.rows)
        taken = {row.slot for row in self.rows.values()}
        places = iter(sorted(set(range(count)) - taken))
        for row in self.rows.values():
            if row.slot >= count:
                place = next(places)
                for state in self.states:
                    state.move(row.slot, place)
                row.slot = place
        self._free = list(range(count, len(self.target.rows)))


def _slot(row: Row) -> int:
    return row.slot


def _fitting(rows: list[Row], length: int, positions: int) -> list[list[Row]]:
    """Rows that share a round of ``length`` drafts. A row that it would pad beyond the model's ``positions`` has one of its own, so
    that it shortens nobody else's drafts: how many there are decides which random numbers a row uses."""
    together = [row for row in rows if row.length + length <= positions]
    if len(together) == len(rows):
        return [rows]
    alone = [[row] for row in rows if row.length + length > positions]
    return [together, *alone] if together else alone


def _agreement(decoder: Decoder, states: Tensor) -> list[list[bool]]:
    """Whether each exit's greedy token is the last layer's, for states (layers, positions, hidden)."""
    tokens = decoder.greedy(states)
    return (tokens == tokens[-1]).tolist()
