"""The block form of grounding against the dense rollout, closed forms, and the sparsification trap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from telltale.errors import ConfigError, DataError
from telltale.signals.grounding import by_row, grounding_from_blocks, sparsified_grounding


def causal(length: int, layers: int, seed: int, heads: int = 4) -> Tensor:
    """Random causal row-stochastic attention, (layers, heads, n, n), float64."""
    scores = 3 * torch.randn(layers, heads, length, length, generator=torch.Generator().manual_seed(seed)).double()
    mask = torch.ones(length, length).triu(1).bool()
    return scores.masked_fill(mask, float("-inf")).softmax(-1)


def rollout(attention: Tensor, start: int, residual: float) -> Tensor:
    """The definition: the whole product of whole matrices, and each step token's mass before ``start``."""
    length = attention.shape[-1]
    product = torch.eye(length, dtype=attention.dtype)
    for layer in attention:
        product = ((1 - residual) * layer.mean(0) + residual * torch.eye(length, dtype=attention.dtype)) @ product
    assert torch.allclose(product.sum(-1), torch.ones(length).double(), atol=1e-12)
    return product[start:, :start].sum(-1)


@pytest.mark.parametrize("residual", [0.0, 0.5])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_blocks_give_the_dense_rollout(layers: int, residual: float) -> None:
    for seed, (length, start) in enumerate([(12, 5), (40, 1), (9, 8)]):
        attention = causal(length, layers, seed)
        blocks = [layer.mean(0)[start:, start:] for layer in attention]
        found = grounding_from_blocks(blocks, residual=residual)
        assert torch.allclose(found, rollout(attention, start, residual), atol=1e-12)
        assert bool(((found >= 0) & (found <= 1)).all())


def test_uniform_attention_has_a_closed_form() -> None:
    """A[p, q] = 1/(p+1): one layer leaves n/(p+1) on a prefix of n; more layers by the recursion of running means."""
    prefix, step = 6, 5
    places = torch.arange(prefix, prefix + step, dtype=torch.float64)
    block = torch.ones(step, step).double().tril() / (places + 1)[:, None]
    assert torch.allclose(grounding_from_blocks([block]), prefix / (places + 1))
    expected = [1.0] * prefix + (prefix / (places + 1)).tolist()
    for layers in (2, 3):
        expected = [sum(expected[: p + 1]) / (p + 1) for p in range(prefix + step)]
        found = grounding_from_blocks([block] * layers)
        assert torch.allclose(found, torch.tensor(expected[prefix:]).double(), atol=1e-12)
        half = grounding_from_blocks([block] * layers, residual=0.5)
        assert bool((half < found).all())


def test_a_single_token_step_read_at_its_predictor_is_grounded_entirely() -> None:
    grounding = grounding_from_blocks([torch.tensor([[0.4]])])
    assert by_row(grounding).tolist() == pytest.approx([0.6])
    assert by_row(grounding, "predictor").tolist() == [1.0]
    assert by_row(torch.tensor([0.9, 0.5, 0.2]), "predictor").tolist() == pytest.approx([1.0, 0.9, 0.5])


def test_batches_of_steps() -> None:
    attention = torch.stack([causal(10, 3, seed).mean(1) for seed in range(4)])
    found = grounding_from_blocks([attention[:, layer, 4:, 4:] for layer in range(3)])
    assert found.shape == (4, 6)
    for seed in range(4):
        assert torch.allclose(found[seed], rollout(causal(10, 3, seed), 4, 0.0), atol=1e-12)


def test_sparsified_without_dropping_is_the_rollout() -> None:
    attention = causal(20, 3, 0)
    found = sparsified_grounding(list(attention), 8, threshold=0.0)
    assert torch.allclose(found, rollout(attention, 8, 0.0), atol=1e-12)


def test_sparsifying_diffuse_attention_drops_everything() -> None:
    """Uniform attention over 200 tokens: no weight reaches .01, so nothing is left and nothing can be renormalised."""
    length, start = 200, 150
    uniform = (torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]).expand(3, 2, -1, -1)
    assert sparsified_grounding(list(uniform), start).tolist() == [0.0] * (length - start)
    with pytest.raises(DataError, match="nothing is left to renormalise"):
        sparsified_grounding(list(uniform), start, renormalise=True)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="at least one layer"):
        grounding_from_blocks([])
    with pytest.raises(DataError, match="square"):
        grounding_from_blocks([torch.zeros(2, 3)])
    with pytest.raises(DataError, match="rows of softmax"):
        grounding_from_blocks([torch.full((3, 3), 0.5)])
    with pytest.raises(DataError, match="rows of softmax"):
        grounding_from_blocks([torch.full((2, 2), float("nan"))])
    with pytest.raises(ConfigError, match="residual"):
        grounding_from_blocks([torch.zeros(2, 2)], residual=1.5)
    with pytest.raises(ConfigError, match="row='next'"):
        by_row(torch.zeros(2), "next")
    with pytest.raises(DataError, match="a prefix and a step"):
        sparsified_grounding([torch.ones(1, 3, 3) / 3], 3)
