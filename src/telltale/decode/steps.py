"""Candidates of a step: one model writes them token by token, for all rows that draft, and one is selected.

SpecGuard (arXiv 2604.15244, algorithm 1, the lines that sample from the draft and from the target): both models use this file. The
paper selects the consistency medoid of the candidates' embeddings by a sentence-transformer it does not name. Such encoders hardly
separate "= 12" from "= 13"; the default here hashes token n-grams, the multiset of numbers and the whole text.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from telltale.decode.model_state import ModelState, PassInput, PassOutput
from telltale.decode.results import StepSignals
from telltale.decode.rows import Row, distribution_of, refuse_no_distribution
from telltale.decode.sampling import Sampling, pick
from telltale.decode.stopping import StepText
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.confidence import entropy, reduced, token_log_probabilities
from telltale.signals.diversity import agreement, consistency_medoid
from telltale.signals.grounding import by_row, grounding_from_blocks, sparsified_grounding

Encoder = Callable[[Sequence[str]], Tensor]
"""Texts -> (texts, dimensions), rows of length 1."""

ENCODERS: dict[str, Encoder] = {}
DIMENSIONS = 256
"""Of each of the three parts of the hashed encoding."""
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass
class Candidate:
    """A step under way. ``branch`` is its place in the model's branches, None if it is written behind the row itself."""

    last_hidden: Tensor
    """State (hidden,) that the next token is drawn from."""
    branch: int | None = None
    uniforms: list[float] | None = None
    tokens: list[int] = field(default_factory=list)
    passed: list[PassOutput] = field(default_factory=list)
    """What each processed token gave; the last token may not be processed."""
    log_probabilities: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    end: str | None = None


@dataclass
class SignalsWanted:
    """Signals to be read while candidates are written, and whether each token's own attention row is among them."""

    log_probabilities: bool = False
    entropies: bool = False
    grounding: bool = False
    own_row: bool = False


@dataclass
class Proposal:
    """The candidates of one step of ``row``."""

    row: Row
    state: ModelState
    role: str
    count: int
    wanted: SignalsWanted
    candidates: list[Candidate] = field(default_factory=list)
    start: int = 0
    """Position of the step's first token."""
    last_hidden: Tensor | None = None
    """State before the step, to go back to."""

    @property
    def done(self) -> bool:
        """Whether every candidate has ended."""
        return bool(self.candidates) and all(candidate.end is not None for candidate in self.candidates)

    @property
    def reads_blocks(self) -> bool:
        """Whether attention is read while tokens are written; whole rows of it are recomputed when a step is over."""
        return self.wanted.grounding and not self.row.config.whole_rows

    def begin(self, last_hidden: Tensor) -> None:
        """Set the candidates up, all of them behind what is committed; the model has processed exactly that."""
        row = self.row
        self.start, self.last_hidden = row.length, last_hidden
        branches = self.state.branch(row.slot, self.count) if self.count > 1 else [None]
        uniforms = None if row.greedy else row.uniforms(self.role, self.count, row.config.max_step_tokens).tolist()
        self.candidates = [
            Candidate(last_hidden, branch, None if uniforms is None else uniforms[place])
            for place, branch in enumerate(branches)
        ]

    def keep(self, place: int) -> None:
        """Make a candidate the row's continuation of this model, as far as it has been processed."""
        chosen = self.candidates[place]
        if chosen.branch is not None:
            self.state.take(self.row.slot, chosen.branch, chosen.passed)
        self.close()

    def drop(self) -> None:
        """Go back to what is committed."""
        if self.candidates and self.candidates[0].branch is None:
            self.state.truncate(self.row.slot, self.start, self.last_hidden)
        self.close()

    def close(self) -> None:
        """Give the branches back."""
        self.state.free(candidate.branch for candidate in self.candidates if candidate.branch is not None)
        for candidate in self.candidates:
            candidate.branch = None

    def signals(self, place: int) -> StepSignals:
        """The signals of a candidate."""
        chosen = self.candidates[place]
        groundings: tuple[float, ...] = ()
        if self.wanted.grounding:
            groundings = groundings_of(self.state, chosen.passed, chosen.tokens, self.row, self.role)
        return StepSignals(tuple(chosen.log_probabilities), tuple(chosen.entropies), groundings)


