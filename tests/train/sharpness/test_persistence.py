"""Lifetimes against SciPy's spanning tree; dimensions of sets whose dimension is known; trajectories that have none."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree

from telltale.errors import ConfigError, DataError, NumericalError
from telltale.train.sharpness.persistence import lifetime_sum, lifetimes, pairwise, persistence_dimension


def cloud(count, dimension, seed=0, ambient=None):
    """Points uniform in a cube of this dimension, rotated into a larger space."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(ambient or dimension, dimension, generator=generator, dtype=torch.float64)).Q
    return inside @ basis.T


def test_lifetimes_are_the_edges_of_the_spanning_tree():
    distances = pairwise(cloud(60, 5))
    expected = minimum_spanning_tree(distances.numpy()).data
    assert torch.allclose(lifetimes(distances), torch.tensor(sorted(expected)), rtol=1e-12)


def test_lifetimes_by_hand_and_with_coinciding_points():
    line = torch.tensor([[0.0], [1.0], [1.0], [4.0]])
    assert lifetimes(pairwise(line)).tolist() == [0.0, 1.0, 3.0]
    assert lifetime_sum(pairwise(line)) == 4.0
    assert lifetime_sum(pairwise(line), alpha=2.0) == 10.0
    assert lifetime_sum(pairwise(line), alpha=0.5) == pytest.approx(1.0 + math.sqrt(3.0))


def test_the_order_of_points_does_not_matter_and_alpha_scales():
    points = cloud(40, 3)
    shuffled = points[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    assert lifetime_sum(pairwise(shuffled)) == pytest.approx(lifetime_sum(pairwise(points)))
    assert lifetime_sum(pairwise(3 * points), alpha=2.0) == pytest.approx(9 * lifetime_sum(pairwise(points), alpha=2.0))


@pytest.mark.long
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_the_dimension_of_cubes_in_a_larger_space(dimension):
    fit = persistence_dimension(pairwise(cloud(600, dimension, seed=dimension, ambient=20)), seed=0)
    # Boundary effects bias the estimate upwards by a few percent at this number of points.
    assert fit.dimension == pytest.approx(dimension, rel=0.15)
    assert fit.error < 0.2 * dimension
    assert fit.dimension == pytest.approx(1.0 / (1.0 - fit.slope))


def test_the_fit_is_seeded_and_free_of_scale():
    distances = pairwise(cloud(200, 2))
    first = persistence_dimension(distances, seed=3)
    assert persistence_dimension(distances, seed=3) == first
    assert persistence_dimension(distances, seed=4).dimension != first.dimension
    assert persistence_dimension(1e-3 * distances, seed=3).dimension == pytest.approx(first.dimension)


def test_the_loss_metric_sees_only_what_changes_the_losses():
    losses = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 3.0]])
    assert pairwise(losses, metric="loss").tolist() == [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]


def test_small_distances_far_from_the_origin_survive():
    points = torch.tensor([[1e6, 0.0], [1e6 + 1e-3, 0.0], [1e6, 2e-3]], dtype=torch.float64)
    assert lifetimes(pairwise(points)).tolist() == pytest.approx([1e-3, 2e-3], rel=1e-4)


def test_what_has_no_dimension_is_refused():
    with pytest.raises(NumericalError, match="does not move"):
        persistence_dimension(pairwise(torch.ones(100, 3)))
    with pytest.raises(DataError, match="at least 24"):
        persistence_dimension(pairwise(cloud(10, 2)))
    with pytest.raises(ConfigError, match="sizes="):
        persistence_dimension(pairwise(cloud(30, 2)), sizes=[10, 20, 40])
    with pytest.raises(ConfigError, match="alpha=0"):
        lifetime_sum(pairwise(cloud(10, 2)), alpha=0.0)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        pairwise(torch.tensor([[0.0], [math.inf]]))
    with pytest.raises(DataError, match=r"n >= 2"):
        pairwise(torch.ones(3))
    with pytest.raises(DataError, match="square"):
        lifetimes(torch.ones(3, 2))
    with pytest.raises(ConfigError, match="metric"):
        pairwise(torch.ones(3, 2), metric="cosine")
