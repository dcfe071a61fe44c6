"""The warm-started extreme eigenvalue against exact ones on operators that drift."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError
from telltale.signals.hessian import MatrixOperator
from telltale.train.sharpness.tracking import ExtremeTracker

SIZE = 80


def drifting(time: float) -> torch.Tensor:
    """A spectrum with a few outliers over a bulk, whose eigenvectors turn slowly."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.rand(SIZE - 3, generator=generator).double() * 0.5 - 0.1, torch.tensor([2.0, 3.0, 5.0]).double()]
    )
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator).double())
    turn = torch.randn(SIZE, SIZE, generator=generator).double() * 0.02
    rotation = torch.linalg.matrix_exp(time * (turn - turn.T))
    vectors = rotation @ basis
    return vectors @ torch.diag(values * (1 + 0.1 * time)) @ vectors.T


def test_warm_looks_stay_within_a_percent_and_their_error_bar_is_true() -> None:
    tracker = ExtremeTracker(steps=6, seed=0)
    for look in range(12):
        matrix = drifting(0.2 * look)
        exact = torch.linalg.eigvalsh(matrix)
        found = tracker.look(MatrixOperator(matrix))
        assert found.matvecs == (6 if look else 12)
        assert float((exact - found.largest).abs().min()) <= found.error + 1e-12
        assert found.largest == pytest.approx(float(exact[-1]), rel=0.01)
        assert found.largest <= float(exact[-1]) + 1e-9
        assert found.smallest >= float(exact[0]) - 1e-9


def test_a_warm_look_beats_a_cold_one_of_the_same_cost() -> None:
    matrix, later = drifting(0.0), drifting(0.1)
    exact = float(torch.linalg.eigvalsh(later)[-1])
    tracker = ExtremeTracker(steps=4, seed=1)
    tracker.look(MatrixOperator(matrix))
    warm = exact - tracker.look(MatrixOperator(later)).largest
    cold = exact - ExtremeTracker(steps=4, cold_steps=4, seed=1).look(MatrixOperator(later)).largest
    assert 0 <= warm < 0.1 * cold


def test_the_noise_finds_a_direction_that_the_last_vector_does_not_contain() -> None:
    before, after = torch.diag(torch.tensor([1.0, 0.1, 0.1])), torch.diag(torch.tensor([1.0, 4.0, 0.1]))
    tracker = ExtremeTracker(steps=3, seed=0)
    tracker.look(MatrixOperator(before))
    assert tracker.look(MatrixOperator(after)).largest == pytest.approx(4.0, rel=1e-5)


def test_the_warm_vector_follows_a_preconditioner() -> None:
    """S H S along a steady direction d of H has the top vector S d: when S changes, one product is enough to see that."""
    direction = torch.tensor([3.0, 4.0, 0.0, 0.0]).double() / 5
    hessian = torch.outer(direction, direction)
    first, second = torch.ones(4).double(), torch.tensor([0.1, 10.0, 1.0, 1.0]).double()
    tracker = ExtremeTracker(steps=2, seed=0)
    tracker.look(MatrixOperator(first[:, None] * hessian * first), scale=first)
    matrix = second[:, None] * hessian * second
    found = tracker.look(MatrixOperator(matrix), scale=second)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)


def test_a_new_top_direction_among_two_thousand_is_found_within_a_few_looks() -> None:
    size = 2000
    values = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 0.1
    tracker = ExtremeTracker(steps=6, seed=0)
    values[0] = 1.0
    for _ in range(3):
        tracker.look(MatrixOperator(torch.diag(values)))
    values[1] = 1.5
    seen = [tracker.look(MatrixOperator(torch.diag(values))).largest for _ in range(4)]
    assert seen[-1] == pytest.approx(1.5, rel=1e-3)


def test_a_scale_that_is_not_finite_does_not_spoil_later_looks() -> None:
    tracker = ExtremeTracker(seed=0)
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    tracker.look(MatrixOperator(matrix), scale=torch.ones(3))
    found = tracker.look(MatrixOperator(matrix), scale=torch.full((3,), float("nan")))
    assert found.largest == pytest.approx(3.0, rel=1e-5)
    assert tracker.look(MatrixOperator(matrix), scale=torch.ones(3)).largest == pytest.approx(3.0, rel=1e-5)


def test_a_null_operator_and_a_change_of_size() -> None:
    tracker = ExtremeTracker(seed=0)
    found = tracker.look(MatrixOperator(torch.zeros(5, 5)))
    assert (found.largest, found.error) == (0.0, 0.0)
    assert tracker.look(MatrixOperator(torch.eye(7))).largest == pytest.approx(1.0)
    tracker.forget()
    assert not tracker.warm


def test_the_seed_decides() -> None:
    matrix = drifting(0.0)
    values = [
        ExtremeTracker(steps=3, cold_steps=3, seed=seed).look(MatrixOperator(matrix)).largest for seed in (1, 1, 2)
    ]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("options", [{"steps": 1}, {"cold_steps": 0}])
def test_bad_input(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected an integer >= 2"):
        ExtremeTracker(**options)
