"""One reduction to a band against a factorisation for every alpha; where the band fails, and where it is not worth it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from telltale.align.judge.gram import fold_of
from telltale.align.judge.ridge import ALPHAS, DIRECT, RidgePath, fit_ridge, solved

GRID = torch.tensor(ALPHAS, dtype=torch.float64)


def gram_and_cross(size: int, *, rows: int, columns: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return x.T @ x, x.T @ torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("size", "width"), [(1, 2), (5, 4), (6, 4), (7, 4), (30, 4), (64, 16), (65, 16), (97, 31)])
def test_every_size_and_width(size: int, width: int) -> None:
    gram, cross = gram_and_cross(size, rows=4 * size)
    kept = gram.clone()
    found = RidgePath(gram, width=width).solutions(GRID, cross)
    assert torch.equal(gram, kept)
    assert found.shape == (len(GRID), size, 3)
    for index, alpha in enumerate(GRID):
        wanted = torch.linalg.solve(gram + alpha * torch.eye(size).double(), cross)
        assert float((found[index] - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_the_default_reduces_where_it_pays_and_agrees_with_cholesky() -> None:
    for size in (DIRECT - 1, DIRECT, DIRECT + 77):
        gram, cross = gram_and_cross(size, rows=3 * size)
        for alpha, found in zip(GRID, RidgePath(gram).solutions(GRID, cross), strict=True):
            wanted = solved(gram, alpha, cross)
            assert float((found - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())


def test_columns_of_zeros_and_a_matrix_of_zeros() -> None:
    gram, cross = gram_and_cross(40, rows=200)
    gram[7], gram[:, 7], cross[7] = 0.0, 0.0, 0.0
    found = RidgePath(gram, width=8).solutions(GRID, cross)
    assert float(found[:, 7].abs().max()) <= 1e-15
    assert torch.allclose(found[5], solved(gram, GRID[5], cross), rtol=1e-11, atol=1e-14)
    nothing = RidgePath(torch.zeros_like(gram), width=8).solutions(GRID, cross)
    assert torch.allclose(nothing, cross / GRID[:, None, None], rtol=1e-14)


def test_alphas_below_rounding_take_the_eigenvalues() -> None:
    """A third as many rows as features, and alphas that the diagonal swallows."""
    gram, cross = gram_and_cross(60, rows=20)
    tiny = torch.tensor([1e-300, 1e-18, 1e-16], dtype=torch.float64)
    found = RidgePath(gram, width=8).solutions(tiny, cross)
    assert bool(torch.isfinite(found[1:]).all())
    for alpha, weights in list(zip(tiny, found, strict=True))[1:]:
        assert torch.allclose(weights, solved(gram, alpha, cross), rtol=1e-9)


def test_kept_solutions_are_as_exact_as_cholesky_on_badly_scaled_columns() -> None:
    """Columns of scales 1e-4 to 1e4, alpha far below: the band alone is wrong in the third digit."""
    generator = torch.Generator().manual_seed(2)
    scale = 10 ** torch.linspace(-4, 4, 60, dtype=torch.float64)
    x = torch.randn(500, 60, generator=generator, dtype=torch.float64) * scale
    y = (x / scale).sum(1, keepdim=True) + torch.randn(500, 1, generator=generator, dtype=torch.float64)
    gram, cross, alpha = x.T @ x, x.T @ y, torch.tensor(1e-6, dtype=torch.float64)
    solver, wanted = RidgePath(gram, width=8), solved(gram, alpha, cross)
    near = solver.solutions(alpha[None], cross)[0]
    assert float((near / wanted - 1).abs().max()) > 1e-8
    assert float((solver.refined(alpha, cross, near) / wanted - 1).abs().max()) <= 1e-9
    gram, cross = gram_and_cross(60, rows=500)
    solver, one = RidgePath(gram, width=8), torch.ones(1, dtype=torch.float64)
    refined = solver.refined(one[0], cross, solver.solutions(one, cross)[0])
    assert torch.allclose(refined, torch.linalg.solve(gram + torch.eye(60).double(), cross), rtol=1e-13, atol=1e-15)


def test_errors_by_the_band_are_those_of_refitting() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1500, DIRECT, generator=generator, dtype=torch.float64)
    labels = features[:, :2] * 3 + torch.randn(1500, 2, generator=generator, dtype=torch.float64) * 8
    labels[::3, 0] = math.nan
    groups = torch.arange(1500) // 3
    fit = fit_ridge(features, labels, groups=groups, folds=2)
    fold, rated = fold_of(groups, 2), ~labels[:, 0].isnan()
    for index, alpha in enumerate(GRID):
        wrong = 0.0
        for held_out in range(2):
            x, y = features[rated & (fold != held_out)], labels[rated & (fold != held_out), :1]
            there = rated & (fold == held_out)
            wrong += float((labels[there, :1] - features[there] @ solved(x.T @ x, alpha, x.T @ y)).square().sum())
        assert fit.validation_mse[index, 0] == pytest.approx(wrong / int(rated.sum()), rel=1e-9)
