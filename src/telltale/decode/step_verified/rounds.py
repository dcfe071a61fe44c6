"""Token-level speculative sampling (arXiv 2211.17192) for rows whose step the target writes: exact in law, with fresh drafts.

A draft that was rejected as a step is not proposed again: given that it was rejected it no longer has the draft's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from telltale.decode.sampling import Sampling, accept, pick
from telltale.decode.step_verified.passes import Work
from telltale.decode.step_verified.rows import Row, refuse_no_distribution
from telltale.decode.step_verified.sides import Side


@dataclass
class _Draft:
    row: Row
    base: int
    """Tokens that stand: committed, and of the open step."""
    count: int
    uniforms: Tensor | None
    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    tails: list[Tensor | None] = field(default_factory=list)
    """The draft's states after the base and after each drafted token that it has processed."""


def speculate(draft: Side, target: Side, rows: Sequence[Row]) -> dict[int, str | None]:
    """One round for each row: tokens are appended to ``row.open_step``. Returns per row number why its step is over, or None."""
    drafts = [_begun(draft, target, row) for row in rows]
    _propose(draft, [one for one in drafts if one.count])
    work, before, ahead = [], [], []
    for one in drafts:
        seat = target.seats[one.row.slot]
        pending = _from(one.row, seat.length)
        one.row.stats.scored_tokens += one.row.drafted_from(seat.length)
        ahead.append(len(pending))
        before.append(seat.tail)
        work.append(Work(one.row.slot, [*pending, *one.tokens]))
    # A side that has seen everything and is given no draft has nothing to run.
    fed = iter(target.feed([asked for asked in work if asked.tokens]))
    states = []
    for asked, start, tail in zip(work, ahead, before, strict=True):
        own = next(fed).states if asked.tokens else None
        first = own[start - 1] if own is not None and start else tail
        assert first is not None
        states.append(first.unsqueeze(0) if own is None else torch.cat([first.unsqueeze(0), own[start:]]))
    return _settle(draft, target, drafts, states)


def _begun(draft: Side, target: Side, row: Row) -> _Draft:
    base = row.length + len(row.open_step)
    room = min(draft.decoder.max_positions, target.decoder.max_positions) - 1 - base
    count = max(0, min(row.config.draft_length, row.remaining() - len(row.open_step) - 1, room))
    length = row.config.draft_length
    uniforms = None if row.job.greedy else row.uniforms("target", 2 * length + 1)
    return _Draft(row, base, count, uniforms)


def _propose(side: Side, drafts: Sequence[_Draft]) -> None:
    behind = [Work(one.row.slot, _from(one.row, side.seats[one.row.slot].length)) for one in drafts]
    behind = [work for work in behind if work.tokens]
    if behind:
        side.feed(behind)
    for one in drafts:
        one.tails.append(side.seats[one.row.slot].tail)
    for index in range(max((one.count for one in drafts), default=0)):
        going = [one for one in drafts if one.count > index]
        if index:
            passed = side.feed([Work(one.row.slot, one.tokens[-1:]) for one in going])
            for one, found in zip(going, passed, strict=True):
                one.tails.append(found.states[-1])
        tails = [one.tails[-1] for one in going]
        logits = side.head(torch.stack([tail for tail in tails if tail is not None]))
        refuse_no_distribution(logits, [one.row for one in going], "draft")
        for sampling, places in _by_sampling(going).items():
            own = logits[places]
            if sampling.plain_greedy:
                found_tokens = own.argmax(-1).tolist()
            else:
                law = sampling.distribution(own, [_prefix(going[place], sampling) for place in places])
                uniform = torch.stack([_number(going[place], index) for place in places])
                found_tokens = pick(law, uniform.to(law.device)).tolist()
                for place, one_law in zip(places, law, strict=True):
                    going[place].laws.append(one_law)
            for place, token in zip(places, found_tokens, strict=True):
                going[place].tokens.append(token)


def _settle(draft: Side, target: Side, drafts: Sequence[_Draft], states: Sequence[Tensor]) -> dict[int, str | None]:
    ends: dict[int, str | None] = {}
    counts = [len(own) for own in states]
    read = target.head(torch.cat(list(states)))
    refuse_no_distribution(
        read, [one.row for one, count in zip(drafts, counts, strict=True) for _ in range(count)], "target"
    )
    logits = read.split(counts)
    for one, own, found in zip(drafts, logits, states, strict=True):
        stands, following = _accepted(one, own)
        row = one.row
        end, kept = None, 0
        for token in [*one.tokens[:stands], following]:
            row.open_step.append(token)
            kept += 1
            end = row.job.ends.why(row.tokens, row.open_step)
            if end is not None:
                break
        stands = min(stands, kept)
        row.stats.speculated += one.count
        row.stats.speculated_accepted += stands
        target.rewind(row.slot, one.base + stands, found[stands])
        if one.tails:
            draft.rewind(row.slot, one.base + stands, one.tails[min(stands, len(one.tails) - 1)])
        ends[row.number] = end
    return ends


def _accepted(one: _Draft, logits: Tensor) -> tuple[int, int]:
    """How many drafts stand, and the token after them; ``logits`` (count + 1, vocabulary)."""
    sampling = one.row.job.sampling
    if sampling.plain_greedy:
        choices = logits.argmax(-1).tolist()
        stands = 0
        while stands < one.count and one.tokens[stands] == choices[stands]:
            stands += 1
        return stands, choices[stands]
    prefixes = [_prefix(one, sampling, index) for index in range(one.count + 1)]
    law = sampling.distribution(logits, prefixes).unsqueeze(0)
    if one.uniforms is None:  # greedy, but a processor has its say
        uniform = torch.zeros(1, one.count + 1, dtype=torch.float64)
    else:
        length = one.row.config.draft_length
        uniform = torch.cat([one.uniforms[length : length + one.count], one.uniforms[-1:]]).unsqueeze(0)
    proposed = torch.stack(one.laws).unsqueeze(0) if one.laws else law[:, :0]
    drafted = torch.tensor([one.tokens], dtype=torch.int64, device=law.device)
    accepted, following = accept(
        law, proposed, drafted, counts=torch.tensor([one.count], device=law.device), uniform=uniform.to(law.device)
    )
    return int(accepted), int(following)


def _by_sampling(going: Sequence[_Draft]) -> dict[Sampling, list[int]]:
    groups: dict[Sampling, list[int]] = {}
    for place, one in enumerate(going):
        groups.setdefault(one.row.job.sampling, []).append(place)
    return groups


def _from(row: Row, position: int) -> list[int]:
    """Tokens from ``position`` on, those of the open step included."""
    if position >= row.length:
        return row.open_step[position - row.length :]
    return [*row.committed_from(position), *row.open_step]


def _prefix(one: _Draft, sampling: Sampling, drafted: int | None = None) -> list[int]:
    if sampling.processor is None:
        return []
    return one.row.prefix([*one.row.open_step, *one.tokens[:drafted]])


def _number(one: _Draft, index: int) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if one.uniforms is None else one.uniforms[index]
