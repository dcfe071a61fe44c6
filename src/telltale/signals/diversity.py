"""Which of several candidates speaks for all of them: agreement and the consistency medoid.

SpecGuard (arXiv 2604.15244) samples k candidates of a step and keeps the one whose softmaxed self-similarity is smallest;
since a unit vector's similarity with itself is 1, that is the one with the largest log-sum-exp of similarities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from telltale.errors import DataError

TOLERANCE = 1e-3


def consistency_medoid(embeddings: Tensor) -> tuple[int, Tensor]:
    """The candidate that the others resemble most, and every candidate's self-alignment d (k,), in (0, 1].

    ``embeddings``: (k, d) rows of length 1. d_j = exp(<e_j, e_j>) / sum_l exp(<e_j, e_l>); the index is argmin d, the lowest
    one of a tie. It is not the medoid of *mean* similarity: being very near a few counts for more than being near to all.

    Raises :class:`~telltale.errors.DataError` for no candidates or rows that are not of length 1.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise DataError(f"the embeddings have shape {tuple(embeddings.shape)}; expected (candidates, dimensions).")
    wide = embeddings.double()
    lengths = wide.norm(dim=1)
    if not bool(((lengths - 1).abs() <= TOLERANCE).all()):
        worst = int((lengths - 1).abs().nan_to_num(nan=torch.inf).argmax())
        raise DataError(f"embedding {worst} has length {float(lengths[worst]):.4g}; expected rows of length 1.")
    wide = wide / lengths[:, None]
    similarity = wide @ wide.T
    similarity.fill_diagonal_(1.0)
    alignment = (1.0 - similarity.logsumexp(1)).exp()
    # Equal candidates differ by rounding alone; the lowest index among them is the documented choice.
    tied = alignment <= alignment.min() * (1 + 1e-12)
    return int(tied.nonzero()[0]), alignment


def agreement(candidates: Sequence[Hashable]) -> tuple[int, float]:
    """The first candidate of the most frequent kind, and the share of candidates that equal it, in (0, 1]."""
    if not candidates:
        raise DataError("there are no candidates; expected at least one.")
    counts = Counter(candidates)
    index = max(range(len(candidates)), key=lambda place: (counts[candidates[place]], -place))
    return index, counts[candidates[index]] / len(candidates)