def advance(state: ModelState, proposals: Sequence[Proposal]) -> None:
    """One more token for every candidate that goes on. All ``proposals`` are of ``state``, and none is done."""
    _begin(state, [proposal for proposal in proposals if not proposal.candidates])
    going = [
        (proposal, candidate) for proposal in proposals for candidate in proposal.candidates if candidate.end is None
    ]
    logits, index = _logits(state, [candidate for _, candidate in going])
    owners = {place: proposal.row for (proposal, _), place in zip(going, index, strict=True)}
    logits = refuse_no_distribution(logits, [owners[place] for place in range(len(logits))], going[0][0].role)
    tokens = _chosen(logits, index, going)
    _read(logits, index, going, tokens)
    for (proposal, candidate), token in zip(going, tokens, strict=True):
        candidate.tokens.append(token)
        candidate.end = proposal.row.stopping.reason(proposal.row.tokens, candidate.tokens)
    _process(state, [(p, c) for p, c in going if c.end is None or p.wanted.own_row])


def groundings_of(
    state: ModelState, passed: Sequence[PassOutput], step: Sequence[int], row: Row, role: str
) -> tuple[float, ...]:
    """Grounding of each token of ``row``'s next ``step``, from what its passes gave (all of them, or all but the last).

    Where grounding needs whole rows of attention (weights are dropped, or some tokens are no ground), they are computed for the
    whole row again: that is for reports, and slow. The row fails if the attention of the model in this ``role`` is NaN.
    """
    config = row.config
    if config.whole_rows:
        found = _whole_row_groundings(state, step, row)
    else:
        found = torch.full((len(passed),), torch.nan)
        blocks = [one.blocks for one in passed if one.blocks is not None]
        if blocks:
            whole = blocks[0].new_zeros(blocks[0].shape[0], len(step), len(step))
            place = 0
            for block in blocks:
                height = block.shape[1]
                whole[:, place : place + height, : place + height] = block[:, :, : place + height]
                place += height
            if not bool(torch.isnan(whole).any()):
                found = grounding_from_blocks(list(whole[:, :place, :place]), residual=config.residual)
    if bool(torch.isnan(found).any()):
        row.fail(
            NumericalError(
                f"the {role}'s attention is NaN in step {len(row.steps)} of prompt {row.number}; expected finite numbers. Check "
                f"the checkpoint's weights."
            )
        )
        found = torch.zeros_like(found)
    if config.row == "predictor":
        found = by_row(torch.cat([found, found.new_zeros(len(step) - len(found))]), "predictor")
    return tuple(found.tolist())


def _whole_row_groundings(state: ModelState, step: Sequence[int], row: Row) -> Tensor:
    decoder, config = state.decoder, row.config
    ids = torch.tensor([[*row.prompt, *row.tokens, *step]], device=decoder.device)
    layers = range(state.stop - state.attention_layers, state.stop)
    cache = decoder.new_cache(1, ids.shape[1])
    _, rows = decoder.run_with_rows(decoder.embed(ids), 0, state.stop, cache, [0], rows=layers, prefill=True)
    return sparsified_grounding(
        [rows[layer][0] for layer in layers],
        row.length,
        threshold=config.sparsify,
        renormalise=config.renormalise,
        residual=config.residual,
        sinks=config.exclude_sinks,
    )


def _begin(state: ModelState, proposals: Sequence[Proposal]) -> None:
    behind = [p for p in proposals if state.rows[p.row.slot].length < p.row.length]
    if behind:
        work = [PassInput(p.row.slot, p.row.tokens_from(state.rows[p.row.slot].length)) for p in behind]
        state.feed(work)
        for proposal, one in zip(behind, work, strict=True):
            if proposal.role == "target":
                proposal.row.stats.scored_tokens += proposal.row.drafted_from(proposal.row.length - len(one.tokens))
    for proposal in proposals:
        last_hidden = state.rows[proposal.row.slot].last_hidden
        assert last_hidden is not None
        proposal.begin(last_hidden)


def _logits(state: ModelState, candidates: Sequence[Candidate]) -> tuple[Tensor, list[int]]:
    """Logits (m, vocabulary) after the different states among the candidates, and the row of each candidate."""
    places: dict[int, int] = {}
    states: list[Tensor] = []
    index = []
    for candidate in candidates:
        key = id(candidate.last_hidden)
        if key not in places:
            places[key] = len(states)
            states.append(candidate.last_hidden)
        index.append(places[key])
    return state.head(torch.stack(states)), index


def _chosen(logits: Tensor, index: list[int], going: Sequence[tuple[Proposal, Candidate]]) -> list[int]:
    tokens = [0] * len(going)
    groups: dict[Sampling, list[int]] = {}
    for place, (proposal, _) in enumerate(going):
        groups.setdefault(proposal.row.sampling, []).append(place)
    for sampling, places in groups.items():
        own = logits[[index[place] for place in places]] if len(groups) > 1 or len(logits) != len(going) else logits
        if sampling.plain_greedy:
            found = own.argmax(-1)
        else:
            prefixes = (
                [going[place][0].row.prefix(going[place][1].tokens) for place in places]
                if sampling.processor
                else [()] * len(places)
            )
            probs = distribution_of(sampling, own, [going[place][0].row for place in places], prefixes)
            if sampling.temperature == 0.0:
                found = probs.argmax(-1)
            else:
                uniform = torch.tensor([_uniform(going[place][1]) for place in places], dtype=torch.float64)
                found = pick(probs, uniform.to(probs.device))
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


