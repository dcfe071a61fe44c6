"""Candidates of a step, written token by token by one side: for all rows that are at it, one pass a token.

SpecGuard (arXiv 2604.15244, algorithm 1, the lines that sample from the draft and from the target): both sides use this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from telltale.decode.sampling import Sampling, pick
from telltale.decode.step_verified.passes import Passed, Work
from telltale.decode.step_verified.records import Reading
from telltale.decode.step_verified.rows import Row, refuse_no_distribution
from telltale.decode.step_verified.sides import Side
from telltale.errors import NumericalError
from telltale.signals.confidence import entropy, token_log_probabilities
from telltale.signals.grounding import by_row, grounding_from_blocks, grounding_from_rows


@dataclass
class Candidate:
    """A step under way. ``branch`` is its place in the side's branches, None if it is written behind the row itself."""

    tail: Tensor
    """State (hidden,) that the next token is drawn from."""
    branch: int | None = None
    uniforms: list[float] | None = None
    tokens: list[int] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    """What each processed token gave; the last token may not be processed."""
    log_probabilities: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    end: str | None = None


@dataclass
class Wanted:
    """Signals to be read while candidates are written, and whether each token's own attention row is among them."""

    log_probabilities: bool = False
    entropies: bool = False
    grounding: bool = False
    own_row: bool = False


@dataclass
class Proposal:
    """The candidates of one step of ``row``."""

    row: Row
    side: Side
    role: str
    count: int
    wanted: Wanted
    candidates: list[Candidate] = field(default_factory=list)
    start: int = 0
    """Position of the step's first token."""
    tail: Tensor | None = None
    """State before the step, to go back to."""

    @property
    def done(self) -> bool:
        """Whether every candidate has ended."""
        return bool(self.candidates) and all(candidate.end is not None for candidate in self.candidates)

    def begin(self, tail: Tensor) -> None:
        """Set the candidates up, all of them behind what is committed; the side has processed exactly that."""
        row = self.row
        self.start, self.tail = row.length, tail
        branches = self.side.branch(row.slot, self.count) if self.count > 1 else [None]
        uniforms = None if row.job.greedy else row.uniforms(self.role, self.count, row.config.max_step_tokens).tolist()
        self.candidates = [
            Candidate(tail, branch, None if uniforms is None else uniforms[place])
            for place, branch in enumerate(branches)
        ]

    def keep(self, place: int) -> None:
        """Make a candidate the row's continuation on this side, as far as it has been processed."""
        chosen = self.candidates[place]
        if chosen.branch is not None:
            self.side.take(self.row.slot, chosen.branch, chosen.passed)
        self.close()

    def drop(self) -> None:
        """Go back to what is committed."""
        if self.candidates and self.candidates[0].branch is None:
            self.side.rewind(self.row.slot, self.start, self.tail)
        self.close()

    def close(self) -> None:
        """Give the branches back."""
        self.side.free(candidate.branch for candidate in self.candidates if candidate.branch is not None)
        for candidate in self.candidates:
            candidate.branch = None

    def reading(self, place: int) -> Reading:
        """The signals of a candidate."""
        chosen = self.candidates[place]
        groundings: tuple[float, ...] = ()
        if self.wanted.grounding:
            masses = self.side.seats[self.row.slot].masses
            before = None if masses is None else masses[:, : self.start]
            groundings = groundings_of(chosen.passed, len(chosen.tokens), self.row, self.role, before=before)
        return Reading(tuple(chosen.log_probabilities), tuple(chosen.entropies), groundings)


def advance(side: Side, proposals: Sequence[Proposal]) -> None:
    """One more token for every candidate that goes on. All ``proposals`` are of ``side``, and none is done."""
    _begin(side, [proposal for proposal in proposals if not proposal.candidates])
    going = [
        (proposal, candidate) for proposal in proposals for candidate in proposal.candidates if candidate.end is None
    ]
    logits, index = _logits(side, [candidate for _, candidate in going])
    tokens = _chosen(logits, index, going)
    _read(logits, index, going, tokens)
    for (proposal, candidate), token in zip(going, tokens, strict=True):
        candidate.tokens.append(token)
        candidate.end = proposal.row.job.ends.why(proposal.row.tokens, candidate.tokens)
    _process(side, [(p, c) for p, c in going if c.end is None or p.wanted.own_row])


