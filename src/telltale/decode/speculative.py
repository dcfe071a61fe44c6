"""One round of token-level speculation over any number of rows: draft, verify in one pass, accept (arXiv 2211.17192).

Drafts come from the model's own early layers (LayerSkip, arXiv 2404.16710, section 4.3: verification goes on from their exit
states, so no layer sees a token twice), from the text's own n-grams, or from a second model. The target has processed everything
but each row's last token. A draft that was rejected as a step is not proposed again: it is no longer a sample from the draft's
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.decode.drafting import Choice
from telltale.decode.model_state import ModelState, PassInput
from telltale.decode.rows import Row, attempted, distribution_of, refuse_no_distribution
from telltale.decode.sampling import Sampling, accept, pick, point_mass
from telltale.errors import NumericalError


@dataclass
class SpeculativeRound:
    """Per row: how many tokens were drafted, how many are accepted, and the tokens emitted, one more than were accepted."""

    drafted: list[int]
    accepted: list[int]
    emitted: list[list[int]]


@dataclass
class _Drafts:
    """``tokens`` of each row, the first ``counts`` of which may count; ``probs`` (rows, k, vocabulary) they were drawn from, None
    for n-grams; ``states`` (rows, k + 1, hidden) after ``exit_layer``, None where the whole model has still to run."""

    tokens: list[list[int]]
    counts: list[int]
    probs: Tensor | None = None
    states: Tensor | None = None
    exit_layer: int = 0


def speculate(
    target: ModelState,
    draft: ModelState | None,
    rows: Sequence[Row],
    choice: Choice,
    *,
    confidence: float | None = None,
) -> SpeculativeRound:
    """One round of ``choice`` for each row. The caller commits what is emitted and notes what the target has processed."""
    positions = [row.length - 1 for row in rows]
    limits = [min(choice.length, row.draftable) for row in rows]
    greedy = target.knows_every_token and rows[0].sampling.plain_greedy
    greedy = greedy and (len(rows) == 1 or all(row.sampling.plain_greedy for row in rows))
    if choice.source == "exit":
        if greedy and confidence is None:
            try:
                done, early = _greedy_exits(target, rows, choice.exit_layer, max(limits), positions, limits)
                _count_early(draft, early)
                return done
            except NumericalError:
                # One of the rows has no distribution; the way of sampled rows finds out which.
                pass
        drafts = _drafts_by_exit(target, rows, choice.exit_layer, limits, positions, confidence)
        assert drafts.states is not None
        _count_early(draft, drafts.states.shape[1])
    elif choice.source == "ngram":
        tokens = [row.ngrams.draft(limit) if row.ngrams else [] for row, limit in zip(rows, limits, strict=True)]
        drafts = _Drafts(tokens, [len(own) for own in tokens])
    else:
        assert draft is not None
        drafts = _drafts_by_model(draft, rows, limits)
    if greedy and drafts.states is None:
        return _greedy_round(drafts.tokens, _greedy_scores(target, rows, drafts, positions), drafts.counts)
    return _verified(target, rows, drafts, positions)


def choose(state: ModelState, rows: Sequence[Row], hidden: Tensor) -> list[int]:
    """The next token of each row from final states (rows, hidden)."""
    if state.knows_every_token and all(row.sampling.plain_greedy for row in rows):
        return _greedy(state, rows, hidden)
    probs = _distributions(refuse_no_distribution(state.head(hidden), rows, "target"), rows, [()] * len(rows))
    uniform = [0.0 if row.greedy else float(row.uniforms("target", 1)) for row in rows]
    return pick(probs, torch.tensor(uniform, dtype=torch.float64, device=probs.device)).tolist()


def _greedy(state: ModelState, rows: Sequence[Row], hidden: Tensor) -> list[int]:
    """The most likely token after each state (n, hidden), of one row each."""
    try:
        return state.decoder.greedy(hidden).tolist()
    except NumericalError:
        return refuse_no_distribution(state.head(hidden), rows, "target").argmax(-1).tolist()


def _greedy_exits(
    target: ModelState,
    rows: Sequence[Row],
    exit_layer: int,
    length: int,
    positions: list[int],
    limits: list[int],
) -> tuple[SpeculativeRound, int]:
    """The round, and the passes that the early layers made in it."""
    decoder, cache = target.decoder, target.select([row.slot for row in rows])
    drafts, states = decoder.draft_greedy(
        [row.tokens[-1] for row in rows],
        positions,
        exit_layer=exit_layer,
        length=length,
        cache=cache,
        stop_tokens=rows[0].stopping.eos if len(rows) == 1 else (),
    )
    choices = decoder.verify_greedy(states, positions, exit_layer=exit_layer, cache=cache)
    target.passes += 1
    return _greedy_round(drafts, choices, limits), states.shape[1]


def _count_early(draft: ModelState | None, passes: int) -> None:
    """Passes of the early layers are the draft's where it has a state of its own; the target has been asked for them."""
    if draft is not None:
        draft.passes += passes


