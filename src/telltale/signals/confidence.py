"""How sure a model is of the tokens it wrote: log-probabilities, entropy and margins of its raw distribution.

Always from the raw logits at temperature 1 without truncation: a nucleus of sampled tokens bounds its own minimum. SpecGuard
(arXiv 2604.15244) accepts a step by the smallest log-probability in it (LPBV).
"""

from __future__ import annotations

import torch
from torch import Tensor

from telltale.config import check_choice
from telltale.errors import DataError, NumericalError

REDUCTIONS = ("min", "mean", "sum", "q10", "group")
GROUP = 8
"""Tokens of a window of the reduction "group" (DeepConf, arXiv 2508.15260, has it at 1,024 for whole traces)."""


def token_log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """ln p of each token, nats, <= 0: ``logits`` (..., T, vocabulary), ``tokens`` (..., T) -> (..., T), float32 or wider.

    The logits of a token are those of the position before it. Raises :class:`~telltale.errors.DataError` for shapes that do
    not fit and :class:`~telltale.errors.NumericalError` naming the first position whose logits are NaN or infinite.
    """
    if logits.shape[:-1] != tokens.shape:
        raise DataError(
            f"logits have shape {tuple(logits.shape)} and tokens {tuple(tokens.shape)}; expected one row of logits a token."
        )
    wide = _checked(logits)
    # A gather of the normalised rows would copy the whole table: subtract the normaliser from the gathered logits.
    return (wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)).clamp_max(0.0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's distribution, nats, in [0, ln vocabulary]: (..., vocabulary) -> (...)."""
    log_probabilities = _checked(logits).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).clamp_max(0.0)


def margin(logits: Tensor) -> Tensor:
    """ln p of the most likely token less that of the second, nats, >= 0: (..., vocabulary) -> (...)."""
    if logits.shape[-1] < 2:
        raise DataError(f"a margin needs two tokens to choose from; the vocabulary has {logits.shape[-1]}.")
    best = _checked(logits).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def reduced(values: Tensor, how: str = "min") -> Tensor:
    """One number for a step from its tokens' ``values`` (..., T) -> (...).

    "min" is the paper's; "q10" the tenth percentile; "group" the smallest mean of any 8 neighbours (of all, if fewer).
    Raises :class:`~telltale.errors.DataError` for a step without tokens: it has no signal, and none is made up.
    """
    check_choice("reduce", how, REDUCTIONS)
    if values.shape[-1] == 0:
        raise DataError("the step has no tokens, so it has no signal; expected at least one.")
    if how == "min":
        return values.min(-1).values
    if how == "mean":
        return values.mean(-1)
    if how == "sum":
        return values.sum(-1)
    if how == "q10":
        return torch.quantile(values, 0.1, dim=-1)
    return values.unfold(-1, min(GROUP, values.shape[-1]), 1).mean(-1).min(-1).values


def _checked(logits: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Logits of -inf are tokens that cannot be; NaN, +inf and rows that are -inf throughout have no distribution.
    finite = torch.isfinite(wide.logsumexp(-1))
    if not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        raise NumericalError(f"the logits at position {place} are NaN or infinite; expected finite numbers.")
    return wide
