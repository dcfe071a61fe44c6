"""Compare a decoder with the family's own forward before it is trusted.

What a short prompt cannot show is looked for on a twin: the same weights under a configuration whose sliding window and original
length are scaled down to a few tokens. So masks beyond the window and the change of rotary frequencies at the boundary are crossed
without a long pass. Where frequencies depend on the length of the sequence, the family's own ``generate`` is followed across the
boundary, since some families drop their cache there; a decoder that has to do the same learns it here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from telltale.models.attention import rope_by_length
from telltale.models.decoder import Decoder
from telltale.models.loading import evaluating, in_a_line
from telltale.models.twin import twin_of

LENGTH = 20
"""Tokens of the prompt, more than the native step's own kernels take at once in front."""
WINDOW, BOUNDARY = 5, 8
"""What a window and an original length are scaled down to, in tokens."""
_NEW = 4
"""Tokens that are followed behind a prompt near the boundary."""


def disagreement(decoder: Decoder) -> str | None:
    """Why ``decoder`` cannot be trusted: it departs from the family's own forward on short seeded prompts. None if it agrees.

    Prefill, a two-token pass and a one-token pass are compared with one full forward; on twins as well, see above. The
    tolerance is relative to the largest logit: 1e-4 in float32, 4% in bfloat16 and float16, whose own rounding noise over a
    deep model is that large. Sets ``decoder.rereads_at``.
    """
    by_length = rope_by_length(decoder.config)
    with torch.inference_mode(), evaluating(decoder.model):
        if by_length is not None:
            return _disagreement_at_boundary(decoder, by_length)
        length = min(LENGTH, decoder.max_positions)
        cuts = [0, max(0, length - 3), max(0, length - 1), length]
        reason = _disagreement_over(decoder, cuts)
        if reason is None and any(window is not None and window >= length for window in decoder.windows):
            small = _scaled(decoder, _with_small_window(decoder.config))
            reason = _disagreement_over(small, cuts)
            reason = None if reason is None else f"beyond its sliding window {reason}"
    return reason


def _disagreement_over(decoder: Decoder, cuts: Sequence[int]) -> str | None:
    """A prompt in passes that end at ``cuts``, against the family's own forward over all of it."""
    cuts = sorted({min(cut, decoder.max_positions) for cut in cuts})
    ids = _prompt(decoder, cuts[-1])
    wanted = decoder.model(input_ids=ids, use_cache=False).logits[0].float()
    cache = decoder.new_cache(1, cuts[-1])
    pieces = []
    for first, last in itertools.pairwise(cuts):
        hidden = decoder.forward(ids[:, first:last], cache, [first], prefill=first == 0)
        pieces.append(decoder.head(hidden)[0].float())
    return _difference(decoder, torch.cat(pieces), wanted)


def _disagreement_at_boundary(decoder: Decoder, kind: str) -> str | None:
    """The tokens around the boundary, against the family's own ``generate`` for a prompt before and one behind it."""
    original, config = _with_small_length(decoder.config)
    try:
        small = _scaled(decoder, config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return f"its rotary embeddings ({kind}) cannot be made for another length: {in_a_line(error)}"
    for count in (BOUNDARY - 1, BOUNDARY + 4):
        ids = _prompt(small, count)
        fresh: Any = _scaled(decoder, config).model
        found = fresh.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=_NEW,
                do_sample=False,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=None,
                pad_token_id=0,
            ),
        )
        wanted = torch.cat([logits[:1].float() for logits in found.logits])
        reason = None
        for rereads_at in (None, original):
            small.rereads_at = None if rereads_at is None else BOUNDARY
            reason = _difference(small, _followed(small, found.sequences, count), wanted)
            if reason is None:
                break
        if reason is not None:
            return f"where its rotary embeddings ({kind}) change {reason}"
        if count < BOUNDARY:
            decoder.rereads_at = rereads_at
    return None


def _followed(decoder: Decoder, ids: Tensor, count: int) -> Tensor:
    """Logits after a prompt of ``count`` tokens and after each token that follows but the last, (tokens, vocabulary)."""
    cache = decoder.new_cache(1, ids.shape[1])
    hidden = decoder.forward(ids[:, :count], cache, [0], prefill=True)
    logits = [decoder.head(hidden[:, -1])]
    for position in range(count, ids.shape[1] - 1):
        if position == decoder.rereads_at:
            decoder.forward(ids[:, :position], cache, [0], prefill=True, lengths=[position + 1])
        logits.append(decoder.head(decoder.forward(ids[:, position : position + 1], cache, [position])[:, -1]))
    return torch.cat(logits).float()


def _difference(decoder: Decoder, given: Tensor, wanted: Tensor) -> str | None:
    if not torch.isfinite(wanted).all():
        return None
    tolerance = 1e-4 if decoder.dtype in (torch.float32, torch.float64) else 4e-2
    error = (given - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    if error <= tolerance:
        return None
    return f"its logits differ from the family's own forward by {error:.2g} of the largest one (tolerance {tolerance})"


def _prompt(decoder: Decoder, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(decoder.vocabulary_size, (1, length), generator=generator).to(decoder.device)


def _scaled(decoder: Decoder, config: Any) -> Decoder:
    """A decoder of the same kind for a twin with ``config``, whose rotary embeddings are made anew where they depend on it."""
    replaced = {}
    rotary = decoder.parts.rotary
    if rotary is not None and rope_by_length(config) is not None:
        replaced[id(rotary)] = type(rotary)(config).to(decoder.device)
    twin = twin_of(decoder.model, config, replaced=replaced)
    return type(decoder)(twin, exact=decoder.exact, threads=decoder.threads)


def _with_small_window(config: Any) -> Any:
    small = copy.deepcopy(config)
    small.sliding_window = WINDOW
    return small


def _with_small_length(config: Any) -> tuple[int, Any]:
    """The length at which frequencies change, and a configuration where they change at :data:`BOUNDARY`."""
    small = copy.deepcopy(config)
    original = int(config.max_position_embeddings)
    for rope in (small.rope_parameters, *small.rope_parameters.values()):
        if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
            original = int(rope["original_max_position_embeddings"])
            rope["original_max_position_embeddings"] = BOUNDARY
    if hasattr(small, "original_max_position_embeddings"):
        small.original_max_position_embeddings = BOUNDARY
    small.max_position_embeddings = max(BOUNDARY, int(config.max_position_embeddings * BOUNDARY / original))
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW
    return original, small
