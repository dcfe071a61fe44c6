"""The exact lambda against the weighted median and against brute force, within prompts and pooled, and the report's warning."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from telltale.align.judge import decorrelation
from telltale.align.judge.decorrelation import (
    correlation,
    decorrelate,
    decorrelating_lambda,
    decorrelation_report,
    fit_transform,
    official_lambda,
    transform_matrix,
)
from telltale.errors import ConfigError, DataError, NumericalError


def pair(seed: int, rows: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(rows, generator=generator).double()
    return 0.4 * v.pow(3) + torch.randn(rows, generator=generator).double(), v


@pytest.mark.parametrize("method", decorrelation.METHODS)
def test_after_decorrelation_nothing_is_left_but_one_jump(method: str) -> None:
    for seed in range(5):
        r, v = pair(seed)
        value = decorrelating_lambda(r, v, method=method)
        assert abs(correlation(r - value * v, v, method=method)) <= (1e-12 if method == "pearson" else 2e-4)


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_bracketing_is_the_weighted_median(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10):
        r, v = pair(seed)
        listed = decorrelating_lambda(r, v, method=method)
        monkeypatch.setattr(decorrelation, "_MOST_LISTED", 1)
        found = decorrelating_lambda(r, v, method=method)
        monkeypatch.undo()
        if method == "spearman":
            assert found == pytest.approx(listed, rel=1e-10)
            continue
        # An even number of equal weights has a gap in its middle: Kendall's tau is zero for every lambda in there.
        left = abs(correlation(r - found * v, v, method=method))
        assert left <= abs(correlation(r - listed * v, v, method=method)) + 1e-12


def test_kendalls_lambda_is_theil_and_sens_slope() -> None:
    r, v = pair(1)
    assert decorrelating_lambda(r, v, method="kendall") == pytest.approx(
        stats.theilslopes(r.numpy(), v.numpy())[0], rel=1e-12
    )


@pytest.mark.parametrize("method", decorrelation.METHODS)
def test_it_follows_scale_and_shift(method: str) -> None:
    r, v = pair(2)
    value = decorrelating_lambda(r, v, method=method)
    assert decorrelating_lambda(3 * r + 2, v, method=method) == pytest.approx(3 * value)
    assert decorrelating_lambda(r + 5 * v, v, method=method) == pytest.approx(value + 5)
    assert decorrelating_lambda(v, v, method=method) == pytest.approx(1.0)
    assert decorrelating_lambda(torch.full_like(r, 4.0), v, method=method) == pytest.approx(0.0, abs=1e-12)


def test_independent_rewards_need_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    v, r = torch.randn(2, 20000, generator=generator).double()
    assert abs(decorrelating_lambda(r, v)) < 0.02


def test_the_correlation_never_rises_with_lambda() -> None:
    r, v = pair(4, rows=80)
    seen = [correlation(r - value * v, v) for value in np.linspace(-3, 3, 121)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(seen))


def grouped(seed: int = 0, prompts: int = 300, responses: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled correlation near zero that hides a strong one within prompts."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts).repeat_interleave(responses)
    base = torch.randn(prompts, generator=generator).double().repeat_interleave(responses)
    own = torch.randn(prompts * responses, generator=generator).double()
    noise = torch.randn(prompts * responses, generator=generator).double()
    return -0.4 * base + 0.4 * own + 0.2 * noise, base + own, groups


def test_pooled_zero_hides_what_is_within_prompts_and_the_report_says_so() -> None:
    r, v, groups = grouped()
    rewards = torch.stack([r, v], 1)
    assert abs(correlation(r, v)) < 0.15
    assert correlation(r, v, groups=groups) > 0.7
    pooled, within = fit_transform(rewards, [1]), fit_transform(rewards, [1], groups=groups)
    names = ["quality", "verbosity"]
    told = decorrelation_report(rewards, pooled, [1], names, groups=groups, resamples=20)
    assert len(told.warnings) == 1
    assert "decorrelate within prompts" in told.warnings[0]
    assert told.worst_pooled < 0.01 < 0.6 < told.worst_within
    fixed = decorrelation_report(rewards, within, [1], names, groups=groups, resamples=20)
    assert not fixed.warnings
    assert fixed.worst_within < 0.05
    row = fixed.rows[0]
    assert row.within_after.low <= row.within_after.value <= row.within_after.high
    assert row.within_before.value > 0.7


@pytest.mark.parametrize("method", decorrelation.METHODS)
def test_within_groups_only_differences_within_groups_count(method: str) -> None:
    r, v, groups = grouped(1, prompts=60)
    offsets = 100 * torch.randn(60, generator=torch.Generator().manual_seed(2)).double().repeat_interleave(5)
    value = decorrelating_lambda(r, v, groups=groups, method=method)
    assert decorrelating_lambda(r + offsets, v, groups=groups, method=method) == pytest.approx(value, rel=1e-6)
    slopes, weights = [], []
    for prompt in range(60):
        rows = (groups == prompt).nonzero()[:, 0].tolist()
        ranks = stats.rankdata(v[rows])
        for a in rows:
            for b in rows:
                if a < b:
                    slopes.append(float((r[a] - r[b]) / (v[a] - v[b])))
                    weights.append(abs(ranks[rows.index(a)] - ranks[rows.index(b)]) if method == "spearman" else 1.0)
    if method == "kendall":
        assert value == pytest.approx(float(np.median(slopes)), rel=1e-9)
    if method == "spearman":
        order = np.argsort(slopes)
        mass = np.cumsum(np.array(weights)[order])
        assert value == pytest.approx(np.array(slopes)[order][np.searchsorted(mass, mass[-1] / 2)], rel=1e-9)


@pytest.mark.parametrize("method", decorrelation.METHODS)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_within_groups_nothing_is_left_but_one_jump_whatever_the_nuisances_shape(method: str, size: int) -> None:
    """Lengths have long tails: weights by difference of values would leave .2 here."""
    generator = torch.Generator().manual_seed(size)
    groups = torch.arange(400).repeat_interleave(size)
    v = (3 * torch.randn(400 * size, generator=generator)).exp().double()
    r = v.pow(0.3) + torch.randn(400 * size, generator=generator).double()
    value = decorrelating_lambda(r, v, groups=groups, method=method)
    assert correlation(r, v, method=method, groups=groups) > 0.2
    assert abs(correlation(r - value * v, v, method=method, groups=groups)) < 5e-3


def test_what_is_not_defined_is_not_called_zero() -> None:
    r, v = pair(8, rows=20)
    told = decorrelation_report(
        torch.stack([r, v], 1), torch.eye(2), [1], ["a", "b"], groups=torch.arange(20), resamples=5
    )
    assert math.isnan(told.worst_within)
    assert told.worst_pooled > 0.1


def test_kendall_within_groups_is_scipys_where_there_is_one_group() -> None:
    r, v = pair(5, rows=60)
    one = torch.zeros(60).long()
    for method in decorrelation.METHODS:
        assert correlation(r, v, method=method, groups=one) == pytest.approx(
            correlation(r, v, method=method), abs=1e-12
        )


def test_the_transform_differs_from_the_identity_in_the_nuisances_row_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    rewards = torch.randn(500, 4, generator=generator).double()
    rewards[:, [0, 1, 3]] += rewards[:, [2]] * torch.tensor([0.3, -0.5, 1.0])
    lambdas = decorrelate(rewards, rewards[:, 2])
    assert lambdas[2] == pytest.approx(1.0)
    transform = transform_matrix(lambdas, [2])
    assert not torch.equal(transform, transform.T)
    others = [0, 1, 3]
    assert torch.equal(transform[others][:, others], torch.eye(3).double())
    turned = rewards @ transform
    assert not bool(turned[:, 2].any())
    for member in others:
        assert torch.allclose(turned[:, member], rewards[:, member] - lambdas[member] * rewards[:, 2], atol=1e-12)
        assert abs(correlation(turned[:, member], rewards[:, 2])) < 1e-3
        # T transposed would have moved the nuisance instead.
        assert abs(correlation((rewards @ transform.T)[:, member], rewards[:, 2])) > 0.2


@pytest.mark.long
@pytest.mark.parametrize("how", ["sequential", "joint"])
def test_several_nuisances(how: str) -> None:
    generator = torch.Generator().manual_seed(7)
    rewards = torch.randn(800, 4, generator=generator).double()
    rewards[:, 3] += 0.5 * rewards[:, 1]
    rewards[:, 0] += rewards[:, 1] - 0.7 * rewards[:, 3]
    transform = fit_transform(rewards, [1, 3], how=how)
    turned = rewards @ transform
    assert not bool(turned[:, [1, 3]].any())
    left = [abs(correlation(turned[:, 0], rewards[:, column])) for column in (1, 3)]
    assert max(left) < (1e-4 if how == "joint" else 0.05)


def test_the_released_scripts_grid_stops_short() -> None:
    generator = torch.Generator().manual_seed(8)
    v = torch.randn(5000, generator=generator).double()
    r = 0.33 * v + torch.randn(5000, generator=generator).double()
    assert official_lambda(r, v) == 0.3
    assert official_lambda(-r, v) == 0.0
    assert official_lambda(v, v) == 1.0
    assert len(decorrelation.OFFICIAL_GRID) == 24
    assert decorrelate(torch.stack([r, -r], 1), v, grid="official").tolist() == [0.3, 0.0]
    with pytest.raises(ConfigError, match="pooled"):
        decorrelate(r[:, None], v, grid="official", groups=torch.zeros(5000).long())


def test_bad_input() -> None:
    r, v = pair(9)
    with pytest.raises(DataError, match="same value in every row"):
        decorrelate(r[:, None], torch.ones_like(v))
    with pytest.raises(DataError, match="no group has two rows"):
        decorrelate(r[:, None], v, groups=torch.arange(len(v)))
    with pytest.raises(DataError, match="no group has two rows that differ"):
        decorrelate(
            r[:, None], torch.arange(150).repeat_interleave(2).double(), groups=torch.arange(150).repeat_interleave(2)
        )
    with pytest.raises(DataError, match="at least two rows"):
        decorrelating_lambda(r[:1], v[:1])
    with pytest.raises(DataError, match=r"expected \(n, K\)"):
        decorrelate(r, v)
    with pytest.raises(NumericalError, match="NaN"):
        decorrelating_lambda(r.masked_fill(torch.arange(len(r)) == 3, math.nan), v)
    with pytest.raises(ConfigError, match="method='rank'"):
        decorrelating_lambda(r, v, method="rank")
    with pytest.raises(ConfigError, match="distinct columns"):
        fit_transform(torch.stack([r, v], 1), [1, 1])
