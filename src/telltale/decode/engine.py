"""The decoding loop: rows that come and go, each decoded plainly, by token-level speculation, or step by step.

At each turn every row gets something: a plain row a token, a speculating row a round, a row that drafts a step (SpecGuard, arXiv
2604.15244, algorithm 1) a token of each candidate or its verification, and a long prompt is read in pieces between the turns. So a
slow row holds up no other, and a row's output does not depend on the other rows. A single greedy row gets its tokens in blocks,
one call into the backend each, so that no Python runs between two tokens; tokens behind the end of an output are taken back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from telltale.decode import steps as drafting_steps
from telltale.decode.drafting import Choice, Plan
from telltale.decode.model_state import ModelState, PassInput
from telltale.decode.ngrams import NgramIndex
from telltale.decode.pass_costs import clock_of
from telltale.decode.prefix_cache import PrefixCache
from telltale.decode.reading import PromptReader, score_beside
from telltale.decode.results import StepRecord
from telltale.decode.rows import Row, attempted
from telltale.decode.speculative import SpeculativeRound, choose, speculate
from telltale.decode.steps import Encoder, Proposal, SignalsWanted, selected
from telltale.decode.stopping import FINAL_REASONS, StepText
from telltale.decode.verification import Verdict, Verification, Verifier
from telltale.errors import ConfigError, NumericalError

BLOCK = 16
"""Plain tokens of a single greedy row between two turns."""
FAILED = "failed"
"""The reason of a row that failed."""


@dataclass(slots=True)
class Committed:
    """New tokens of one row. ``step``: the step that they end; ``reason``: why they end the output; ``failure``: the error of a row
    that ended because a model's numbers were none."""

    number: int
    tokens: list[int]
    step: StepRecord | None = None
    reason: str | None = None
    failure: NumericalError | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """For each token its log-probability and the most likely ones, where the row is scored beside."""


