"""One vector for a response and one for its prompt, from a backbone's last hidden states.

Decoders: the last token that the attention mask shows, and the gating token. Encoders: the mean over the mask, in two passes.
Never the pad id: it may be the end-of-sequence id, and then it stands in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.align.judge.templating import Encoded
from telltale.errors import DataError

POOLINGS = ("last", "mean")


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's last token under ``mask``: (B, L, d) and (B, L) -> (B, d); padding on either side.

    Raises :class:`~telltale.errors.DataError` for a row without any token.
    """
    _check_mask(mask)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * places).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row's tokens under ``mask``: (B, L, d) and (B, L) -> (B, d)."""
    _check_mask(mask)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1)


def padded(rows: Sequence[Sequence[int]], *, pad: int, device: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids as (B, L) and their mask, padded on the right (or left)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, part] = torch.tensor(list(row), dtype=torch.long)
        mask[index, part] = 1
    return ids.to(device), mask.to(device)


def padded_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) with what the mask hides moved behind what it shows.

    Encoders with absolute positions count padding on the left, and not every family of decoders takes positions from outside.
    """
    order = mask.bool().to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def batch_features(
    backbone: Any, rows: Sequence[Encoded], *, pooling: str, pad: int, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Features of responses (B, d) and of their prompts (B, d) for encoded conversations; ``left`` is for decoders."""
    device = next(backbone.parameters()).device
    left = left and pooling == "last"
    ids, mask = padded([row.ids for row in rows], pad=pad, device=device, left=left)
    if pooling == "mean":
        # Responses to one prompt share its pass.
        places: dict[tuple[int, ...], int] = {}
        own = [places.setdefault(tuple(row.prompt_ids), len(places)) for row in rows]
        prompts, prompt_mask = padded(list(places), pad=pad, device=device)
        states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        before = backbone(input_ids=prompts, attention_mask=prompt_mask).last_hidden_state
        return mean_of(states, mask), mean_of(before, prompt_mask)[own]
    options: dict[str, Any] = {"use_cache": False}
    if left:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    states = backbone(input_ids=ids, attention_mask=mask, **options).last_hidden_state
    shift = mask.shape[1] - mask.sum(1) if left else torch.zeros(len(rows), dtype=torch.long, device=device)
    gating = torch.tensor([row.gating_index for row in rows], device=device) + shift
    return last_token(states, mask), states[torch.arange(len(rows), device=device), gating]


def _check_mask(mask: Tensor) -> None:
    empty = (mask.sum(1) == 0).nonzero()[:, 0]
    if len(empty):
        raise DataError(f"row {int(empty[0])} has no token; expected at least one under the attention mask.")
