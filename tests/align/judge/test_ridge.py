"""Ridge from statistics against scikit-learn and against doing it the long way; missing labels, merging, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from telltale.align.judge.gram import GramStatistics, fold_of
from telltale.align.judge.ridge import ALPHAS, fit_from_statistics, fit_ridge, official_split, solved
from telltale.errors import CheckpointError, ConfigError, DataError

ROWS, SIZE, OBJECTIVES = 600, 24, 5


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels with three patterns of missing ones, and prompts of four responses."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    weights = torch.randn(OBJECTIVES, SIZE, generator=generator, dtype=torch.float64)
    labels = features @ weights.T + torch.randn(ROWS, OBJECTIVES, generator=generator, dtype=torch.float64) * 3
    which = torch.randint(3, (ROWS,), generator=generator)
    missing = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()[which]
    return features.to(dtype), labels.masked_fill(missing, math.nan), torch.arange(ROWS) // 4


def by_hand(features: Tensor, labels: Tensor, alpha: float) -> np.ndarray:
    rated = ~labels.isnan()
    model = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky")
    return model.fit(features[rated].double().numpy(), labels[rated].numpy()).coef_


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_weights_are_scikit_learns_on_every_objectives_own_rows(dtype: torch.dtype, tolerance: float) -> None:
    features, labels, groups = problem(dtype=dtype)
    fit = fit_ridge(features, labels, groups=groups)
    for member in range(OBJECTIVES):
        wanted = by_hand(features, labels[:, member], float(fit.alpha[member]))
        assert np.abs(fit.weights[member].numpy() - wanted).max() <= tolerance * np.abs(wanted).max()
        assert fit.rows[member] == int((~labels[:, member].isnan()).sum())
    assert not bool(fit.under_determined.any())
    assert torch.allclose(fit.predict(features.double()), features.double() @ fit.weights.T)


def test_grouped_errors_are_those_of_refitting_without_each_fold() -> None:
    features, labels, groups = problem(1)
    fit = fit_ridge(features, labels, groups=groups, folds=4)
    fold = fold_of(groups, 4)
    for member in range(OBJECTIVES):
        rated = ~labels[:, member].isnan()
        for index, alpha in enumerate(ALPHAS):
            wrong = 0.0
            for held_out in range(4):
                weights = by_hand(features[fold != held_out], labels[fold != held_out, member], alpha)
                there = rated & (fold == held_out)
                wrong += float((labels[there, member] - features[there] @ torch.tensor(weights)).square().sum())
            assert fit.validation_mse[index, member] == pytest.approx(wrong / int(rated.sum()), rel=1e-9)
        assert fit.alpha[member] == ALPHAS[int(fit.validation_mse[:, member].argmin())]


def test_rows_of_a_prompt_share_a_fold_wherever_they_come() -> None:
    groups = torch.randint(1000, (5000,), generator=torch.Generator().manual_seed(2))
    fold = fold_of(groups, 5)
    assert all(len(fold[groups == group].unique()) == 1 for group in groups.unique()[:50])
    assert torch.equal(fold_of(groups[:7], 5), fold[:7])
    counts = fold_of(torch.arange(5000), 5).bincount()
    assert int(counts.min()) > 850


def test_leave_one_out_is_brute_force_and_gcv_its_mean() -> None:
    features, labels, _ = problem(3)
    features, labels = features[:60], labels[:60, :1].clone()
    labels[~labels.isnan()] += 1.0
    rated = (~labels[:, 0].isnan()).nonzero()[:, 0]
    fit = fit_ridge(features, labels, validation="loo", alphas=[0.1, 10.0])
    generalised = fit_ridge(features, labels, validation="gcv", alphas=[0.1, 10.0])
    for index, alpha in enumerate((0.1, 10.0)):
        wrong = []
        for row in rated.tolist():
            others = rated[rated != row]
            weights = torch.tensor(by_hand(features[others], labels[others, 0], alpha))
            wrong.append(float((labels[row, 0] - features[row] @ weights) ** 2))
        assert fit.validation_mse[index, 0] == pytest.approx(np.mean(wrong), rel=1e-9)
        own = features[rated]
        hat = own @ solved(own.T @ own, torch.tensor(alpha), own.T)
        residual = labels[rated, 0] - hat @ labels[rated, 0]
        assert generalised.validation_mse[index, 0] == pytest.approx(
            float((residual / (1 - hat.diagonal().mean())).square().mean()), rel=1e-9
        )


def test_rows_wise_validation_warns_where_prompts_repeat() -> None:
    features, labels, groups = problem()
    with pytest.warns(UserWarning, match="prompts have several"):
        fit_ridge(features, labels, groups=groups, validation="loo")


def test_the_official_form_is_the_released_scripts() -> None:
    """80/20 rows, alpha by the 20%, weights of the 80% alone."""
    features, labels, _ = problem(4)
    fit = fit_ridge(features, labels, validation="official")
    held_out = official_split(ROWS).bool()
    for member in range(OBJECTIVES):
        rated = ~labels[:, member].isnan()
        errors = []
        for alpha in ALPHAS:
            weights = torch.tensor(by_hand(features[~held_out], labels[~held_out, member], alpha))
            there = rated & held_out
            errors.append(float((labels[there, member] - features[there] @ weights).square().mean()))
        best = ALPHAS[int(np.argmin(errors))]
        assert fit.alpha[member] == best
        wanted = by_hand(features[~held_out], labels[~held_out, member], best)
        assert np.abs(fit.weights[member].numpy() - wanted).max() <= 1e-10 * np.abs(wanted).max()


def statistics_of(parts: list[slice], **options: object) -> list[GramStatistics]:
    features, labels, groups = problem(5)
    found = []
    for part in parts:
        statistics = GramStatistics(SIZE, OBJECTIVES, 3)
        statistics.add(features[part], labels[part], groups=groups[part], **options)  # type: ignore[arg-type]
        found.append(statistics)
    return found


def test_shards_merge_in_any_order(tmp_path: Path) -> None:
    [whole] = statistics_of([slice(0, ROWS)])
    shards = statistics_of([slice(0, 37), slice(37, 400), slice(400, 401), slice(401, ROWS)])
    wanted = fit_from_statistics(whole)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = shards[order[0]]
        for index in order[1:]:
            merged.save(tmp_path / "kept.safetensors")
            merged = GramStatistics.load(tmp_path / "kept.safetensors").merge(shards[index])
        found = fit_from_statistics(merged)
        assert torch.equal(found.alpha, wanted.alpha)
        assert float((found.weights - wanted.weights).abs().max()) <= 1e-12 * float(wanted.weights.abs().max())
    assert whole.rows_of(0) == merged.rows_of(0)


def test_rows_without_any_label_change_nothing_at_all() -> None:
    features, labels, groups = problem(6)
    more = torch.cat([features, 1e6 * torch.ones(9, SIZE).double()])
    empty = torch.cat([labels, torch.full((9, OBJECTIVES), math.nan).double()])
    plain = fit_ridge(features, labels, groups=groups)
    padded = fit_ridge(more, empty, groups=torch.cat([groups, torch.arange(9)]))
    assert torch.equal(plain.weights, padded.weights)
    assert torch.equal(plain.validation_mse, padded.validation_mse)


def test_weights_of_rows_are_repetitions() -> None:
    features, labels, groups = problem(7)
    times = torch.randint(0, 4, (ROWS,), generator=torch.Generator().manual_seed(0))
    repeated = fit_ridge(
        features.repeat_interleave(times, 0), labels.repeat_interleave(times, 0), groups=groups.repeat_interleave(times)
    )
    weighted = fit_ridge(features, labels, groups=groups, weights=times.double())
    assert torch.equal(repeated.alpha, weighted.alpha)
    assert torch.allclose(repeated.weights, weighted.weights, rtol=1e-9, atol=1e-12)
    assert torch.allclose(repeated.validation_mse, weighted.validation_mse, rtol=1e-9)


def test_an_intercept_is_not_penalised() -> None:
    features, labels, groups = problem(8)
    labels = labels.nan_to_num(0.0) + torch.arange(OBJECTIVES) * 100.0
    fit = fit_ridge(features + 5.0, labels, groups=groups, intercept=True, alphas=[10.0])
    for member in range(OBJECTIVES):
        model = Ridge(alpha=10.0, solver="cholesky").fit((features + 5.0).numpy(), labels[:, member].numpy())
        assert np.allclose(fit.weights[member].numpy(), model.coef_, rtol=1e-9, atol=1e-11)
        assert fit.intercept[member] == pytest.approx(model.intercept_, rel=1e-9)
    labels[:40, 1] = math.nan  # each objective has means of its own
    gaps = fit_ridge(features + 5.0, labels, groups=groups, intercept=True, alphas=[10.0])
    model = Ridge(alpha=10.0, solver="cholesky").fit((features + 5.0).numpy()[40:], labels[40:, 1].numpy())
    assert np.allclose(gaps.weights[1].numpy(), model.coef_, rtol=1e-9, atol=1e-11)
    assert gaps.intercept[1] == pytest.approx(model.intercept_, rel=1e-9)


def test_fewer_ratings_than_features_are_flagged_and_still_fitted() -> None:
    features, labels, groups = problem(9)
    labels[20:, 0] = math.nan
    fit = fit_ridge(features, labels, groups=groups)
    assert fit.under_determined.tolist() == [True, False, False, False, False]
    assert bool(torch.isfinite(fit.weights).all())


def test_a_singular_gram_matrix_is_no_obstacle() -> None:
    features, labels, groups = problem(10)
    features[:, 1] = features[:, 0]
    fit, firm = (fit_ridge(features, labels, groups=groups, alphas=[alpha]) for alpha in (1e-13, 1e-3))
    assert torch.allclose(fit.predict(features), firm.predict(features), atol=1e-3)


def test_bad_input_names_what_is_wrong() -> None:
    features, labels, groups = problem()
    broken = features.clone()
    broken[123, 4] = math.inf
    with pytest.raises(DataError, match="row 123 has a feature that is NaN or infinite"):
        fit_ridge(broken, labels)
    with pytest.raises(DataError, match="answer 123 has"):
        fit_ridge(broken, labels, rows=[f"answer {row}" for row in range(ROWS)])
    for alphas in ([], [-1.0], [0.0], [math.nan]):
        with pytest.raises(ConfigError, match="all above 0"):
            fit_ridge(features, labels, alphas=alphas)
    empty = labels.clone()
    empty[:, 2] = math.nan
    with pytest.raises(DataError, match="no row rates 'objective 2'"):
        fit_ridge(features, empty)
    with pytest.raises(DataError, match="one fold of prompts"):
        fit_ridge(features, labels, groups=torch.zeros(ROWS).long())
    with pytest.raises(DataError, match="groups has shape"):
        fit_ridge(features, labels, groups=groups[:-1])
    with pytest.raises(DataError, match="weight is below 0"):
        fit_ridge(features, labels, weights=-torch.ones(ROWS))
    with pytest.raises(ConfigError, match="validation='random'"):
        fit_ridge(features, labels, validation="random")
    with pytest.raises(DataError, match="cannot be merged"):
        GramStatistics(3, 1, 2).merge(GramStatistics(4, 1, 2))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no ridge statistics"):
        GramStatistics.load(tmp_path / "file")
