"""From logits to tokens, and the rule that lets a sampled draft be checked without changing the distribution of the output.

The rule is speculative sampling (Leviathan et al., arXiv 2211.17192, Chen et al., arXiv 2302.01318): a token drafted from
q is kept with probability min(1, p/q), else one is drawn from norm(max(p - q, 0)); either way its distribution is p. ``p`` and
``q`` are the *processed* distributions. Temperature 0 is the point mass on the most likely token, so greedy decoding
obeys the same rule. Nothing here knows of models or caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, generation
from transformers.generation import logits_process

from telltale.errors import ConfigError, NumericalError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""As in Transformers: (token ids (1, length), scores (1, vocabulary)) -> scores."""


@dataclass(frozen=True)
class Sampling:
    """How a row of logits becomes a distribution: ``processor``, then temperature, then top-k, then top-p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    processor: LogitsProcessor | None = field(default=None, hash=False)

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the argmax of the raw logits, so that no distribution is needed."""
        return self.temperature == 0.0 and self.processor is None

    def distribution(self, logits: Tensor, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """The distribution of the next token, (rows, vocabulary) float32, for logits (rows, vocabulary).

        ``prefixes[i]`` are all tokens before the one that row i chooses; a processor sees exactly those.
        Raises :class:`~telltale.errors.NumericalError` for NaN logits, or if a processor forbids every token.
        """
        scores = logits.float()
        if bool(torch.isnan(scores).any()):
            raise NumericalError("the model's logits are NaN; expected finite numbers. Check the checkpoint's weights.")
        if self.processor is not None:
            scores = torch.cat(
                [
                    self.processor(torch.tensor([list(prefix)], device=scores.device), row.unsqueeze(0))
                    for prefix, row in zip(prefixes, scores, strict=True)
                ]
            )
        # The argmax of a row of -inf would be a token like any other.
        if self.processor is not None and bool((scores.amax(-1) == -torch.inf).any()):
            raise NumericalError("no next token is possible: the logits processors forbid every token.")
        if self.temperature == 0.0:
            probabilities = point_mass(scores.argmax(-1), scores.shape[-1])
        else:
            probabilities = truncated(scores / self.temperature, top_k=self.top_k, top_p=self.top_p).softmax(-1)
        if bool(torch.isnan(probabilities).any()):
            raise NumericalError(
                "no next token is possible: the logits are infinite or the logits processors forbid every token."
            )
        return probabilities


_KEEPS_STATE = "it keeps a state from call to call, and drafts are looked at out of order"
_TWO_ROWS = "it compares rows of one batch, and every row is decoded by itself"
_REFUSED = {
    "SynthIDTextWatermarkLogitsProcessor": _KEEPS_STATE,
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": _KEEPS_STATE,
    "WhisperTimeStampLogitsProcessor": _KEEPS_STATE,
    "WhisperNoSpeechDetection": _KEEPS_STATE,
    "BarkEosPrioritizerLogitsProcessor": _KEEPS_STATE,
    "DiaEOSDelayPatternLogitsProcessor": _KEEPS_STATE,
    "ClassifierFreeGuidanceLogitsProcessor": _TWO_ROWS,
    "DiaClassifierFreeGuidanceLogitsProcessor": _TWO_ROWS,
}
"""Processors of Transformers that cannot be asked for one position of one row, and why."""


def sampling_of_row(sampling: Sampling, row: int, rows: int) -> Sampling:
    """``sampling`` for ``row`` of a request of ``rows``: processors that hold something for each row keep what is this one's.

    Raises :class:`~telltale.errors.ConfigError` for a processor of Transformers' own that cannot be asked for a single row.
    """
    if sampling.processor is None:
        return sampling
    listed = isinstance(sampling.processor, list)
    given: list[Any] = list(sampling.processor) if isinstance(sampling.processor, list) else [sampling.processor]
    own = [_processor_of_row(one, row, rows) for one in given]
    if all(mine is one for mine, one in zip(own, given, strict=True)):
        return sampling
    return replace(sampling, processor=LogitsProcessorList(own) if listed else own[0])


def _processor_of_row(processor: Any, row: int, rows: int) -> Any:
    name = type(processor).__name__
    if name in _REFUSED and isinstance(processor, generation.LogitsProcessor):
        raise ConfigError(f"{name} cannot be used here: {_REFUSED[name]}. Leave it out.")
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        return _with_own(processor, "prompt_ignore_length", row, rows)
    if isinstance(processor, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
        return _with_own(processor, "encoder_input_ids", row, rows)
    if isinstance(processor, logits_process.EncoderNoRepeatNGramLogitsProcessor) and processor.batch_size == rows > 1:
        own = copy.copy(processor)
        own.batch_size, own.generated_ngrams = 1, processor.generated_ngrams[row : row + 1]
        return own
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor) and rows > 1:
        allowed = processor._prefix_allowed_tokens_fn
        own = copy.copy(processor)
        own._prefix_allowed_tokens_fn = lambda _, sentence: allowed(row, sentence)
        return own
    return processor


def _with_own(processor: Any, field_name: str, row: int, rows: int) -> Any:
    """A copy whose tensor ``field_name``, one entry for each row, has this row's alone."""
    held = getattr(processor, field_name, None)
    if not isinstance(held, Tensor) or held.shape[0] == 1:
        return processor
    if held.shape[0] != rows:
        raise ConfigError(
            f"{type(processor).__name__} holds {field_name} for {held.shape[0]} rows; the request has {rows}."
        )
    own = copy.copy(processor)
    setattr(own, field_name, held[row : row + 1])
    return own


def truncated(scores: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Scores (..., vocabulary) with -inf outside the ``top_k`` best, then outside the smallest set of mass ``top_p``."""
    if top_k is not None and top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        outside = mass.cumsum(-1) - mass >= top_p
        # A top_p that float32 rounds to zero would leave no token.
        outside[..., 0] = False
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return scores


def point_mass(tokens: Tensor, vocabulary_size: int) -> Tensor:
    """The distribution (..., vocabulary) float32 that always gives ``tokens`` (...): an n-gram's draft."""
    return torch.nn.functional.one_hot(tokens, vocabulary_size).float()


def sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per row, (rows,) int64, from (rows, vocabulary)."""
    return torch.multinomial(probabilities, 1, generator=generator).view(-1)


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulated (rows, vocabulary) first exceeds ``uniform`` (rows,) in [0, 1): (rows,) int64.

    Rows that bring their own random numbers get the same token whatever the other rows are.
    """
    cumulated = probabilities.double().cumsum(-1)
    threshold = uniform.to(cumulated).unsqueeze(-1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, threshold, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


def accept(
    target: Tensor,
    draft: Tensor,
    drafted: Tensor,
    *,
    counts: Tensor,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many drafts of each row are accepted, and the token that follows them: two (rows,) int64 tensors.

    ``target`` (rows, k+1, vocabulary) holds p at each drafted position and after the last; ``draft`` (rows, k,
    vocabulary) the q that ``drafted`` (rows, k) was drawn from. Only the first ``counts`` (rows,) drafts of a row are
    real, the rest is padding. Position j is accepted with probability min(1, p_j/q_j) if all before it are. A row whose
    drafts are all accepted draws from its next p; a residual that is zero everywhere (p = q) is replaced by p. ``uniform`` (rows,
    k+1) in [0, 1) takes the generator's place: a number for each draft, and the last for the token that follows.
    """
    rows, width = drafted.shape
    n_accepted = torch.zeros(rows, dtype=torch.int64, device=drafted.device)
    if width:
        p = target[:, :width].gather(-1, drafted.unsqueeze(-1)).squeeze(-1).double()
        q = draft.gather(-1, drafted.unsqueeze(-1)).squeeze(-1).double()
        if uniform is None:
            chance = torch.rand(p.shape, dtype=torch.float64, device=p.device, generator=generator)
        else:
            chance = uniform[:, :width].double()
        real = torch.arange(width, device=drafted.device) < counts.unsqueeze(-1)
        n_accepted = ((chance * q < p) & real).long().cumprod(-1).sum(-1)
    index = torch.arange(rows, device=drafted.device)
    probs = target[index, n_accepted]
    refused = n_accepted < counts
    if bool(refused.any()):
        q_there = draft[index, n_accepted.clamp(max=width - 1)]
        left = residual(probs, q_there)
        probs = torch.where(refused.unsqueeze(-1), left, probs)
    return n_accepted, sample(probs, generator) if uniform is None else pick(probs, uniform[:, -1])


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) of (rows, vocabulary); p itself where that is zero everywhere, never 0/0."""
    excess = (p - q).clamp(min=0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass.clamp(min=torch.finfo(excess.dtype).tiny), p)
