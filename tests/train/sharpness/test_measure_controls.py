"""Controls of one point against dense matrices."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch

from telltale.errors import ConfigError, DataError

# The package has a function of this name, so the module is asked for by its path.
controls = importlib.import_module("telltale.train.sharpness.measure")


def dense(*eigenvalues, batch=None):
    """A spectrum of exact eigenvalues, one run per minibatch unless told otherwise."""
    lines = [torch.as_tensor(values, dtype=torch.float64) for values in eigenvalues]
    weights = [torch.full((len(line),), 1.0 / len(line), dtype=torch.float64) for line in lines]
    return SimpleNamespace(size=len(lines[0]), nodes=lines, weights=weights, batch=batch or list(range(len(lines))))


def random_hessians(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, size, size // 2, generator=generator, dtype=torch.float64)
    return factors @ factors.transpose(1, 2)


def test_controls_are_those_of_the_matrices():
    matrices = random_hessians(3, 8)
    spectrum = dense(*torch.linalg.eigvalsh(matrices))
    rate = 0.3
    jacobian = torch.eye(8, dtype=torch.float64) - rate * matrices
    assert controls.largest_eigenvalue(spectrum) == pytest.approx(float(torch.linalg.matrix_norm(matrices, 2).mean()))
    assert controls.trace(spectrum) == pytest.approx(float(matrices.diagonal(dim1=1, dim2=2).sum(1).mean()))
    expected = float(torch.linalg.matrix_norm(jacobian, 2).log().mean())
    assert controls.leading_exponent(spectrum, rate=rate) == pytest.approx(expected)
    ranks = torch.linalg.matrix_rank(matrices)
    assert controls.null_space(spectrum) == pytest.approx(float((8 - ranks).double().mean()))


def test_the_leading_exponent_sees_negative_curvature_and_the_far_side_of_the_edge():
    assert controls.leading_exponent(dense([-1.0, 0.0, 1.0]), rate=0.5) == pytest.approx(math.log(1.5))
    assert controls.leading_exponent(dense([0.0, 10.0]), rate=0.5) == pytest.approx(math.log(4.0))
    assert controls.leading_exponent(dense([0.0, 1.0]), rate=0.5) == 0.0


def test_probes_of_one_minibatch_are_one_hessian_and_minibatches_weigh_alike():
    probes = dense([0.0, 4.0], [0.0, 6.0], [0.0, 1.0], batch=[0, 0, 1])
    assert controls.largest_eigenvalue(probes) == pytest.approx((6.0 + 1.0) / 2)
    assert controls.trace(probes) == pytest.approx((5.0 + 1.0) / 2)
    quadrature = SimpleNamespace(
        size=10, nodes=[torch.tensor([0.0, 2.0])], weights=[torch.tensor([0.75, 0.25])], batch=[0]
    )
    assert controls.trace(quadrature) == pytest.approx(5.0)
    assert controls.null_space(quadrature) == pytest.approx(7.5)


def test_the_null_space_follows_its_tolerance():
    spectrum = dense([1e-9, 1e-4, 1.0, -1e-9])
    assert controls.null_space(spectrum) == pytest.approx(2.0)
    assert controls.null_space(spectrum, tolerance=0.0) == 0.0
    assert controls.null_space(spectrum, tolerance=1e-3) == pytest.approx(3.0)
    assert controls.null_space(dense([0.0, 0.0])) == pytest.approx(2.0), "a flat loss is all null space"


def test_point_controls_name_everything():
    parameters = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    values = controls.point_controls(
        dense([0.0, 2.0]), rate=0.5, parameters=parameters, train_loss=0.25, batch_size=5, null_tolerance=1e-10
    )
    assert values == {
        "lambda_max": 2.0,
        "trace": 2.0,
        "lambda_1": 0.0,
        "null_space": 1.0,
        "train_loss": 0.25,
        "weight_norm": pytest.approx(5.0),
        "learning_rate": 0.5,
        "batch_size": 5.0,
        "rate_over_batch": pytest.approx(0.1),
    }
    without = controls.point_controls(dense([1.0]), rate=0.5, parameters=parameters, train_loss=0.25)
    assert "batch_size" not in without


def test_bad_points_are_refused():
    good = {"rate": 0.1, "parameters": [torch.ones(1)], "train_loss": 1.0}
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="rate="):
            controls.point_controls(dense([1.0]), **(good | {"rate": rate}))
    with pytest.raises(ConfigError, match="batch_size=0"):
        controls.point_controls(dense([1.0]), **good, batch_size=0)
    with pytest.raises(DataError, match="no parameters"):
        controls.point_controls(dense([1.0]), **(good | {"parameters": []}))
    none = torch.empty(0)
    for nodes in ([], [none]):
        empty = SimpleNamespace(size=3, nodes=nodes, weights=nodes, batch=[0] * len(nodes))
        with pytest.raises(DataError, match="no runs"):
            controls.largest_eigenvalue(empty)
