"""The consistency medoid against its definition, its ties, and the rule that it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from telltale.errors import DataError
from telltale.signals.diversity import agreement, consistency_medoid


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_it_is_the_smallest_diagonal_of_the_softmaxed_similarities() -> None:
    for seed in range(50):
        embeddings = unit(torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).double())
        softmaxed = (embeddings @ embeddings.T).softmax(1)
        index, alignment = consistency_medoid(embeddings)
        assert torch.allclose(alignment, softmaxed.diagonal(), atol=1e-12)
        assert index == int(softmaxed.diagonal().argmin())


def test_it_follows_its_candidates_when_they_are_permuted() -> None:
    embeddings = unit(torch.randn(9, 4, generator=torch.Generator().manual_seed(3)))
    index, _ = consistency_medoid(embeddings)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    moved, _ = consistency_medoid(embeddings[order])
    assert int(order[moved]) == index


@pytest.mark.parametrize("count", [1, 2, 16])
def test_identical_candidates_tie_at_one_over_k_and_the_first_wins(count: int) -> None:
    index, alignment = consistency_medoid(
        unit(torch.randn(1, 6, generator=torch.Generator().manual_seed(1))).expand(count, -1)
    )
    assert index == 0
    assert torch.allclose(alignment, torch.full((count,), 1 / count).double())


def test_it_is_not_the_rule_of_mean_similarity() -> None:
    """Near twins outweigh a candidate that is moderately near to everyone."""
    differ = 0
    for seed in range(200):
        embeddings = unit(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).double())
        by_mean = int((embeddings @ embeddings.T).mean(1).argmax())
        differ += consistency_medoid(embeddings)[0] != by_mean
    assert 5 < differ < 100


def test_agreement_is_the_share_of_the_most_frequent() -> None:
    assert agreement(["b", "a", "a", "c"]) == (1, 0.5)
    assert agreement([(1, 2), (3,)]) == (0, 0.5)
    assert agreement([7]) == (0, 1.0)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="candidates, dimensions"):
        consistency_medoid(torch.zeros(0, 4))
    with pytest.raises(DataError, match="embedding 1 has length 2"):
        consistency_medoid(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    with pytest.raises(DataError, match="length nan"):
        consistency_medoid(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))
    with pytest.raises(DataError, match="at least one"):
        agreement([])