def _process(state: ModelState, going: Sequence[tuple[Proposal, Candidate]]) -> None:
    """Run the newest token of each candidate."""
    for asks in (False, True):
        behind = [(p, c) for p, c in going if c.branch is None and p.reads_blocks == asks]
        if behind:
            work = [PassInput(p.row.slot, c.tokens[-1:], p.start if asks else None) for p, c in behind]
            _note(behind, state.feed(work))
        branched = [(p, c) for p, c in going if c.branch is not None and p.reads_blocks == asks]
        if branched:
            branches = [c.branch for _, c in branched if c.branch is not None]
            since = [p.start for p, _ in branched] if asks else None
            _note(branched, state.grow(branches, [c.tokens[-1] for _, c in branched], since))


def _note(going: Sequence[tuple[Proposal, Candidate]], passed: Sequence[PassOutput]) -> None:
    for (_, candidate), one in zip(going, passed, strict=True):
        candidate.passed.append(one)
        candidate.last_hidden = one.states[-1]


def selected(proposal: Proposal, steps: StepText, encoder: Encoder) -> tuple[int, float]:
    """The place of the chosen candidate, and the share of candidates that equal the most frequent one."""
    tokens = [tuple(candidate.tokens) for candidate in proposal.candidates]
    majority, share = agreement(tokens)
    config = proposal.row.config
    if len(tokens) == 1 or config.selector == "first":
        return 0, share
    if config.selector == "majority":
        return majority, share
    if config.selector == "log-probability":
        values = [
            float(reduced(torch.tensor(candidate.log_probabilities), config.log_probability_reduce))
            for candidate in proposal.candidates
        ]
        return max(range(len(values)), key=lambda place: (values[place], -place)), share
    if share == 1.0:
        return 0, share
    different = list(dict.fromkeys(tokens))
    embeddings = checked_embeddings(encoder, [steps.text(one) for one in different])
    places = {one: place for place, one in enumerate(different)}
    index, _ = consistency_medoid(embeddings[[places[one] for one in tokens]])
    return index, share


def register_encoder(name: str) -> Callable[[Encoder], Encoder]:
    """Make an encoder available under ``name`` in ``StepVerifiedConfig(encoder=...)``."""

    def keep(encoder: Encoder) -> Encoder:
        ENCODERS[name] = encoder
        return encoder

    return keep


def encoder_named(name: str) -> Encoder:
    """A registered encoder. Raises :class:`~telltale.errors.ConfigError` listing the names there are."""
    if name not in ENCODERS:
        raise ConfigError(f"encoder={name!r} is unknown; expected one of {', '.join(sorted(ENCODERS))}.")
    return ENCODERS[name]


def checked_embeddings(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """``encoder(texts)``, (k, d). Raises :class:`~telltale.errors.DataError` for anything but a row a text."""
    found = encoder(texts)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != len(texts):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"the encoder gave {shape} for {len(texts)} candidates; expected a tensor with a row for each.")
    return found


@register_encoder("hashed")
def hashed(texts: Sequence[str]) -> Tensor:
    """n-grams of one to three words, numbers with their counts, and the text itself: three hashed parts of equal weight."""
    rows = np.zeros((len(texts), 3 * DIMENSIONS))
    for row, text in zip(rows, texts, strict=True):
        parts = _grams(text), _numbers(text), [" ".join(text.split())]
        for part, features in zip(np.split(row, 3), parts, strict=True):
            _add_unit(part, features)
    return torch.from_numpy(rows) / 3**0.5


def _grams(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)] or [""]


def _numbers(text: str) -> list[str]:
    counts: Counter[float] = Counter()
    found = []
    for number in _NUMBER.findall(text.replace(",", "")):
        value = float(number)
        counts[value] += 1
        # The n-th occurrence of a number is a feature of its own, so that multisets are compared, not sets.
        found.append(f"{value}x{counts[value]}")
    return found or [""]


def _add_unit(part: np.ndarray, features: Sequence[str]) -> None:
    """Hash features into a vector of zeros and scale it to length 1."""
    for feature in features:
        # CRC-32 is the same in every process; Python's own hash is salted.
        code = zlib.crc32(feature.encode())
        part[code % DIMENSIONS] += 1.0 if (code >> 16) & 1 else -1.0
    length = float(np.linalg.norm(part))
    if length == 0:
        # Signs cancelled out: the features still have a direction of their own.
        part[zlib.crc32("".join(features).encode()) % DIMENSIONS] = length = 1.0
    part /= length
