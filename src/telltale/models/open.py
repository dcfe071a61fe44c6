"""Open a model as a decoder: choose a backend and compare it with the family's own forward before it is trusted."""

from __future__ import annotations

import warnings

from torch import nn

from telltale.errors import ConfigError, TelltaleError, UnsupportedModelError
from telltale.models.agreement import disagreement
from telltale.models.backends.fused import FusedDecoder, fused_unavailable_reason
from telltale.models.backends.module import ModuleDecoder
from telltale.models.backends.native.step import NativeDecoder, native_unavailable_reason
from telltale.models.decoder import BACKENDS, Decoder
from telltale.models.families import parts_of, unwrap
from telltale.models.loading import in_a_line

_MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What the code of a family that was not foreseen may raise when its parts are called one by one."""


def open_decoder(
    model: nn.Module, *, backend: str = "auto", exact: bool = False, threads: int | None = None
) -> Decoder:
    """A layerwise view of ``model`` (a Hugging Face causal LM of a supported family).

    ``backend="auto"`` takes ``native`` if the family is Llama-like, the model is on CPU in float32 or bfloat16 and a C++
    compiler is there; else ``fused`` if Llama-like; else ``module``. ``decoder.backend_reason`` names the backends that were
    passed over, with reasons. ``exact`` makes every token's result independent of the width of its pass (``native`` always is).
    ``threads`` None uses ``torch.get_num_threads()``.

    Each is compared with the family's own forward first (:func:`~telltale.models.agreement.disagreement`).

    Raises :class:`~telltale.errors.UnsupportedModelError` for an unknown family, a backend that cannot serve the model, and a
    model whose own forward is not what its layers give.
    """

    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}.")
    parts_of(model, listed=False)
    if model.training:
        warnings.warn("the model is in train mode; decoding uses eval semantics (no dropout).", stacklevel=2)
    model_type = getattr(unwrap(model).config, "model_type", "")
    passed_over: list[str] = []
    for kind, unavailable in ((NativeDecoder, native_unavailable_reason), (FusedDecoder, fused_unavailable_reason)):
        if backend not in ("auto", kind.backend):
            continue
        try:
            reason = unavailable(unwrap(model))
            if reason is None:
                decoder: Decoder = kind(model, exact=exact, threads=threads)
                reason = disagreement(decoder)
        except _MISFITS as error:
            if isinstance(error, TelltaleError):
                raise
            reason = f"its layers cannot be read by role: {in_a_line(error)}"
        if reason is None:
            decoder.backend_reason = "; ".join(passed_over) or _chosen(backend)
            return decoder
        if backend == kind.backend:
            raise UnsupportedModelError(f"backend={backend!r} cannot serve this model: {reason}.")
        passed_over.append(f"{kind.backend}: {reason}")
    try:
        module = ModuleDecoder(model, exact=exact, threads=threads)
        reason = disagreement(module)
    except _MISFITS as error:
        if isinstance(error, TelltaleError):
            raise
        reason = f"its layers do not work one by one: {in_a_line(error)}"
    if reason is not None:
        raise UnsupportedModelError(f"this {model_type} model cannot be decoded layer by layer: {reason}.")
    module.backend_reason = "; ".join(passed_over) or _chosen(backend)
    return module


def _chosen(backend: str) -> str:
    return "chosen by name" if backend != "auto" else "the fastest backend for this family and device"
