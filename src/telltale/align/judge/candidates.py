"""Features of several responses to one prompt, with the prompt's keys and values computed once (ArmoRM spec, point 7).

Candidates share their first tokens; a causal backbone's keys and values of these do not depend on what follows. They are
computed for one row, repeated over the batch, and only the rest of every candidate goes through the layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

WORTH_A_PASS = 256
"""Tokens from which a larger batch hardly makes each of them cheaper."""


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many leading token ids all ``rows`` share, leaving at least one token to each."""
    ordered = sorted(map(list, rows))
    # What the first and the last in order share, all between them share.
    first, last = ordered[0], ordered[-1]
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(0, min(common, min(map(len, rows)) - 1))


def can_share(backbone: Any) -> bool:
    """Whether ``backbone`` keeps keys and values that do not depend on later tokens."""
    return (
        cache_argument(backbone) is not None
        and not getattr(backbone, "_is_stateful", False)
        and reads_forward(backbone)
    )


def cache_argument(backbone: Any) -> str | None:
    """What ``backbone.forward`` calls its cache of keys and values; None if it takes none."""
    taken = inspect.signature(backbone.forward).parameters
    # Transformers 5.24 renamed it for most families.
    return next((name for name in ("past_key_values", "cache") if name in taken), None)


@torch.inference_mode()
def reads_forward(backbone: Any) -> bool:
    """Whether a token's state is independent of later tokens: a decoder, not an encoder.

    Tried out on three tokens, since names do not tell: encoders of some families take a cache as well.
    """
    device = next(backbone.parameters()).device
    states = [
        backbone(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0, 0] for ids in ([1, 2, 3], [1, 2, 4])
    ]
    return torch.allclose(states[0].float(), states[1].float(), rtol=1e-3, atol=1e-5)


def candidate_features(
    backbone: Any, rows: Sequence[Sequence[int]], gating_index: int, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Last-token hidden states (n, d) of the n ``rows`` of token ids, and the hidden state (d,) at ``gating_index``.

    Equal to a pass over every whole row up to rounding. ``gating_index`` has to lie in what the rows share, see
    :func:`shared_length`; ``batch_size`` rows go through the backbone together, those of similar length.
    """
    shared = shared_length(rows)
    device = next(backbone.parameters()).device
    cache = DynamicCache(config=backbone.config)
    prefix = torch.tensor([list(rows[0][:shared])], device=device)
    states = backbone(input_ids=prefix, use_cache=True, **{str(cache_argument(backbone)): cache}).last_hidden_state
    hidden = states.new_empty(len(rows), states.shape[-1])
    for chosen in of_similar_length([len(row) - shared for row in rows], batch_size):
        hidden[chosen] = _continue(backbone, cache, [rows[index][shared:] for index in chosen], shared)
    return hidden, states[0, gating_index]


def of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices into ``lengths`` in batches of at most ``batch_size``, the longest first.

    A batch that is worth a pass of its own is closed before a row that would be an eighth padding or more.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        worth = bool(batches) and longest * len(batches[-1]) >= WORTH_A_PASS
        if not batches or len(batches[-1]) == batch_size or (worth and lengths[index] <= longest * 7 / 8):
            batches.append([])
        batches[-1].append(index)
    return batches


def _continue(backbone: Any, cache: DynamicCache, rests: Sequence[Sequence[int]], shared: int) -> Tensor:
    """Hidden states (n, d) of the last token of every rest, after ``shared`` cached tokens."""
    device = next(backbone.parameters()).device
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    width = int(lengths.max())
    ids = torch.zeros(len(rests), width, dtype=torch.long, device=device)
    for row, rest in enumerate(rests):
        ids[row, : len(rest)] = torch.tensor(list(rest), device=device)
    columns = torch.arange(width, device=device)
    mask = torch.cat([torch.ones(len(rests), shared, device=device), columns < lengths[:, None]], dim=1).long()
    # A copy: the pass appends to it, and the next chunk starts from the prompt again.
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(len(rests))
    states = backbone(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(shared + columns).expand(len(rests), width),
        use_cache=True,
        **{str(cache_argument(backbone)): own},
    ).last_hidden_state
    return states[torch.arange(len(rests), device=device), lengths - 1]
