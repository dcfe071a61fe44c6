"""Opening the frozen model under a judge: any local decoder or encoder in the Hugging Face layout, without its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from telltale.align.judge.candidates import reads_forward
from telltale.align.judge.model import SHORTEST
from telltale.align.judge.templating import template_pattern
from telltale.configuration import check_integer
from telltale.errors import CheckpointError, DataError, UnsupportedModelError
from telltale.models.loading import check_fit, in_a_line, load_tokenizer, moved, quietly

UNLIMITED = 10**9
"""From here on a tokenizer's ``model_max_length`` means that it knows of none."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model with its tokenizer, and how it reads conversations (what ``encode`` asks for)."""

    model: Any
    tokenizer: Any
    pooling: str
    """``last`` for a decoder, ``mean`` for an encoder."""
    context_length: int | None
    """Tokens of a conversation; longer prompts lose their beginning."""
    gating: str = "template"
    gating_pattern: tuple[int, ...] | None = None
    """The ids that open the assistant's turn, for trainers that judge token ids."""


def open_backbone(
    path: str | Path, *, dtype: str | None = None, device: str | None = None, context_length: int | None = None
) -> Backbone:
    """Open the checkpoint folder ``path``; no code of it runs. ``context_length`` None takes the model's number of positions.

    Raises :class:`~telltale.errors.CheckpointError` for a folder that is no checkpoint, or an incomplete one,
    :class:`~telltale.errors.UnsupportedModelError` for an encoder-decoder, and :class:`~telltale.errors.DataError` for a
    tokenizer that is missing, does not fit, or (for decoders) has no chat template.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a local Hugging Face checkpoint.")
    if context_length is not None:
        check_integer("context_length", context_length, low=SHORTEST)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{folder} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder."
            )
        with quietly():
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=dtype or "auto", output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_a_line(error)}") from error
    # A pooler on top of an encoder is not read.
    absent = sorted(name for name in report.get("missing_keys") or [] if "pooler" not in name)
    if absent:
        raise CheckpointError(f"{folder} lacks {absent[0]} ({len(absent)} in all); expected a whole checkpoint.")
    tokenizer = load_tokenizer(folder)
    check_fit(tokenizer, model, folder)
    return opened(moved(model, device), tokenizer, context_length=context_length)


def opened(model: Any, tokenizer: Any, *, context_length: int | None = None) -> Backbone:
    """A model and tokenizer that are in memory already, as :func:`open_backbone` gives them."""
    model.eval().requires_grad_(False)
    # Some models (RoBERTa) have positions that no token takes; their tokenizer knows better.
    known = (context_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min((value for value in known if value and value < UNLIMITED), default=None)
    if not reads_forward(model):
        return Backbone(model, tokenizer, "mean", limit)
    try:
        pattern = template_pattern(tokenizer)
    except DataError:
        # Without a chat template `encode` says so; without a generation prompt only judging token ids is not possible.
        pattern = None
    return Backbone(model, tokenizer, "last", limit, gating_pattern=pattern)
