"""The edges by formula, by root modulus, and by the matrix of real ``torch.optim`` steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from telltale.errors import ConfigError
from telltale.train.sharpness.edges import Edge, edge_of

OPTIMIZERS = {
    "plain": (torch.optim.SGD, {"lr": 0.3}),
    "coupled decay": (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.2}),
    "heavy ball": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.8, "dampening": 0.4}),
    "nesterov": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
CURVATURES = [-1.0, 0.0, 1e-9, 0.3, 1.0, 5.0, 9.0, 30.0]


def step_matrix(kind: type, options: dict[str, float], curvature: float) -> Tensor:
    """The linear map (weight, buffer) -> (weight, buffer) of one real step on curvature w^2 / 2, column by column."""
    columns = []
    for weight, buffer in ((1.0, 0.0), (0.0, 1.0)):
        parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        optimizer = kind([parameter], **options)
        if options.get("momentum"):
            optimizer.state[parameter]["momentum_buffer"] = torch.tensor([buffer], dtype=torch.float64)
        parameter.grad = curvature * parameter.detach()
        optimizer.step()
        after = optimizer.state[parameter].get("momentum_buffer") if options.get("momentum") else None
        columns.append([parameter.item(), 0.0 if after is None else after.item()])
    return torch.tensor(columns, dtype=torch.float64).T


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_roots_are_the_eigenvalues_of_a_real_step(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    edge = edge_of(kind([nn.Parameter(torch.zeros(1))], **options))
    for curvature in CURVATURES:
        wanted = torch.linalg.eigvals(step_matrix(kind, options, curvature)).abs().sort().values[-edge.roots :]
        found = edge.moduli(torch.tensor([curvature], dtype=torch.float64))[0].sort().values
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9), (curvature, found, wanted)


@pytest.mark.parametrize(
    ("edge", "threshold"),
    [
        (Edge("sgd"), 2.0),
        (Edge("sgd", momentum=0.9), 3.8),
        (Edge("sgd", momentum=0.9, nesterov=True), 1.357142857142857),
        (Edge("adam", momentum=0.9, gain=0.1), 38.0),
        (Edge("sgd", momentum=0.8, gain=0.6), 6.0),
        (Edge("adamw", momentum=0.9, gain=0.1, decay=0.01), 1.99 * 1.9 / 0.1),
        (Edge("sgd", rate=0.5, coupled=0.2), 1.9),
    ],
)
def test_thresholds_by_formula_and_by_root_modulus(edge: Edge, threshold: float) -> None:
    assert math.isclose(edge.threshold, threshold, rel_tol=1e-12)
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        inside = bool((edge.moduli(torch.tensor([middle / edge.rate], dtype=torch.float64)) <= 1.0).all())
        low, high = (middle, high) if inside else (low, middle)
    assert math.isclose(low, threshold, rel_tol=1e-9)


def test_a_heavy_ball_is_stable_where_its_singular_value_is_above_one() -> None:
    """Rate .1, curvature 1, momentum .9: the spec's vector."""
    matrix = step_matrix(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1.0)
    moduli = Edge("sgd", rate=0.1, momentum=0.9).moduli(torch.ones(1))
    assert torch.allclose(torch.linalg.svdvals(matrix), torch.tensor([1.50715, 0.59715]).double(), atol=1e-5)
    assert torch.allclose(moduli, torch.full((1, 2), math.sqrt(0.9), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_null_directions_have_exponent_exactly_zero(momentum: float) -> None:
    for nesterov in (False, True):
        found = Edge("sgd", rate=0.3, momentum=momentum, nesterov=nesterov).log_moduli(torch.zeros(3))
        assert bool((found.max(dim=1).values == 0.0).all())


def test_without_momentum_it_is_gradient_descent() -> None:
    from telltale.signals.sharpness_dimension import log_moduli

    nodes = torch.linspace(-3, 30, 101, dtype=torch.float64)
    assert torch.equal(Edge("sgd", rate=0.1).log_moduli(nodes)[:, 0], log_moduli(nodes, rate=0.1))


def test_by_name_with_options() -> None:
    edge = edge_of("sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert (edge.rate, edge.momentum, edge.coupled, edge.roots) == (0.1, 0.9, 5e-4, 2)
    assert edge_of("adamw", lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1).decay == pytest.approx(1e-3)
    assert edge_of("adam", lr=1e-2, weight_decay=0.1).coupled == 0.1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lion", {}, "'lion' is not known"),
        ("sgd", {"momentum": 1.0}, "momentum=1.0"),
        ("sgd", {"lr": -1.0}, "lr=-1.0"),
        ("adam", {"betas": (1.0, 0.9)}, "betas=1.0"),
        ("sgd", {"maximize": True}, "climbs"),
    ],
)
def test_bad_input(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        edge_of(name, **options)


def test_groups_that_differ_in_momentum_have_no_common_edge() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "momentum": m} for m in (0.0, 0.9)]
    with pytest.raises(ConfigError, match="differ in momentum"):
        edge_of(torch.optim.SGD(groups, lr=0.1))