def _greedy_scores(
    target: ModelState, rows: Sequence[Row], drafts: _Drafts, positions: list[int]
) -> Sequence[list[int]]:
    """The whole model's greedy token after each row's last token and after each of its drafts."""
    if len(rows) > 1:
        final = _scored(target, rows, drafts, positions)
        width = final.shape[1]
        found = _greedy(target, [row for row in rows for _ in range(width)], final.reshape(len(rows) * width, -1))
        return [found[place * width : (place + 1) * width] for place in range(len(rows))]
    asked = [rows[0].tokens[-1], *drafts.tokens[0]]
    target.passes += 1
    view = target.select([rows[0].slot])
    score = target.decoder.score_greedy
    return [attempted(rows[0], "target", score, asked, positions[0], cache=view, otherwise=[0] * len(asked))]


def _scored(target: ModelState, rows: Sequence[Row], drafts: _Drafts, positions: Sequence[int]) -> Tensor:
    """Final states (rows, k + 1, hidden) after each row's last token and its drafts, shorter drafts filled up on the right."""
    width = max(drafts.counts)
    ids = [
        [row.tokens[-1], *own[:width], *[0] * (width - len(own))] for row, own in zip(rows, drafts.tokens, strict=True)
    ]
    target.passes += 1
    view = target.select([row.slot for row in rows])
    return target.decoder.forward(torch.tensor(ids, device=target.decoder.device), view, positions)


def _greedy_round(drafts: Sequence[list[int]], choices: Sequence[list[int]], limits: Sequence[int]) -> SpeculativeRound:
    drafted, accepted, emitted = [], [], []
    for draft, choice, limit in zip(drafts, choices, limits, strict=True):
        count = min(len(draft), limit)
        place = 0
        while place < count and draft[place] == choice[place]:
            place += 1
        drafted.append(count)
        accepted.append(place)
        emitted.append(choice[: place + 1])
    return SpeculativeRound(drafted, accepted, emitted)


def _drafts_by_exit(
    target: ModelState,
    rows: Sequence[Row],
    exit_layer: int,
    limits: Sequence[int],
    positions: Sequence[int],
    confidence: float | None,
) -> _Drafts:
    """Drafts through layers 0..E-1. A row stops behind an end token, or before a token that its exit is not confident of."""
    decoder, view = target.decoder, target.select([row.slot for row in rows])
    counts = list(limits)
    numbers = _drafting_numbers(rows, limits, target)
    newest = torch.tensor([row.tokens[-1] for row in rows], device=decoder.device)
    drafted: list[list[int]] = [[] for _ in rows]
    probs: list[Tensor] = []
    states: list[Tensor] = []
    while True:
        index = len(probs)
        state = decoder.run(decoder.embed(newest.view(-1, 1)), 0, exit_layer, view, [p + index for p in positions])
        states.append(state)
        if index >= max(counts):
            break
        logits = _exit_logits(target, rows, state, exit_layer, positions, index)
        logits = refuse_no_distribution(logits, rows, "exit")
        # The stop looks only at what was known before the next draft, so it cannot bias the distribution of the output.
        if confidence is not None:
            sure = logits.softmax(-1).amax(-1).tolist()
            counts = [
                index if own < confidence and index < count else count for own, count in zip(sure, counts, strict=True)
            ]
            if index >= max(counts):
                break
        probs.append(_distributions(logits, rows, drafted))
        newest = pick(probs[-1], numbers[:, index])
        for place, token in enumerate(newest.tolist()):
            drafted[place].append(token)
            if token in rows[place].stopping.eos:
                counts[place] = min(counts[place], index + 1)
    target.passes += 1
    return _Drafts(drafted, counts, torch.stack(probs, 1) if probs else None, torch.cat(states, 1), exit_layer)


def _exit_logits(
    target: ModelState, rows: Sequence[Row], state: Tensor, exit_layer: int, positions: Sequence[int], index: int
) -> Tensor:
    """Logits (rows, vocabulary) of draft ``index`` for the exit's states (rows, 1, hidden)."""
    view, places = target.select([row.slot for row in rows]), [first + index for first in positions]
    read = target.decoder.exit_logits
    logits = read(state, exit_layer, view, places, since=positions)
    # Processors may forbid every token of a shortlist. Whether a row has any must not show in another's drafts.
    free = [row.sampling.processor is not None for row in rows]
    if any(free):
        whole = read(state, exit_layer, view, places, since=positions, whole=True)
        logits = torch.where(torch.tensor(free, device=logits.device).view(-1, 1, 1), whole, logits)
    return logits[:, 0, : target.vocabulary]


