"""The loop: draft a step, score it, accept it or have the target redo it, for any number of rows that come and go.

SpecGuard (arXiv 2604.15244, algorithm 1). Rows are never in lockstep: at each turn those that draft get a token, those that are
done are scored, those that were rejected get a token of the target, and a long prompt is read in pieces between the turns. So a
slow row holds up nobody, and what a row says does not depend on who is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from telltale.decode.step_verified import proposals as proposing
from telltale.decode.step_verified.encoders import Encoder
from telltale.decode.step_verified.ends import FINAL, StepText
from telltale.decode.step_verified.proposals import Proposal, Wanted
from telltale.decode.step_verified.records import StepRecord
from telltale.decode.step_verified.rounds import speculate
from telltale.decode.step_verified.rows import Job, Row
from telltale.decode.step_verified.selection import selected
from telltale.decode.step_verified.sides import PREFILL_CHUNK, Side
from telltale.decode.step_verified.verification import Verdict, Verification, Verifier
from telltale.errors import ConfigError


@dataclass
class Committed:
    """New tokens of one row. ``step`` is there when they end a step, ``reason`` when they end the output."""

    number: int
    tokens: list[int]
    step: StepRecord | None = None
    reason: str | None = None


class StepEngine:
    """Rows under way and the two sides that write them. One thread at a time."""

    def __init__(
        self, target: Side, draft: Side | None, steps: StepText, *, encoder: Encoder, verifier: Verifier | None = None
    ) -> None:
        self.target = target
        self.draft = draft
        self.steps = steps
        self.encoder = encoder
        self.verification = Verification(target, steps, encoder=encoder, verifier=verifier)
        self.rows: dict[int, Row] = {}
        self._free = list(range(len(target.seats)))
        self._admitted = 0

    @property
    def sides(self) -> list[Side]:
        """The draft's side, if there is one, and the target's."""
        return [self.target] if self.draft is None else [self.draft, self.target]

    @torch.inference_mode()
    def admit(self, job: Job) -> int:
        """Take a prompt in; returns its row's number. Raises :class:`~telltale.errors.ConfigError` for what cannot be served."""
        config = job.config
        if self.draft is None and config.policy != "target":
            raise ConfigError(f"policy={config.policy!r} needs a draft; give one, or use policy='target'.")
        if config.policy == "verifier" and self.verification.verifier is None:
            raise ConfigError("policy='verifier' needs a callable that scores steps; pass verifier=.")
        if job.greedy and config.compares_candidates:
            raise ConfigError(config.needs_candidates("temperature=0"))
        for side in self.sides:
            side.decoder.check_capacity(len(job.prompt) + job.ends.limit)
        if not self._free:
            more = len(self.target.seats)
            for side in self.sides:
                side.add_slots(more)
            self._free = list(range(more, 2 * more))
        row = Row(self._admitted, self._free.pop(0), job)
        self.rows[row.number] = row
        self._admitted += 1
        return row.number

    @torch.inference_mode()
    def drop(self, number: int) -> None:
        """Forget a row, whatever it is at; its seat and branches are free. Unknown numbers are ignored."""
        row = self.rows.pop(number, None)
        if row is None:
            return
        if row.proposal is not None:
            row.proposal.close()
        for side in self.sides:
            side.clear(row.slot)
        self._free.append(row.slot)
        self._free.sort()
        if not self.rows:
            for side in self.sides:
                side.release_storage()

    @torch.inference_mode()
    def advance(self) -> list[Committed]:
        """One turn for every row. Returns what became final in it; a row that ended has left."""
        found: list[Committed] = []
        ready = self._prefilled()
        speculating = []
        for row in ready:
            if row.proposal is None:
                if self._speculates(row):
                    speculating.append(row)
                else:
                    row.proposal = self._proposal(row)
        for side in self.sides:
            going = [row.proposal for row in ready if row.proposal is not None and row.proposal.side is side]
            if going:
                proposing.advance(side, going)
        if speculating:
            found += self._round(speculating)
        drafted = []
        for row in ready:
            proposal = row.proposal
            if proposal is None:
                continue
            if row.config.streams_tokens:
                found.append(Committed(row.number, proposal.candidates[0].tokens[-1:]))
            if proposal.done:
                if proposal.role == "draft":
                    drafted.append(proposal)
                else:
                    found.append(self._redone(proposal))
        if drafted:
            found += self._checked(drafted)
        for one in found:
            if one.reason is not None:
                self.drop(one.number)
        return found

    def _prefilled(self) -> list[Row]:
        """Rows whose prompts the sides have read as far as they are needed now; others get a piece read."""
        ready, reading = [], []
        for row in self.rows.values():
            waiting = [side for side in self._needed(row) if side.seats[row.slot].length < len(row.job.prompt)]
            if waiting:
                reading.append((row, waiting))
            else:
                ready.append(row)
        # Whoever has been read least comes first, so that a short prompt never queues behind a long one.
        reading.sort(key=lambda one: sum(side.seats[one[0].slot].length for side in self.sides))
        # While somebody decodes a turn reads one piece, else one of each row: new rows and leavers are seen in between.
        budget = PREFILL_CHUNK if ready else PREFILL_CHUNK * len(reading)
        for row, waiting in reading:
            for side in waiting:
                budget -= self._read(row, side, min(budget, PREFILL_CHUNK))
            if all(side.seats[row.slot].length == len(row.job.prompt) for side in waiting):
                ready.append(row)
            if budget <= 0:
                break
        return ready

    def _read(self, row: Row, side: Side, budget: int) -> int:
        """Read pieces of a row's prompt until ``budget`` is used up; how many tokens it took."""
        prompt, taken = row.job.prompt, 0
        while side.seats[row.slot].length < len(prompt) and taken < budget:
            start = side.seats[row.slot].length
            # Pieces end at fixed places, so that a prompt's rounding does not depend on who was decoding meanwhile.
            stop = min(len(prompt), start - start % PREFILL_CHUNK + PREFILL_CHUNK)
            side.prefill(row.slot, prompt[start:stop])
            taken += stop - start
        return taken

    def _needed(self, row: Row) -> list[Side]:
        config = row.config
        if config.policy == "target" or self.draft is None:
            return [self.target]
        if row.fallback or self._speculates(row) or config.target_scores:
            return [self.draft, self.target]
        return [self.draft]

    def _speculates(self, row: Row) -> bool:
        return row.config.policy == "speculative" or (row.fallback and row.config.fallback == "spec")

    def _proposal(self, row: Row) -> Proposal:
        config, greedy = row.config, row.job.greedy
        if row.fallback or not config.drafts:
            count = config.samples(greedy=greedy) if row.fallback and config.fallback == "k-sample" else 1
            wanted = Wanted(log_probabilities=count > 1 and config.selector == "log-probability")
            return Proposal(row, self.target, "target", count, wanted)
        assert self.draft is not None
        own = config.signal_model == "draft"
        wanted = Wanted(
            log_probabilities=config.record_signals
            or (config.reads_log_probability and (own or config.score == "likelihood-ratio"))
            or config.selector == "log-probability",
            entropies=config.record_signals or (config.score == "entropy" and own and config.policy == "specguard"),
            grounding=config.record_signals or (config.reads_grounding and own),
        )
        wanted.own_row = wanted.grounding and config.row == "self"
        return Proposal(row, self.draft, "draft", config.samples(greedy=greedy), wanted)

    def _round(self, rows: list[Row]) -> list[Committed]:
        assert self.draft is not None
        lengths = [len(row.open_step) for row in rows]
        ends = speculate(self.draft, self.target, rows)
        found = []
        for row, length in zip(rows, lengths, strict=True):
            new = row.open_step[length:]
            row.stats.target_tokens += len(new)
            streams = row.config.streams_tokens
            end = ends[row.number]
            if end is None:
                if streams:
                    found.append(Committed(row.number, new))
                continue
            record = StepRecord(
                tuple(row.open_step), self.steps.text(row.open_step), "target", end, rejected=row.rejected
            )
            row.open_step = []
            one = self._commit(row, record)
            if streams:
                one.tokens = new
            found.append(one)
        return found

    def _redone(self, proposal: Proposal) -> Committed:
        """The target's own step stands, whatever it is; it is not verified again."""
        row = proposal.row
        place, _ = selected(proposal, self.steps, self.encoder)
        chosen = proposal.candidates[place]
        proposal.keep(place)
        row.proposal = None
        row.stats.target_tokens += len(chosen.tokens)
        row.stats.target_discarded_tokens += sum(len(c.tokens) for c in proposal.candidates) - len(chosen.tokens)
        assert chosen.end is not None
        text = self.steps.text(chosen.tokens)
        one = self._commit(row, StepRecord(tuple(chosen.tokens), text, "target", chosen.end, rejected=row.rejected))
        if row.config.streams_tokens:
            one.tokens = []
        return one

    def _checked(self, proposals: Sequence[Proposal]) -> list[Committed]:
        """Accept, or have the target redo."""
        found = []
        for verdict in self.verification.judge(proposals):
            row, record = verdict.proposal.row, verdict.record
            row.proposal = None
            if verdict.reason is None:
                verdict.proposal.keep(verdict.place)
                row.stats.accepted_steps += 1
                row.stats.accepted_tokens += len(record.tokens)
                found.append(self._commit(row, record))
            else:
                self._reject(verdict)
        return found

    def _reject(self, one: Verdict) -> None:
        proposal, row = one.proposal, one.proposal.row
        one.record.reason = one.reason
        row.stats.rejected_steps += 1
        row.stats.rejected_tokens += len(one.record.tokens)
        if one.tail is not None:
            self.target.rewind(row.slot, row.length, one.tail)
        proposal.side.rewind(row.slot, proposal.start, proposal.tail)
        proposal.close()
        row.rejected = one.record
        row.fallback = True

    def _commit(self, row: Row, record: StepRecord) -> Committed:
        row.repeats = row.repeats + 1 if row.steps and row.steps[-1].tokens == record.tokens else 1
        row.tokens += record.tokens
        row.steps.append(record)
        row.stats.steps += 1
        row.stats.target_steps += record.source == "target"
        row.stats.tokens = len(row.tokens)
        row.fallback, row.rejected = False, None
        limit = row.config.repetition_limit
        if record.end in FINAL:
            row.reason = record.end
        elif limit is not None and row.repeats >= limit:
            row.reason = "repetition"
        return Committed(row.number, list(record.tokens), record, row.reason)