class Engine:
    """Rows under way and the states of the models that write them. One thread at a time.

    ``steps`` and ``encoder`` are needed by rows that draft steps, ``draft`` by these and by drafts of a second model. ``together``:
    all rows come before the first turn and their prompts share one pass; otherwise prompts are read apart and in pieces.
    ``serving``: storage is given back when no row is left. ``prefix_cache``: bytes for what was read before, None for none.
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
        prefix_cache: int | None = None,
    ) -> None:
        self.target = target
        self.draft = draft
        self.rows: dict[int, Row] = {}
        self.proposals: dict[int, Proposal] = {}
        """Steps under way, by row number."""
        self.verification: Verification | None = None
        if steps is not None and encoder is not None:
            self.verification = Verification(target, steps, encoder=encoder, verifier=verifier)
        self._serving = serving
        self._free = list(range(len(target.rows)))
        self._holes = False
        self._admitted = 0
        self._clock = clock_of(target.decoder)
        self._reader = PromptReader(self.states, self.rows, together=together, prefix_cache=prefix_cache)

    @property
    def prefixes(self) -> PrefixCache | None:
        """What was read before; None where it is not kept."""
        return self._reader.prefixes

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
        self._reader.note_boundary(row)
        row.number, row.slot = self._admitted, self._slot()
        if row.beside is not None:
            row.beside_slot = self._slot()
        self.rows[row.number] = row
        self._reader.add(row.number)
        self._admitted += 1
        return row.number

    def _slot(self) -> int:
        more = len(self.target.rows)
        for state in self.states if not self._free else ():
            state.add_slots(more)
        self._free = self._free or list(range(more, 2 * more))
        return heapq.heappop(self._free)

    @torch.inference_mode()
    def drop(self, number: int) -> None:
        """Drop a row at any stage; its slot and branches are free. Unknown numbers are ignored."""
        row = self.rows.pop(number, None)
        if row is None:
            return
        proposal = self.proposals.pop(number, None)
        if proposal is not None:
            proposal.close()
        self._reader.keep(row)
        for slot in _slots(row):
            for state in self.states:
                state.clear(slot)
            heapq.heappush(self._free, slot)
        self._reader.drop(number)
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
        ready = self._reader.ready()
        for row in ready:
            if row.rereads_at is not None and row.length > row.rereads_at:
                self._reader.reread(row)
        if len(ready) > 1:
            ready.sort(key=lambda row: row.slot)
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
        self._score_beside(found)
        found = self._without_failed(found)
        for one in found:
            if one.reason is not None:
                self.drop(one.number)
        return found

    def _without_failed(self, found: list[Committed]) -> list[Committed]:
        """Rows that have failed end, and nothing of this turn is theirs."""
        failed = {row.number: row.failure for row in self.rows.values() if row.failure is not None}
        if not failed:
            return found
        found = [one for one in found if one.number not in failed]
        return found + [Committed(number, [], reason=FAILED, failure=error) for number, error in failed.items()]

    def _score_beside(self, found: Sequence[Committed]) -> None:
        """The log-probabilities of new tokens, for rows that want them at once."""
        rows = [self.rows[number] for number in {one.number for one in found if one.tokens}]
        rows = [row for row in rows if row.beside is not None and row.failure is None]
        if rows:
            score_beside(self.target, rows)
        for one in found if rows else ():
            one.scores = self.rows[one.number].take_scores(len(one.tokens))

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
            new = attempted(
                row,
                "target",
                decoder.decode_greedy,
                row.tokens[-1],
                positions[0],
                count=min(block, row.draftable + 1),
                cache=view,
                stop_tokens=row.stopping.eos,
                otherwise=[0],
            )
            target.passes += len(new)
            return [new]
        ids = torch.tensor([row.tokens[-1] for row in rows], device=decoder.device).view(-1, 1)
        hidden = decoder.forward(ids, view, positions)
        target.passes += 1
        return [[token] for token in choose(target, rows, hidden[:, 0])]

    def _speculate(self, plan: Plan, rows: list[Row], block: int) -> list[Committed]:
        for _ in (row for row in rows if not row.tokens):
            plan.at(len(rows)).begin(len(rows))
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
        if length < 1:
            # With n-gram drafts, each new token may complete a match.
            decoded = self._decoded(rows, 1 if copies else block)
            plan.learn_plain(len(decoded[0]), self._clock() - started)
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
                plan.learn(choice, match, done.drafted, done.accepted, self._clock() - started)
                for place, row in enumerate(group):
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
                    text = stopping.steps.step(step, reason)
                    record = StepRecord(step, text, "target", reason, rejected=row.rejected)
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
        text = self.verification.steps.step(chosen.tokens, chosen.end)
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
        self._reader.add(row.number)

    def _close_holes(self) -> None:
        """Move the rows under way into adjacent slots, so that a pass over them copies nothing."""
        if self.proposals:
            return
        self._holes = False
        beside = [row for row in self.rows.values() if row.beside is not None]
        taken = {slot for row in self.rows.values() for slot in _slots(row)}
        count = len(taken)
        places = iter(sorted(set(range(count)) - taken))

        def moved(slot: int) -> int:
            if slot < count:
                return slot
            place = next(places)
            for state in self.states:
                state.move(slot, place)
            return place

        for row in self.rows.values():
            row.slot = moved(row.slot)
        for row in beside:
            row.beside_slot = moved(row.beside_slot)
        self._free = list(range(count, len(self.target.rows)))


def _slots(row: Row) -> list[int]:
    """The row's places in the caches."""
    return [row.slot] if row.beside is None else [row.slot, row.beside_slot]


def _fitting(rows: list[Row], length: int, positions: int) -> list[list[Row]]:
    """Rows that share a round of ``length`` drafts. A row that it would pad beyond the model's ``positions`` has one of its own, so
    that it shortens nobody else's drafts: how many there are decides which random numbers a row uses."""
    together = [row for row in rows if row.length + length <= positions]
    if len(together) == len(rows):
        return [rows]
    alone = [[row] for row in rows if row.length + length > positions]
    return [together, *alone] if together else alone
