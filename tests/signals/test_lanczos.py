import pytest
import torch
from torch import nn
from torch.nn import functional

from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.hessian import HessianOperator, MatrixOperator
from telltale.signals.lanczos import lanczos


def symmetric(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return (matrix + matrix.T) / 2


def test_weights_sum_to_one_and_moments_are_exact_up_to_twice_the_steps():
    matrix, start = symmetric(40) / 10, torch.randn(40, dtype=torch.float64)
    steps = 6
    run = lanczos(MatrixOperator(matrix), start, steps)
    assert run.matvecs == steps
    assert abs(float(run.weights.sum()) - 1) < 1e-12
    unit = start / start.norm()
    power = unit
    for degree in range(2 * steps):
        moment = float(run.weights @ run.nodes**degree)
        assert abs(moment - float(unit @ power)) < 1e-10, degree
        power = matrix @ power
    assert abs(float(run.weights @ run.nodes ** (2 * steps)) - float(unit @ power)) > 1e-6


def test_ritz_values_stay_inside_the_spectrum_and_within_their_residuals():
    matrix = symmetric(50)
    exact = torch.linalg.eigvalsh(matrix)
    run = lanczos(MatrixOperator(matrix), torch.randn(50, dtype=torch.float64), 20)
    assert run.nodes.min() >= exact.min() - 1e-12
    assert run.nodes.max() <= exact.max() + 1e-12
    nearest = (run.nodes[:, None] - exact).abs().min(dim=1).values
    assert bool((nearest <= run.residuals + 1e-10).all())
    vectors = run.vectors(torch.arange(20))
    found = (vectors @ matrix - run.nodes[:, None] * vectors).norm(dim=1)
    assert torch.allclose(found, run.residuals, atol=1e-10)


def test_it_stops_at_breakdown_with_one_node_for_each_distinct_eigenvalue():
    values = torch.tensor([-1.0, -1, 0, 0, 0, 2, 2, 5], dtype=torch.float64)
    rotation = torch.linalg.qr(symmetric(8)).Q
    operator = MatrixOperator(rotation @ torch.diag(values) @ rotation.T)
    run = lanczos(operator, torch.randn(8, dtype=torch.float64), 8)
    assert torch.allclose(run.nodes, torch.tensor([-1.0, 0, 2, 5], dtype=torch.float64), atol=1e-10)
    assert bool((run.residuals == 0).all())
    assert lanczos(MatrixOperator(torch.zeros(8, 8)), torch.ones(8), 8).nodes.tolist() == [0.0]


def test_more_steps_than_dimensions_are_capped_and_give_every_eigenvalue():
    matrix = symmetric(7)
    run = lanczos(MatrixOperator(matrix), torch.randn(7, dtype=torch.float64), 100)
    assert run.matvecs == 7
    assert torch.allclose(run.nodes, torch.linalg.eigvalsh(matrix), atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_basis_stays_orthonormal_for_100_steps(dtype, tolerance):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False)).to(dtype)
    inputs, targets = torch.randn(50, 64, dtype=dtype), torch.randint(0, 10, (50,))
    operator = HessianOperator(functional.cross_entropy(network(inputs), targets), list(network.parameters()))
    run = lanczos(operator, torch.randn(operator.size, dtype=dtype), 100)
    basis = run.basis.double()
    assert len(basis) == 100
    assert (basis @ basis.T - torch.eye(100, dtype=torch.float64)).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e2, 1e4])
def test_the_basis_stays_orthonormal_behind_converged_outliers(dtype, tolerance, outlier):
    """Overlaps with a converged eigenvector grow by outlier / bulk at each step: fast ones must not wait for the next vector."""
    values = torch.cat([torch.linspace(-1, 1, 597), torch.tensor([-2.0, 0.7, 1.0]) * outlier]).to(dtype)
    run = lanczos(Diagonal(values), torch.randn(600, generator=torch.Generator().manual_seed(3)).to(dtype), 100)
    basis = run.basis.double()
    assert len(basis) == 100
    assert (basis @ basis.T - torch.eye(100, dtype=torch.float64)).abs().max() < tolerance
    tridiagonal = torch.diag(run.alphas) + torch.diag(run.betas[:-1], 1) + torch.diag(run.betas[:-1], -1)
    projected = basis @ (values.double() * basis).T
    assert (projected - tridiagonal).abs().max() < 30 * tolerance * float(values.abs().max())
    assert run.matvecs == 100


def test_an_operator_that_is_less_exact_than_its_dtype_costs_one_product_more():
    """Float32 inside of float64: overlaps are larger than rounding explains, which shows in the first pair of vectors."""
    matrix = symmetric(300) / 10

    class Coarse(MatrixOperator):
        def matvec(self, v):
            return (self.matrix.float() @ v.float()).double()

    operator = Coarse(matrix)
    run = lanczos(operator, torch.randn(300, dtype=torch.float64), 60)
    basis = run.basis
    assert (basis @ basis.T - torch.eye(60, dtype=torch.float64)).abs().max() < 1e-12
    assert run.matvecs == 61
    assert torch.allclose(run.nodes[[0, -1]], torch.linalg.eigvalsh(matrix)[[0, -1]], rtol=1e-4)


class Diagonal:
    def __init__(self, values):
        self.values, self.size, self.dtype, self.device = values, len(values), values.dtype, values.device

    def matvec(self, v):
        return self.values * v


def test_without_a_basis_ghosts_appear_and_their_weights_add_up():
    values = torch.cat([torch.linspace(0, 1, 300, dtype=torch.float64), torch.tensor([50.0, 80.0])])
    start = torch.ones(302, dtype=torch.float64)
    full = lanczos(MatrixOperator(torch.diag(values)), start, 80)
    bare = lanczos(MatrixOperator(torch.diag(values)), start, 80, reorthogonalise=False)
    assert bare.basis is None
    near = (bare.nodes - 80).abs() < 1e-6
    assert int(near.sum()) > 1, "the reference case of lost orthogonality"
    assert abs(float(bare.weights[near].sum()) - 1 / 302) < 1e-9
    for function in (torch.exp, torch.square):
        small = values.max()
        exact = float(function(values / small).mean())
        assert abs(float(bare.weights @ function(bare.nodes / small)) - exact) < 1e-9
        assert abs(float(full.weights @ function(full.nodes / small)) - exact) < 1e-9
    with pytest.raises(DataError, match="no basis"):
        bare.vectors(torch.tensor([0]))


def test_bad_input_is_refused():
    operator = MatrixOperator(symmetric(5))
    with pytest.raises(ConfigError, match="steps"):
        lanczos(operator, torch.ones(5, dtype=torch.float64), 0)
    with pytest.raises(DataError, match="shape"):
        lanczos(operator, torch.ones(4, dtype=torch.float64), 3)
    with pytest.raises(DataError, match="length"):
        lanczos(operator, torch.zeros(5, dtype=torch.float64), 3)
    with pytest.raises(NumericalError, match="finite"):
        lanczos(MatrixOperator(torch.full((5, 5), float("nan"))), torch.ones(5), 3)
