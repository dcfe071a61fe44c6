"""Which early exit a self-speculative server drafts with: predicted from a warm-up on the model's own text, then timed.

The prediction is that of :mod:`telltale.decode.diagnose`: how often each exit agrees with the last layer, and what passes over
several rows cost on this machine. The engine that serves has costs beyond passes, so the choice is run against plain decoding
before it is believed; where it does not win, the server decodes plainly and says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from telltale.decode.autoregressive import Autoregressive
from telltale.decode.costs import clock_of, costs_of
from telltale.decode.diagnose import LONGEST_DRAFT, WORTH_IT, expected_acceptance
from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.decoder import StepVerified
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder
from telltale.models.exits import exit_quality

ROWS = 4
"""Texts of the warm-up, and rows that are timed together."""
TOKENS = 64
"""Tokens of each text."""
TIMED = 32
"""Tokens of each row that are timed."""
REPEATS = 4
"""Timings of each contestant, in turn; the best counts, since other work on the machine only ever adds."""
SECONDS = 10.0
"""After so much timing no further repeat begins: a large model is measured once."""


@dataclass(frozen=True)
class Tuned:
    """The chosen exit and draft length, the speed-up over plain decoding that was predicted and measured, and on what."""

    exit_layer: int
    draft_length: int
    agreement: float
    predicted: float
    measured: float
    tokens: int

    @property
    def pays(self) -> bool:
        """Whether drafting was measured to be faster than plain decoding."""
        return self.measured >= WORTH_IT

    def describe(self) -> str:
        """The choice and its reasons, in words."""
        return (
            f"exit layer {self.exit_layer} with drafts of {self.draft_length}: agrees on {self.agreement:.0%} of {self.tokens} "
            f"tokens of the model's own text, {self.predicted:.2f}x plain decoding predicted, {self.measured:.2f}x measured"
        )


def tune(decoder: Decoder, tokenizer: Any, *, exit_layer: int | None = None, draft_length: int | None = None) -> Tuned:
    """Choose what is None, for the model behind ``decoder``; greedy, with ``ROWS`` rows at a time.

    Raises :class:`~telltale.errors.ConfigError` for a model with a single layer or an exit that it does not have.
    """
    if decoder.layers < 2:
        raise ConfigError("the model has a single layer, so no layer can draft; use --decode autoregressive.")
    if exit_layer is not None and not 1 <= exit_layer < decoder.layers:
        raise ConfigError(f"exit_layer={exit_layer} is out of range; expected 1..{decoder.layers - 1}.")
    prompts = _beginnings(decoder, tokenizer)
    texts = _own_text(decoder, prompts)
    quality, costs = exit_quality(decoder.model, texts), costs_of(decoder, ROWS)
    exits = range(1, decoder.layers) if exit_layer is None else [exit_layer]
    lengths = range(1, LONGEST_DRAFT + 1) if draft_length is None else [draft_length]

    def predicted(layer: int, length: int) -> float:
        return costs.speedup(layer, length, expected_acceptance(quality.agreement[layer - 1], length))

    _, chosen, best = max((predicted(layer, length), layer, length) for layer in exits for length in lengths)
    # A wide pass is the hardest to predict, so a shorter draft gets its chance.
    contestants = [best] if draft_length is not None else sorted({best, (best + 1) // 2})
    measured, length = max(zip(_measured(decoder, tokenizer, prompts, chosen, contestants), contestants, strict=True))
    return Tuned(
        exit_layer=chosen,
        draft_length=length,
        agreement=quality.agreement[chosen - 1],
        predicted=predicted(chosen, length),
        measured=measured,
        tokens=quality.tokens,
    )


def _beginnings(decoder: Decoder, tokenizer: Any) -> list[list[int]]:
    """Short prompts that differ: the tokenizer's beginning of a text, if it has one, and an ordinary token."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    start = getattr(tokenizer, "bos_token_id", None)
    first = [] if start is None else [int(start)]
    # Spread over the vocabulary, the same ones each time.
    return [[*first, ordinary[(2 * place + 1) * len(ordinary) // (2 * ROWS)]] for place in range(ROWS)]


def _own_text(decoder: Decoder, prompts: list[list[int]]) -> list[Tensor]:
    """What the model writes behind each prompt, greedily, as batches of one row."""
    room = min(TOKENS, decoder.max_positions - max(map(len, prompts)))
    result = Autoregressive(decoder).generate(prompts, max_new_tokens=room, eos_token_id=[])
    rows = zip(prompts, result.tokens.tolist(), result.lengths.tolist(), strict=True)
    return [torch.tensor([[*prompt, *tokens[:length]]], device=decoder.device) for prompt, tokens, length in rows]


def _measured(
    decoder: Decoder, tokenizer: Any, prompts: list[list[int]], exit_layer: int, lengths: Sequence[int]
) -> list[float]:
    """Speed of each draft length over plain decoding, by the engine that serves."""
    plain = StepVerifiedConfig(policy="target", repetition_limit=None)
    drafting = replace(plain, policy="speculative", exit_layer=exit_layer)
    configs = [plain, *(replace(drafting, draft_length=length) for length in lengths)]
    contestants = [StepVerified(decoder, None, tokenizer, config) for config in configs]
    count = min(TIMED, decoder.max_positions - max(map(len, prompts)))
    best = [float("inf")] * len(contestants)
    clock, begun = clock_of(decoder), time.monotonic()
    for repeat in range(REPEATS):
        if repeat and time.monotonic() - begun > SECONDS:
            break
        for place, contestant in enumerate(contestants):
            started = clock()
            contestant.generate(prompts, max_new_tokens=count, eos_token_id=[])
            best[place] = min(best[place], clock() - started)
    return [best[0] / max(own, 1e-9) for own in best[1:]]