def groundings_of(
    passed: Sequence[Passed], count: int, row: Row, role: str, *, before: Tensor | None = None
) -> tuple[float, ...]:
    """Grounding of each of ``count`` tokens of the next step, from what its passes gave (all of them, or all but the last).

    ``before``: masses of the tokens ahead of the step, (layers, start), where grounding needs whole rows. Raises
    :class:`~telltale.errors.NumericalError` if the attention of the model in this ``role`` is NaN.
    """
    config = row.config
    found = torch.full((len(passed),), torch.nan)
    if passed and passed[0].rows is not None:
        assert before is not None
        width = before.shape[1] + count
        rows = [functional.pad(one.rows, (0, width - one.rows.shape[2])) for one in passed if one.rows is not None]
        whole = torch.cat(rows, 1)
        found = grounding_from_rows(list(whole), before, residual=config.residual)
    elif passed:
        blocks = [one.blocks for one in passed if one.blocks is not None]
        whole = blocks[0].new_zeros(blocks[0].shape[0], count, count)
        place = 0
        for block in blocks:
            height = block.shape[1]
            whole[:, place : place + height, : place + height] = block[:, :, : place + height]
            place += height
        own = list(whole[:, :place, :place])
        if not bool(torch.isnan(whole).any()):
            found = grounding_from_blocks(own, residual=config.residual)
    if bool(torch.isnan(found).any()):
        raise NumericalError(
            f"the {role}'s attention is NaN in step {len(row.steps)} of prompt {row.number}; expected finite numbers. Check the "
            f"checkpoint's weights."
        )
    if config.row == "predictor":
        found = by_row(torch.cat([found, found.new_zeros(count - len(found))]), "predictor")
    return tuple(found.tolist())


def _begin(side: Side, proposals: Sequence[Proposal]) -> None:
    behind = [p for p in proposals if side.seats[p.row.slot].length < p.row.length]
    if behind:
        work = [Work(p.row.slot, p.row.committed_from(side.seats[p.row.slot].length)) for p in behind]
        side.feed(work)
        for proposal, one in zip(behind, work, strict=True):
            if proposal.role == "target":
                proposal.row.stats.scored_tokens += proposal.row.drafted_from(proposal.row.length - len(one.tokens))
    for proposal in proposals:
        tail = side.seats[proposal.row.slot].tail
        assert tail is not None
        proposal.begin(tail)


def _logits(side: Side, candidates: Sequence[Candidate]) -> tuple[Tensor, list[int]]:
    """Logits (m, vocabulary) after the different states among the candidates, and the row of each candidate."""
    places: dict[int, int] = {}
    states: list[Tensor] = []
    index = []
    for candidate in candidates:
        key = id(candidate.tail)
        if key not in places:
            places[key] = len(states)
            states.append(candidate.tail)
        index.append(places[key])
    return side.head(torch.stack(states)), index


def _chosen(logits: Tensor, index: list[int], going: Sequence[tuple[Proposal, Candidate]]) -> list[int]:
    tokens = [0] * len(going)
    groups: dict[Sampling, list[int]] = {}
    for place, (proposal, _) in enumerate(going):
        groups.setdefault(proposal.row.job.sampling, []).append(place)
    owners = {place: proposal for (proposal, _), place in zip(going, index, strict=True)}
    refuse_no_distribution(logits, [owners[place].row for place in range(len(logits))], going[0][0].role)
    for sampling, places in groups.items():
        own = logits[[index[place] for place in places]] if len(groups) > 1 or len(logits) != len(going) else logits
        if sampling.plain_greedy:
            found = own.argmax(-1)
        else:
            prefixes = (
                [going[place][0].row.prefix(going[place][1].tokens) for place in places] if sampling.processor else []
            )
            law = sampling.distribution(own, prefixes)
            if sampling.temperature == 0.0:
                found = law.argmax(-1)
            else:
                uniform = torch.tensor([_uniform(going[place][1]) for place in places], dtype=torch.float64)
                found = pick(law, uniform.to(law.device))
        for place, token in zip(places, found.tolist(), strict=True):
            tokens[place] = token
    return tokens


def _uniform(candidate: Candidate) -> float:
    assert candidate.uniforms is not None
    return candidate.uniforms[len(candidate.tokens)]


def _read(logits: Tensor, index: list[int], going: Sequence[tuple[Proposal, Candidate]], tokens: Sequence[int]) -> None:
    asked = [place for place, (proposal, _) in enumerate(going) if proposal.wanted.log_probabilities]
    if asked:
        chosen = torch.tensor([tokens[place] for place in asked], device=logits.device)
        values = token_log_probabilities(logits[[index[place] for place in asked]], chosen).tolist()
        for place, value in zip(asked, values, strict=True):
            going[place][1].log_probabilities.append(value)
    asked = [place for place, (proposal, _) in enumerate(going) if proposal.wanted.entropies]
    if asked:
        values = entropy(logits[[index[place] for place in asked]]).tolist()
        for place, value in zip(asked, values, strict=True):
            going[place][1].entropies.append(value)


def _process(side: Side, going: Sequence[tuple[Proposal, Candidate]]) -> None:
    """Run the newest token of each candidate."""
    for asks in (False, True):
        behind = [(p, c) for p, c in going if c.branch is None and p.wanted.grounding == asks]
        if behind:
            work = [Work(p.row.slot, c.tokens[-1:], p.start if asks else None) for p, c in behind]
            _note(behind, side.feed(work))
        branched = [(p, c) for p, c in going if c.branch is not None and p.wanted.grounding == asks]
        if branched:
            branches = [c.branch for _, c in branched if c.branch is not None]
            since = [p.start for p, _ in branched] if asks else None
            _note(branched, side.grow(branches, [c.tokens[-1] for _, c in branched], since))


def _note(going: Sequence[tuple[Proposal, Candidate]], passed: Sequence[Passed]) -> None:
    for (_, candidate), one in zip(going, passed, strict=True):
        candidate.passed.append(one)
        candidate.tail = one.states[-1]
