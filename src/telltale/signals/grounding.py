"""Where a step's attention comes from in the end: the part of its rollout that lands before the step.

SpecGuard (arXiv 2604.15244) rolls attention out over the last layers, R = A_L ... A_1, and calls the mass of a token's row on
prompt and accepted steps its grounding. Rows of A sum to 1 and prefix tokens see the prefix alone, so only the T x T blocks
inside the step are needed: G = 1 - B_L ... B_1 1. The full matrix never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from telltale.config import check_choice, check_range
from telltale.errors import DataError

ROWS = ("self", "predictor")
LAST_LAYERS = 3
"""Layers of the paper's rollout: the last three."""


def grounding_from_blocks(blocks: Sequence[Tensor], *, residual: float = 0.0) -> Tensor:
    """G of each token of a step, in [0, 1]: (..., T).

    ``blocks`` holds for each layer, the last one last, the head-averaged attention among the step's own tokens, (..., T, T):
    row t is what is left of a row of softmax when all columns before the step are taken away. ``residual`` mixes each
    layer with the identity (Abnar & Zuidema 2020 use 0.5; the paper gives none).

    Raises :class:`~telltale.errors.DataError` for no blocks, blocks of different or non-square shapes, or rows whose sum
    exceeds 1 or entries below 0, which no attention has.
    """
    check_range("residual", residual, low=0.0, high=1.0)
    if not blocks:
        raise DataError("no attention blocks were given; expected the in-step block of at least one layer.")
    shape = blocks[0].shape
    if len(shape) < 2 or shape[-1] != shape[-2] or any(block.shape != shape for block in blocks):
        raise DataError(
            f"the blocks have shapes {[tuple(block.shape) for block in blocks]}; expected equal square ones (..., T, T)."
        )
    inside = torch.ones(shape[:-1], dtype=torch.promote_types(blocks[0].dtype, torch.float32), device=blocks[0].device)
    for block in blocks:
        wide = block.to(inside.dtype)
        if bool((wide < 0).any()) or bool((wide.sum(-1) > 1 + 1e-3).any()) or bool(torch.isnan(wide).any()):
            raise DataError("a block has negative entries, NaN or a row above 1; expected parts of rows of softmax.")
        inside = carried(wide, inside, residual=residual)
    return (1.0 - inside).clamp(0.0, 1.0)


def carried(block: Tensor, inside: Tensor, *, residual: float = 0.0) -> Tensor:
    """One layer of the rollout: the mass of each row (..., T) that is still inside the step after ``block`` (..., T, T)."""
    mixed = (block @ inside.unsqueeze(-1)).squeeze(-1)
    return mixed if residual == 0.0 else (1.0 - residual) * mixed + residual * inside


def by_row(grounding: Tensor, row: str = "self") -> Tensor:
    """G of each token by the row it is read from, (..., T) -> (..., T).

    "self" reads a token's own row; "predictor" the row of the position that predicted it, which for the first token of a
    step is in the prefix and is grounded entirely.
    """
    check_choice("row", row, ROWS)
    if row == "self":
        return grounding
    return torch.cat([torch.ones_like(grounding[..., :1]), grounding[..., :-1]], -1)


def sparsified(rows: Tensor, *, threshold: float = 0.01, renormalise: bool = False) -> Tensor:
    """Rows of attention (..., heads, T, n) with every head's weights below ``threshold`` dropped, averaged over heads: (..., T, n).

    What is dropped is lost: in long diffuse contexts everything is (uniform attention over 200 tokens at 0.01).
    ``renormalise`` divides what is left by its sum; raises :class:`~telltale.errors.DataError` where nothing is left.
    """
    check_range("threshold", threshold, low=0.0, below=1.0)
    kept = rows.masked_fill(rows < threshold, 0.0) if threshold else rows
    if renormalise:
        total = kept.sum(-1, keepdim=True)
        if bool((total == 0).any()):
            raise DataError(
                f"a row of attention has no weight of {threshold} or more, so nothing is left to renormalise; lower the "
                f"threshold."
            )
        kept = kept / total
    return kept.mean(-3)


def sparsified_grounding(
    rows: Sequence[Tensor],
    start: int,
    *,
    threshold: float = 0.01,
    renormalise: bool = False,
    residual: float = 0.0,
    sinks: int = 0,
) -> Tensor:
    """G with every head's weights below ``threshold`` dropped before heads are averaged, as the paper does to save memory.

    ``rows``: for each layer, the last one last, all rows (heads, n, n) of a sequence whose step begins at ``start``; prefix
    rows lose mass too, so the whole rows are needed. The first ``sinks`` tokens do not count as ground. Returns (n - start,).

    Raises :class:`~telltale.errors.DataError` for a row that loses everything under ``renormalise``.
    """
    check_range("residual", residual, low=0.0, high=1.0)
    if not rows or any(layer.ndim != 3 or layer.shape[-1] != layer.shape[-2] for layer in rows):
        raise DataError("expected for each layer all attention rows as (heads, n, n).")
    length = rows[0].shape[-1]
    if not 0 < start < length:
        raise DataError(f"the step starts at {start} of {length} tokens; expected a prefix and a step.")
    places = torch.arange(length, device=rows[0].device)
    mass = ((places < start) & (places >= sinks)).to(rows[0].dtype)
    for layer in rows:
        kept = sparsified(layer, threshold=threshold, renormalise=renormalise)
        mass = carried(kept, mass, residual=residual)
    return mass[start:]
