"""Cosines and sines of rotary position embeddings, each a function of its position and nothing else.

They come from the family's own rotary module. Where its frequencies depend on the sequence length (``dynamic`` and
``longrope``), Transformers uses the longest position of the pass and remembers it in the live module; then a token's
embedding would depend on which tokens share its pass, and on what was decoded before. Here such a token always gets the
frequencies of a sequence that ends with it, as in one-token-at-a-time decoding, from a private copy of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the sequence length."""


def rope_kind(rotary: nn.Module) -> str:
    """The kind of scaling of a family's rotary module, "default" if it has none."""
    return str(getattr(rotary, "rope_type", "default"))


class PositionEmbeddings:
    """(cos, sin) for given positions, (batch, width, rotary dim) each."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary: Any = rotary
        self._is_static = rope_kind(rotary) in STATIC_ROPE

    def __call__(
        self, hidden: Tensor, place: Tensor, positions: Sequence[int], *, prefill: bool
    ) -> tuple[Tensor, Tensor]:
        """For tokens at ``place`` (batch, width), which begin at ``positions`` in each row.

        A prompt (``prefill``) is one sequence: all its tokens get the frequencies of its full length.
        """
        if self._is_static:
            return self._rotary(hidden, position_ids=place)
        if prefill:
            return self._fresh()(hidden, position_ids=place)
        width = hidden.shape[1]
        tables: dict[int, tuple[Tensor, Tensor]] = {}
        for position in {first + offset for first in positions for offset in range(width)}:
            tables[position] = self._fresh()(hidden, position_ids=torch.full((1, 1), position, device=hidden.device))
        rows = [[tables[first + offset] for offset in range(width)] for first in positions]
        cosines = torch.cat([torch.cat([cos for cos, _ in row], 1) for row in rows])
        sines = torch.cat([torch.cat([sin for _, sin in row], 1) for row in rows])
        return cosines, sines

    def _fresh(self) -> Any:
        """A copy of the rotary module that has not seen a sequence yet; the live one is never written to."""
        rotary = copy.copy(self._rotary)
        rotary._buffers = {name: buffer.clone() for name, buffer in self._rotary._buffers.items()}
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        return rotary
