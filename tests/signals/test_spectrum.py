import pytest
import torch

from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.signals.hessian import MatrixOperator
from telltale.signals.spectrum import Spectrum, dense, joined, slq


def with_values(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return MatrixOperator(rotation @ torch.diag(values) @ rotation.T)


VALUES = torch.cat([torch.zeros(120), torch.linspace(-0.5, 1, 70), torch.tensor([3.0, 4, 6, 9, 15, -4])]).double()


def test_the_first_moment_of_a_diagonal_operator_is_exact_for_any_single_probe():
    spectrum = slq([MatrixOperator(torch.diag(VALUES))], runs=3, steps=9, seed=5)
    for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True):
        assert abs(float(nodes @ weights) - float(VALUES.mean())) < 1e-12


def test_an_axis_aligned_null_space_has_its_exact_mass():
    values = torch.cat([torch.zeros(60), torch.tensor([1.0, 2, 5, 8]).repeat(10)]).double()
    spectrum = slq([MatrixOperator(torch.diag(values))], runs=2, steps=20, seed=1)
    for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True):
        assert abs(100 * float(weights[nodes == 0].sum()) - 60) < 1e-9


def test_quadrature_agrees_with_the_dense_spectrum():
    operator = with_values(VALUES)
    exact, found = dense(operator), slq([operator], runs=60, steps=30, seed=0)
    assert found.matvecs == 60 * 30
    assert torch.allclose(exact.nodes[0], VALUES.sort().values, atol=1e-9)
    trace, error = found.trace()
    assert 0 < error < 10
    assert abs(trace - float(VALUES.sum())) < 4 * error
    (low, low_bound), (high, high_bound) = found.extremes()
    assert abs(low + 4) <= low_bound + 1e-9
    assert abs(high - 15) <= high_bound + 1e-9
    assert exact.trace() == (pytest.approx(float(VALUES.sum())), 0.0)


def test_probes_are_unbiased():
    operators = [with_values(VALUES, seed) for seed in range(2)]
    means, spreads = [], []
    for seed in range(12):
        spectrum = slq(operators, runs=8, steps=12, seed=seed)
        squares = torch.stack([196 * (w @ n**2) for n, w in zip(spectrum.nodes, spectrum.weights, strict=True)])
        means.append(float(squares.mean()))
        spreads.append(float(squares.std()))
        assert all(abs(float(weights.sum()) - 1) < 1e-6 for weights in spectrum.weights)
    mean, spread = sum(means) / 12, sum(spreads) / 12
    exact = float((VALUES**2).sum())
    assert abs(mean - exact) < 4 * spread / (96**0.5)
    assert spread > 50


def test_seeds_decide_and_every_operator_is_taken_once():
    taken = []

    class Lazy:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            taken.append(index)
            return with_values(VALUES, index)

    first = slq(Lazy(), runs=5, steps=6, seed=3)
    assert taken == [0, 1]
    assert first.batch == [0, 1, 0, 1, 0]
    again = slq(Lazy(), runs=5, steps=6, seed=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.nodes, again.nodes, strict=True))
    other = slq(Lazy(), runs=5, steps=6, seed=4)
    assert not torch.equal(first.nodes[0], other.nodes[0])


def test_above_the_memory_limit_the_basis_is_not_kept():
    operator = with_values(VALUES)
    kept = slq([operator], runs=2, steps=12, seed=0)
    bare = slq([operator], runs=2, steps=12, seed=0, memory_limit=1000)
    assert kept.reorthogonalised
    assert not bare.reorthogonalised
    for one, other in zip(kept.nodes, bare.nodes, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_density_integrates_to_one_and_peaks_at_the_null_mass():
    grid = torch.linspace(-8, 20, 4000, dtype=torch.float64)
    density = dense(with_values(VALUES)).density(grid, 0.1)
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-6
    assert abs(float(grid[density.argmax()])) < 0.05


def test_eigenvalues_that_are_rounding_become_exact_zeros():
    assert int((dense(with_values(VALUES)).nodes[0] == 0).sum()) == 120


def test_save_and_load_and_join(tmp_path):
    spectrum = slq([with_values(VALUES, 0), with_values(VALUES, 1)], runs=4, steps=5, seed=0)
    spectrum.save(tmp_path / "spectrum.pt")
    loaded = Spectrum.load(tmp_path / "spectrum.pt")
    assert loaded.batch == spectrum.batch
    assert all(torch.equal(a, b) for a, b in zip(loaded.nodes, spectrum.nodes, strict=True))
    both = joined([spectrum, loaded])
    assert both.batch == [0, 1, 0, 1, 2, 3, 2, 3]
    nodes, mass = both.atoms()
    assert nodes.shape == mass.shape
    assert abs(float(mass.sum()) - 196) < 1e-9
    (tmp_path / "other").write_text("nothing")
    with pytest.raises(CheckpointError, match="no saved spectrum"):
        Spectrum.load(tmp_path / "other")


def test_bad_input_is_refused():
    operator = with_values(VALUES)
    for bad in ({"runs": 0, "steps": 5}, {"runs": 5, "steps": 0}):
        with pytest.raises(ConfigError):
            slq([operator], seed=0, **bad)
    with pytest.raises(ConfigError, match="operators"):
        slq([], runs=3, steps=3)
    with pytest.raises(ConfigError, match="operators"):
        slq([operator, operator], runs=1, steps=3)
    with pytest.raises(DataError, match="sizes"):
        slq([operator, MatrixOperator(torch.eye(3).double())], runs=2, steps=3)
