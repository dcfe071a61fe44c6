"""Whether a backend can be trusted: it is compared with the family's own forward when it is opened."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from telltale.models.modes import evaluating

if TYPE_CHECKING:
    from telltale.models.decoder import Decoder


def disagreement(decoder: Decoder) -> str | None:
    """Why ``decoder`` cannot be trusted: it departs from the family's own forward on a short seeded prompt. None if it agrees.

    Prefill, a two-token pass and a one-token pass are compared with one full forward. The tolerance is relative to the
    largest logit: 1e-4 in float32, 4% in bfloat16 and float16, whose own rounding noise over a deep model is that large.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(40, decoder.max_positions)
    ids = torch.randint(decoder.vocabulary_size, (1, length), generator=generator).to(decoder.device)
    with torch.inference_mode(), evaluating(decoder.model):
        wanted = decoder.model(input_ids=ids, use_cache=False).logits[0].float()
        cache = decoder.new_cache(1, length)
        cuts = sorted({0, max(0, length - 3), max(0, length - 1), length})
        pieces = []
        for first, last in itertools.pairwise(cuts):
            hidden = decoder.forward(ids[:, first:last], cache, [first], prefill=first == 0)
            pieces.append(decoder.head(hidden)[0].float())
        given = torch.cat(pieces)
    if not torch.isfinite(wanted).all():
        return None
    tolerance = 1e-4 if decoder.dtype in (torch.float32, torch.float64) else 4e-2
    error = (given - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    if error <= tolerance:
        return None
    return f"its logits differ from the family's own forward by {error:.2g} of the largest one (tolerance {tolerance})"
