"""One decoding request, checked: every bad argument is refused here, before any compute.

Prompts leave this file as plain lists of token ids without padding; each row of a batch keeps its own length, which is
what makes left- and right-padded inputs equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.decode.sampling import Sampling
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder


@dataclass
class Request:
    """What to decode and when to stop. ``ends`` asks, after each token of a row, whether the row is complete."""

    prompts: list[list[int]]
    max_new_tokens: int
    eos: frozenset[int]
    sampling: Sampling
    generator: torch.Generator | None = None
    pad_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    ends: Callable[[int, list[int]], bool] | None = None
    seen_by_processors: list[list[int]] = field(default_factory=list)
    """The prompts as logits processors see them; the prompts themselves unless padding must be kept."""

    def __post_init__(self) -> None:
        if not self.seen_by_processors:
            self.seen_by_processors = self.prompts

    @property
    def token_by_token(self) -> bool:
        """Whether something must look at every token before the next is computed."""
        return bool(self.stop_strings) or self.ends is not None


def checked_request(
    decoder: Decoder,
    input_ids: Any,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    logits_processor: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    pad_token_id: int | None = None,
) -> Request:
    """A :class:`Request` for ``decoder``; raises :class:`~telltale.errors.ConfigError` for what cannot be served."""
    prompts = _prompts(input_ids, attention_mask, decoder.vocabulary_size)
    limit = check_integer("max_new_tokens", max_new_tokens, low=1)
    decoder.check_capacity(max(map(len, prompts)) + limit)
    defaults = getattr(decoder.model, "generation_config", None)
    if eos_token_id is None:
        eos_token_id = getattr(defaults, "eos_token_id", None)
    eos = _token_set("eos_token_id", eos_token_id)
    if pad_token_id is None:
        pad_token_id = getattr(defaults, "pad_token_id", None)
    pad = check_integer("pad_token_id", pad_token_id, low=0) if pad_token_id is not None else min(eos, default=0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator is a {type(generator).__name__}; expected a torch.Generator or None.")
    if logits_processor is not None and not callable(logits_processor):
        raise ConfigError(f"logits_processor is a {type(logits_processor).__name__}; expected a LogitsProcessorList.")
    stops = (stop_strings,) if isinstance(stop_strings, str) else stop_strings or ()
    if not isinstance(stops, Iterable):
        raise ConfigError(f"stop_strings={stop_strings!r}; expected non-empty strings.")
    stops = tuple(stops)
    if any(not isinstance(stop, str) or not stop for stop in stops):
        raise ConfigError(f"stop_strings={stop_strings!r}; expected non-empty strings.")
    if stops and tokenizer is None:
        raise ConfigError("stop_strings were given without a tokenizer; pass tokenizer= so that tokens can be read.")
    if isinstance(logits_processor, list) and not logits_processor:
        logits_processor = None
    return Request(
        prompts=prompts,
        max_new_tokens=limit,
        eos=eos,
        sampling=Sampling(
            temperature=check_range("temperature", temperature, low=0.0, finite=True),
            top_k=_top_k(top_k),
            top_p=_top_p(top_p),
            processor=logits_processor,
        ),
        generator=generator,
        pad_token_id=pad,
        stop_strings=stops,
        tokenizer=tokenizer,
    )


def _top_k(value: Any) -> int | None:
    return None if value is None else check_integer("top_k", value, low=0) or None


def _top_p(value: Any) -> float | None:
    return None if value is None else check_range("top_p", value, above=0.0, high=1.0)


def _token_set(name: str, value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    if isinstance(value, Tensor):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return frozenset(check_integer(name, token, low=0) for token in values)


def _prompts(input_ids: Any, attention_mask: Tensor | None, vocabulary_size: int) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise ConfigError(f"input_ids are {input_ids.dtype}; expected integers.")
        if input_ids.dim() not in (1, 2):
            raise ConfigError(f"input_ids have shape {tuple(input_ids.shape)}; expected (length,) or (batch, length).")
        rows = input_ids.view(1, -1).tolist() if input_ids.dim() == 1 else input_ids.tolist()
    elif isinstance(input_ids, (list, tuple)):
        nested = bool(input_ids) and isinstance(input_ids[0], (list, tuple, Tensor))
        rows = (
            [row.tolist() if isinstance(row, Tensor) else list(row) for row in input_ids]
            if nested
            else [list(input_ids)]
        )
    else:
        raise ConfigError(f"input_ids is a {type(input_ids).__name__}; expected a tensor or a list of token ids.")
    if attention_mask is not None:
        rows = _unpadded(rows, attention_mask)
    for index, row in enumerate(rows):
        if not row:
            raise ConfigError(f"the prompt of row {index} is empty; expected at least one token.")
        for token in row:
            if type(token) is not int or not 0 <= token < vocabulary_size:
                raise ConfigError(
                    f"token {token!r} of row {index} is outside the model's vocabulary 0..{vocabulary_size - 1}."
                )
    if not rows:
        raise ConfigError("input_ids hold no row; expected at least one prompt.")
    return rows


def _unpadded(rows: list[list[int]], attention_mask: Any) -> list[list[int]]:
    mask = attention_mask.tolist() if isinstance(attention_mask, Tensor) else attention_mask
    if mask and not isinstance(mask[0], (list, tuple)):
        mask = [mask]
    if [len(row) for row in mask] != [len(row) for row in rows]:
        raise ConfigError("attention_mask has another shape than input_ids; expected one entry per token.")
    kept = []
    for index, (row, marks) in enumerate(zip(rows, mask, strict=True)):
        places = [place for place, mark in enumerate(marks) if mark]
        if not places:
            raise ConfigError(f"attention_mask hides all of row {index}; expected at least one token.")
        if places[-1] - places[0] + 1 != len(places):
            raise ConfigError(f"attention_mask of row {index} has a hole; expected padding on the left or right only.")
        kept.append(row[places[0] : places[-1] + 1])
    return kept
