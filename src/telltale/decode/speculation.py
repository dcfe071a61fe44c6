"""One round of self-speculation over any number of rows: draft with the early layers or from n-grams, verify with the rest.

LayerSkip, arXiv 2404.16710, section 4.3. The draft runs layers 0..E-1 and keeps its exit states; verification runs layers
E..L-1 over those states in one pass, so no layer sees a token twice. Every function returns per slot what was drafted,
how much of it stands, and the tokens to emit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.decode.generation import Run
from telltale.decode.sampling import accept, point_mass, sample


@dataclass
class Round:
    """Per slot: how many tokens were drafted, how many of them stand, and the tokens emitted (one more than stand)."""

    drafted: list[int]
    accepted: list[int]
    emitted: list[list[int]]


def exit_round(run: Run, exit_layer: int, length: int, *, confidence: float | None = None) -> Round:
    """Draft up to ``length`` tokens per row with layers 0..E-1, verify with layers E..L-1."""
    limits = [run.outputs.remaining(row) - 1 for row in run.rows]
    positions = run.positions()
    length = min(length, max(limits), run.decoder.max_positions - 1 - max(positions))
    if run.request.sampling.plain_greedy and confidence is None:
        drafts, states = run.decoder.draft_greedy(
            run.last_tokens(),
            positions,
            exit_layer=exit_layer,
            length=length,
            cache=run.cache,
            stop_tokens=run.request.eos,
        )
        choices = run.decoder.verify_greedy(states, positions, exit_layer=exit_layer, cache=run.cache)
        return _greedy_round(drafts, choices, limits)
    drafted, laws, states = _sampled_draft(run, exit_layer, length, positions, confidence)
    final = run.decoder.run(states, exit_layer, run.decoder.layers, run.cache, positions)
    return _sampled_round(run, final, drafted, laws, [min(drafted.shape[1], limit) for limit in limits])


def ngram_round(run: Run, drafts: Sequence[Sequence[int]]) -> Round:
    """Verify given ``drafts`` (one per slot, of any lengths) with all layers in one pass."""
    positions = run.positions()
    room = run.decoder.max_positions - 1 - max(positions)
    cut = [
        list(draft[: min(run.outputs.remaining(row) - 1, room)]) for draft, row in zip(drafts, run.rows, strict=True)
    ]
    counts = [len(draft) for draft in cut]
    width = max(counts)
    last = run.last_tokens()
    greedy = run.request.sampling.plain_greedy
    if greedy and len(cut) == 1:
        choices = run.decoder.score_greedy([last[0], *cut[0]], positions[0], cache=run.cache)
        return _greedy_round(cut, [choices], counts)
    padded = [draft + [0] * (width - len(draft)) for draft in cut]
    ids = torch.tensor([[token, *draft] for token, draft in zip(last, padded, strict=True)], device=run.decoder.device)
    final = run.decoder.forward(ids, run.cache, positions)
    if greedy:
        return _greedy_round(cut, run.decoder.greedy(final).tolist(), counts)
    drafted = ids[:, 1:]
    return _sampled_round(run, final, drafted, point_mass(drafted, run.decoder.vocabulary_size), counts)


def _greedy_round(drafts: Sequence[list[int]], choices: Sequence[list[int]], limits: Sequence[int]) -> Round:
    drafted, accepted, emitted = [], [], []
    for draft, choice, limit in zip(drafts, choices, limits, strict=True):
        count = min(len(draft), limit)
        stands = 0
        while stands < count and draft[stands] == choice[stands]:
            stands += 1
        drafted.append(count)
        accepted.append(stands)
        emitted.append(choice[: stands + 1])
    return Round(drafted, accepted, emitted)


def _sampled_draft(
    run: Run, exit_layer: int, length: int, positions: Sequence[int], confidence: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Drafted tokens (slots, k), the laws they came from (slots, k, vocabulary), exit states (slots, k+1, hidden)."""
    decoder, request = run.decoder, run.request
    token = torch.tensor(run.last_tokens(), device=decoder.device)
    prefixes = [run.prefix(slot) for slot in range(len(run.rows))]
    tokens: list[Tensor] = []
    laws: list[Tensor] = []
    states: list[Tensor] = []
    for index in range(length + 1):
        state = decoder.run(decoder.embed(token.view(-1, 1)), 0, exit_layer, run.cache, [p + index for p in positions])
        states.append(state)
        if index == length:
            break
        logits = decoder.head(state[:, 0])
        # The stop looks only at what was known before the next draft, so it cannot bias the law of the output.
        if confidence is not None and float(logits.float().softmax(-1).amax(-1).max()) < confidence:
            break
        law = request.sampling.distribution(logits, prefixes)
        token = sample(law, request.generator)
        laws.append(law)
        tokens.append(token)
        drawn = token.tolist()
        prefixes = [[*prefix, new] for prefix, new in zip(prefixes, drawn, strict=True)]
        if len(drawn) == 1 and drawn[0] in request.eos:
            length = index + 1
    slots = len(run.rows)
    if not tokens:
        empty = torch.empty(slots, 0, dtype=torch.int64, device=decoder.device)
        return empty, torch.empty(slots, 0, decoder.vocabulary_size, device=decoder.device), torch.cat(states, 1)
    return torch.stack(tokens, 1), torch.stack(laws, 1), torch.cat(states, 1)


def _sampled_round(run: Run, final: Tensor, drafted: Tensor, laws: Tensor, counts: list[int]) -> Round:
    """The acceptance rule on final states (slots, k+1, hidden); each position is processed with its own prefix."""
    slots, width, _ = final.shape
    rows = drafted.tolist()
    prefixes = [run.prefix(slot) + rows[slot][:index] for slot in range(slots) for index in range(width)]
    logits = run.decoder.head(final).view(slots * width, -1)
    target = run.request.sampling.distribution(logits, prefixes).view(slots, width, -1)
    stands, following = accept(
        target, laws, drafted, counts=torch.tensor(counts, device=drafted.device), generator=run.request.generator
    )
    accepted = stands.tolist()
    emitted = [[*row[:count], token] for row, count, token in zip(rows, accepted, following.tolist(), strict=True)]
    return Round(counts, accepted, emitted)
