"""Open a model as a decoder: choose a backend and compare it with the family's own forward before it is trusted."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import nn

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.backends.fused import FusedDecoder, fused_unavailable_reason
from telltale.models.backends.module import ModuleDecoder
from telltale.models.backends.native.step import NativeDecoder, native_unavailable_reason
from telltale.models.decoder import BACKENDS, Decoder
from telltale.models.families import parts_of, unwrap
from telltale.models.loading import evaluating


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


def open_decoder(
    model: nn.Module, *, backend: str = "auto", exact: bool = False, threads: int | None = None
) -> Decoder:
    """A layerwise view of ``model`` (a Hugging Face causal LM of a supported family).

    ``backend="auto"`` takes ``native`` if the family is Llama-like, the model is on CPU in float32 or bfloat16 and a C++
    compiler is there; else ``fused`` if Llama-like; else ``module``. ``decoder.backend_reason`` names the backends that were
    passed over, with reasons. ``exact`` makes every token's result independent of the width of its pass (``native`` always is).
    ``threads`` None uses ``torch.get_num_threads()``.

    Raises :class:`~telltale.errors.UnsupportedModelError` for an unknown family or a backend that cannot serve the model.
    """

    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}.")
    parts_of(model)
    if model.training:
        warnings.warn("the model is in train mode; decoding uses eval semantics (no dropout).", stacklevel=2)
    passed_over: list[str] = []
    for kind, unavailable in ((NativeDecoder, native_unavailable_reason), (FusedDecoder, fused_unavailable_reason)):
        if backend not in ("auto", kind.backend):
            continue
        reason = unavailable(unwrap(model))
        if reason is None:
            decoder: Decoder = kind(model, exact=exact, threads=threads)
            reason = disagreement(decoder)
            if reason is None:
                decoder.backend_reason = "; ".join(passed_over) or _chosen(backend)
                return decoder
        if backend == kind.backend:
            raise UnsupportedModelError(f"backend={backend!r} cannot serve this model: {reason}.")
        passed_over.append(f"{kind.backend}: {reason}")
    module = ModuleDecoder(model, exact=exact, threads=threads)
    module.backend_reason = "; ".join(passed_over) or _chosen(backend)
    return module


def _chosen(backend: str) -> str:
    return "chosen by name" if backend != "auto" else "the fastest backend for this family and device"