def _drafts_by_model(draft: ModelState, rows: Sequence[Row], limits: Sequence[int]) -> _Drafts:
    """Drafts of a second model, which first reads what it has not seen of the rows."""
    known = [draft.rows[row.slot].length for row in rows]
    if (
        len(rows) == 1
        and limits[0]
        and draft.knows_every_token
        and rows[0].sampling.plain_greedy
        and known[0] < rows[0].length
    ):
        [row] = rows
        if known[0] < row.length - 1:
            draft.feed([PassInput(row.slot, row.tokens_from(known[0])[:-1])])
        tokens = attempted(
            row,
            "draft",
            draft.decoder.decode_greedy,
            row.tokens[-1],
            row.length - 1,
            count=limits[0],
            cache=draft.select([row.slot]),
            stop_tokens=row.stopping.eos,
            otherwise=[0],
        )
        draft.advance(row.slot, row.length - 1 + len(tokens), passes=len(tokens))
        return _Drafts([tokens], [len(tokens)])
    going = [place for place, limit in enumerate(limits) if limit]
    drafted: list[list[int]] = [[] for _ in rows]
    probs: list[Tensor] = []
    numbers = _drafting_numbers(rows, limits, draft)
    counts = list(limits)
    if going:
        behind = [row for row, length in zip(rows, known, strict=True) if length < row.length]
        if behind:
            draft.feed([PassInput(row.slot, row.tokens_from(draft.rows[row.slot].length)) for row in behind])
        states = {place: draft.rows[rows[place].slot].last_hidden for place in going}
    for index in range(max(limits)):
        if index:
            going = [place for place in going if counts[place] > index]
            if not going:
                break
            passed = draft.feed([PassInput(rows[place].slot, drafted[place][-1:]) for place in going])
            states |= {place: one.states[-1] for place, one in zip(going, passed, strict=True)}
        own = [rows[place] for place in going]
        newest = [states[place] for place in going]
        logits = draft.head(torch.stack([state for state in newest if state is not None]))
        logits = refuse_no_distribution(logits, own, "draft")
        found = _distributions(logits, own, [drafted[place] for place in going])
        whole = found.new_zeros(len(rows), found.shape[-1])
        whole[going] = found
        probs.append(whole)
        for place, token in zip(going, pick(found, numbers[going, index]).tolist(), strict=True):
            drafted[place].append(token)
            if token in rows[place].stopping.eos:
                counts[place] = index + 1
    return _Drafts(drafted, [len(one) for one in drafted], torch.stack(probs, 1) if probs else None)


def _drafting_numbers(rows: Sequence[Row], limits: Sequence[int], state: ModelState) -> Tensor:
    """A number for each draft of each row, (rows, k); a row uses as many as it may draft, whatever the others do."""
    most = max(limits)
    numbers = [row.numbers("draft", limit) + [0.0] * (most - limit) for row, limit in zip(rows, limits, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64, device=state.decoder.device).view(len(rows), most)


def _verified(target: ModelState, rows: Sequence[Row], drafts: _Drafts, positions: Sequence[int]) -> SpeculativeRound:
    """The acceptance rule, each position with the distribution of its own prefix."""
    decoder = target.decoder
    if drafts.states is None:
        final = _scored(target, rows, drafts, positions)
    else:
        view = target.select([row.slot for row in rows])
        final = decoder.run(drafts.states, drafts.exit_layer, decoder.layers, view, positions)
    width = final.shape[1] - 1
    tokens = [own[:width] + [0] * (width - len(own)) for own in drafts.tokens]
    owners = [row for row in rows for _ in range(width + 1)]
    logits = target.head(final.reshape(len(owners), -1))
    logits = refuse_no_distribution(logits, owners, "target")
    prefixes = [own[:index] for own in tokens for index in range(width + 1)]
    probs = _distributions(logits, owners, prefixes).view(len(rows), width + 1, -1)
    drafted = torch.tensor(tokens, dtype=torch.int64, device=probs.device).view(len(rows), width)
    proposed = point_mass(drafted, probs.shape[-1]) if drafts.probs is None else drafts.probs[:, :width]
    uniform = [
        row.numbers("accept", count) + [0.0] * (width - count) + row.numbers("target", 1)
        for row, count in zip(rows, drafts.counts, strict=True)
    ]
    accepted, following = accept(
        probs,
        proposed,
        drafted,
        counts=torch.tensor(drafts.counts, device=probs.device),
        uniform=torch.tensor(uniform, dtype=torch.float64, device=probs.device),
    )
    found = accepted.tolist()
    emitted = [[*own[:count], token] for own, count, token in zip(tokens, found, following.tolist(), strict=True)]
    return SpeculativeRound(drafts.counts, found, emitted)


def _distributions(logits: Tensor, rows: Sequence[Row], drafted: Sequence[Sequence[int]]) -> Tensor:
    """The distribution (n, vocabulary) of each row's next token behind what it has ``drafted`` already."""
    groups: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.sampling, []).append(place)
    found = None
    for sampling, places in groups.items():
        prefixes = [rows[place].prefix(drafted[place]) for place in places] if sampling.processor is not None else []
        if len(groups) == 1:
            return distribution_of(sampling, logits, rows, prefixes or [()] * len(rows))
        mine = [rows[place] for place in places]
        own = distribution_of(sampling, logits[places], mine, prefixes or [()] * len(mine))
        found = own.new_zeros(len(rows), own.shape[-1]) if found is None else found
        found[places] = own
    assert found is not None
    return found
