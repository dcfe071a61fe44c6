"""What a request adds to the logits before sampling: biases of tokens, and penalties for tokens that the answer has already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BIAS = 100.0
"""Largest bias, as OpenAI has it: in practice it forbids a token, or every other one."""
PENALTY = 2.0
"""Largest penalty, as OpenAI has it."""


class BiasAndPenalties:
    """A logits processor: (token ids (1, length), scores (1, vocabulary)) -> scores.

    ``bias`` is added to tokens' logits. The answer begins at position ``start``: of each token in it, ``frequency`` is taken off as
    often as it occurs, and ``presence`` once. At every drafted position the answer is what stands before that position.
    """

    def __init__(self, start: int, *, bias: Mapping[int, float], frequency: float = 0.0, presence: float = 0.0) -> None:
        self._start = start
        self._tokens = torch.tensor(list(bias), dtype=torch.int64)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._frequency = frequency
        self._presence = presence

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        changed = scores.clone()
        if len(self._tokens):
            changed[0, self._tokens.to(scores.device)] += self._values.to(scores)
        answer = ids[0, self._start :]
        if len(answer) and (self._frequency or self._presence):
            counts = torch.bincount(answer, minlength=scores.shape[-1])[: scores.shape[-1]].to(scores)
            changed[0] -= self._frequency * counts + self._presence * (counts > 0).to(scores)
        return changed
