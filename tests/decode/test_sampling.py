"""The acceptance rule against explicit distributions: empirical laws within four standard errors, seeded."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from telltale.decode.sampling import Sampling, accept, point_mass, residual, sample, truncated
from telltale.errors import NumericalError

DRAWS = 20_000


def close_in_law(tokens: torch.Tensor, law: torch.Tensor) -> None:
    """Every token's frequency lies within four standard errors of its probability; impossible tokens never occur."""
    counts = torch.bincount(tokens, minlength=len(law)).double()
    share, expected = counts / counts.sum(), law.double()
    error = (expected * (1 - expected) / counts.sum()).sqrt()
    assert (share - expected).abs().le(4 * error + 1e-12).all(), (share, expected)


def speculate(p: torch.Tensor, q: torch.Tensor, following: torch.Tensor, seed: int = 0):
    """One drafted token per row of DRAWS rows: (accepted, first emitted token, the token drawn last)."""
    generator = torch.Generator().manual_seed(seed)
    drafted = sample(q.expand(DRAWS, -1), generator).unsqueeze(-1)
    target = torch.stack([p, following]).expand(DRAWS, 2, -1)
    stands, after = accept(
        target,
        q.expand(DRAWS, 1, -1),
        drafted,
        counts=torch.ones(DRAWS, dtype=torch.int64),
        generator=generator,
    )
    return stands, torch.where(stands == 1, drafted[:, 0], after), after


P = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
Q = torch.tensor([0.1, 0.6, 0.1, 0.0, 0.2])
FOLLOWING = torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25])


def test_the_emitted_token_has_the_target_law():
    stands, first, after = speculate(P, Q, FOLLOWING)
    close_in_law(first, P)
    close_in_law(after[stands == 1], FOLLOWING)
    overlap = torch.minimum(P, Q).sum().item()
    assert abs(stands.double().mean().item() - overlap) < 4 * (overlap * (1 - overlap) / DRAWS) ** 0.5


def test_equal_laws_are_always_accepted():
    stands, first, _ = speculate(P, P, FOLLOWING)
    assert stands.eq(1).all()
    close_in_law(first, P)


def test_disjoint_laws_are_never_accepted():
    p, q = torch.tensor([0.3, 0.7, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.25, 0.25])
    stands, first, _ = speculate(p, q, FOLLOWING)
    assert stands.eq(0).all()
    close_in_law(first, p)


def test_a_point_mass_draft_keeps_the_law():
    stands, first, _ = speculate(P, point_mass(torch.tensor(1), 5), FOLLOWING)
    close_in_law(first, P)
    assert abs(stands.double().mean().item() - 0.2) < 4 * (0.16 / DRAWS) ** 0.5


def test_a_residual_of_nothing_is_the_target():
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))[0], torch.tensor([0.0, 1.0]))


def test_padding_behind_the_count_is_not_accepted():
    target = P.expand(DRAWS, 3, -1)
    drafted = torch.zeros(DRAWS, 2, dtype=torch.int64)
    stands, after = accept(
        target,
        point_mass(drafted, 5),
        drafted,
        counts=torch.zeros(DRAWS, dtype=torch.int64),
        generator=torch.Generator().manual_seed(1),
    )
    assert stands.eq(0).all()
    close_in_law(after, P)


def test_without_a_draft_the_draws_are_those_of_plain_sampling():
    empty = torch.empty(4, 0, dtype=torch.int64)
    stands, tokens = accept(
        P.expand(4, 1, -1),
        torch.empty(4, 0, 5),
        empty,
        counts=torch.zeros(4, dtype=torch.int64),
        generator=torch.Generator().manual_seed(7),
    )
    assert torch.equal(tokens, sample(P.expand(4, -1), torch.Generator().manual_seed(7)))
    assert stands.eq(0).all()


def test_a_top_p_that_rounds_to_zero_leaves_the_most_likely_token():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    for top_p in (1e-30, 1e-300, 5e-324):
        law = Sampling(temperature=1.0, top_p=top_p).distribution(scores, [])
        assert torch.equal(law, point_mass(scores.argmax(-1), 7))


@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.9, 1.0])
def test_truncation_is_that_of_transformers(top_k, top_p):
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    wanted = scores
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p and top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    assert torch.allclose(truncated(scores, top_k=top_k, top_p=top_p).softmax(-1), wanted.softmax(-1))


def test_a_processor_sees_the_prefix_of_its_own_position():
    seen = []

    def processor(ids, scores):
        seen.append(ids.tolist())
        return scores

    Sampling(processor=processor).distribution(torch.zeros(2, 4), [[1, 2], [1, 2, 3]])
    assert seen == [[[1, 2]], [[1, 2, 3]]]


def test_nan_and_impossible_distributions_raise():
    with pytest.raises(NumericalError):
        Sampling(temperature=1.0).distribution(torch.tensor([[0.0, float("nan")]]), [[0]])
    with pytest.raises(NumericalError):
        Sampling(temperature=1.0, processor=lambda ids, scores: scores - torch.inf).distribution(
            torch.zeros(1, 4), [[0]]
        )
