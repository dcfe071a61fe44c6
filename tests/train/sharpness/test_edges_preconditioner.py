"""The operator of an optimizer's live state against the matrix of its own steps, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from telltale.errors import DataError
from telltale.signals.hessian import HessianOperator
from telltale.signals.spectrum import dense
from telltale.train.sharpness.edges import step_jacobian_of

SIZE = 5


class Matrix:
    """A dense symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size = matrix.shape[0]

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


def curvature() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    return raw + raw.T


def held(kind: type, options: dict[str, Any]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer on two parameters (of 2 and 3 numbers) whose second moments stay as they are set here."""
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3)]
    groups = [{"params": [p], **(options.get("group", {}) if i else {})} for i, p in enumerate(parameters)]
    optimizer = kind(groups, **{key: value for key, value in options.items() if key != "group"})
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        square = torch.rand(parameter.shape, dtype=torch.float64, generator=generator) + 0.5
        zero = torch.zeros_like(parameter.detach())
        if kind is torch.optim.RMSprop:
            optimizer.state[parameter] = {
                "step": torch.tensor(5.0),
                "square_avg": square,
                "momentum_buffer": zero.clone(),
                "grad_avg": zero + 0.3,
            }
        elif kind is not torch.optim.SGD:
            count = torch.tensor(1e16, dtype=torch.float64)
            optimizer.state[parameter] = {"step": count, "exp_avg": zero.clone(), "exp_avg_sq": square}
            if options.get("amsgrad"):
                optimizer.state[parameter]["max_exp_avg_sq"] = square + 2.0
        elif options.get("momentum"):
            optimizer.state[parameter] = {"momentum_buffer": zero.clone()}
    return optimizer, parameters


def step_matrix(kind: type, options: dict[str, Any], hessian: Tensor, buffer: str | None) -> Tensor:
    """The linear map of (weights, buffers) in one real step on w' H w / 2, column by column."""
    size = SIZE * (2 if buffer else 1)
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        optimizer, parameters = held(kind, options)
        for parameter, low in zip(parameters, (0, 2), strict=True):
            parameter.data.copy_(unit[low : low + parameter.numel()])
            if buffer:
                optimizer.state[parameter][buffer].copy_(unit[SIZE + low : SIZE + low + parameter.numel()])
        gradient = hessian @ torch.cat([p.detach() for p in parameters])
        parameters[0].grad, parameters[1].grad = gradient[:2].clone(), gradient[2:].clone()
        optimizer.step()
        after = [p.detach() for p in parameters]
        after += [optimizer.state[p][buffer] for p in parameters] if buffer else []
        columns.append(torch.cat(after))
    return torch.stack(columns, dim=1)


STEADY = {"betas": (0.9, 1 - 1e-14), "eps": 1e-3}
CASES = {
    "sgd, rates per group": (torch.optim.SGD, {"lr": 0.1, "group": {"lr": 0.3}}, None),
    "sgd, decay per group": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3, "group": {"weight_decay": 0.0}}, None),
    "heavy ball": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, "momentum_buffer"),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "group": {"lr": 0.02}},
        "momentum_buffer",
    ),
    "adam": (torch.optim.Adam, {"lr": 0.2, **STEADY}, "exp_avg"),
    "adam, coupled decay": (torch.optim.Adam, {"lr": 0.2, "weight_decay": 0.3, **STEADY}, "exp_avg"),
    "adamw": (torch.optim.AdamW, {"lr": 0.2, "weight_decay": 0.1, **STEADY}, "exp_avg"),
    "adam, one tensor at a time": (torch.optim.Adam, {"lr": 0.2, "foreach": False, **STEADY}, "exp_avg"),
    "adam, all tensors at once": (torch.optim.Adam, {"lr": 0.2, "foreach": True, **STEADY}, "exp_avg"),
    "adamw, fused": (torch.optim.AdamW, {"lr": 0.2, "weight_decay": 0.1, "fused": True, **STEADY}, "exp_avg"),
    "amsgrad": (torch.optim.Adam, {"lr": 0.2, "amsgrad": True, **STEADY}, "exp_avg"),
    "adam, rates per group": (torch.optim.Adam, {"lr": 0.2, "group": {"lr": 0.05}, **STEADY}, "exp_avg"),
    "rmsprop, centred": (torch.optim.RMSprop, {"lr": 0.2, "alpha": 1 - 1e-14, "eps": 1e-3, "centered": True}, None),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.2, "alpha": 1 - 1e-14, "eps": 1e-3}, None),
    "rmsprop with momentum": (
        torch.optim.RMSprop,
        {"lr": 0.2, "alpha": 1 - 1e-14, "momentum": 0.8, "weight_decay": 0.1},
        "momentum_buffer",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exponents_are_those_of_the_real_steps_matrix(name: str) -> None:
    kind, options, buffer = CASES[name]
    hessian = curvature()
    wanted = torch.linalg.eigvals(step_matrix(kind, options, hessian, buffer)).abs().log().sort().values
    optimizer, parameters = held(kind, options)
    view = step_jacobian_of(optimizer, parameters)
    assert view is not None
    operator = view.wrap(Matrix(hessian))
    dense = torch.stack([operator.matvec(unit) for unit in torch.eye(SIZE, dtype=torch.float64)], dim=1)
    assert torch.allclose(dense, dense.T, atol=1e-12)
    found = view.exponents(torch.linalg.eigvalsh(dense)).reshape(-1).sort().values
    assert torch.allclose(found, wanted, atol=1e-6), (found, wanted)


def test_bias_correction_and_eps_come_from_the_live_state() -> None:
    """After two real steps of Adam, P is what the third step would divide by."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-2)
    for scale in (1.0, 3.0):
        parameter.grad = scale * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[parameter]
    p = (1 - 0.9**2) * ((state["exp_avg_sq"] / (1 - 0.99**2)).sqrt() + 1e-2)
    p[2] = torch.inf  # It has had no gradient, so it has not moved and eps says nothing about it.
    view = step_jacobian_of(optimizer, [parameter])
    assert view is not None
    operator = view.wrap(Matrix(torch.eye(3, dtype=torch.float64)))
    found = torch.stack([operator.matvec(unit) for unit in torch.eye(3, dtype=torch.float64)]).diagonal()
    assert torch.allclose(found, 0.1 / p, rtol=1e-12)
    assert view.threshold == pytest.approx(38.0)


def test_the_live_rate_is_read() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.4
    view = step_jacobian_of(optimizer, [parameter])
    assert view is not None
    assert torch.allclose(
        view.wrap(Matrix(torch.eye(2).double())).matvec(torch.ones(2).double()), torch.full((2,), 0.4).double()
    )


def test_an_adaptive_optimizer_that_has_not_stepped_and_foreign_parameters_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(DataError, match="has not stepped yet"):
        step_jacobian_of(torch.optim.AdamW([parameter]), [parameter])
    with pytest.raises(DataError, match="does not hold 1 of the 1"):
        step_jacobian_of(torch.optim.SGD([parameter], lr=0.1), [nn.Parameter(torch.ones(2))])


def test_the_threshold_is_where_a_root_leaves_the_disc_in_every_case() -> None:
    for kind, options, _ in CASES.values():
        optimizer, parameters = held(kind, options)
        view = step_jacobian_of(optimizer, parameters)
        assert view is not None
        at = torch.tensor([view.threshold], dtype=torch.float64)
        assert float(view.exponents(at * (1 - 1e-6)).max()) < 0.0 < float(view.exponents(at * (1 + 1e-6)).max())


@pytest.mark.parametrize("flat", [True, False])
def test_decoupled_decay_that_differs_by_group(flat: bool) -> None:
    """The groups of the package's own AdamW: matrices decay, vectors do not. To second order for null directions."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "group": {"weight_decay": 0.0}, **STEADY}
    hessian = torch.zeros(SIZE, SIZE).double() if flat else curvature() + 5.0 * torch.eye(SIZE, dtype=torch.float64)
    wanted = torch.linalg.eigvals(step_matrix(torch.optim.AdamW, options, hessian, "exp_avg")).abs().log().sort().values
    optimizer, parameters = held(torch.optim.AdamW, options)
    view = step_jacobian_of(optimizer, parameters)
    assert view is not None
    operator = view.wrap(Matrix(hessian))
    matrix = torch.stack([operator.matvec(unit) for unit in torch.eye(SIZE, dtype=torch.float64)], dim=1)
    found = view.exponents(torch.linalg.eigvalsh(matrix)).reshape(-1).sort().values
    decay = 1e-2 * 0.1
    assert float((found - wanted)[-SIZE:].abs().max()) < (10 * decay**2 if flat else 2 * decay)
    assert view.threshold == pytest.approx(38.0)


def test_a_parameter_without_state_does_not_move() -> None:
    """Adam skips what had no gradient; its curvature must not count as if it were stepped at the full rate."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    view = step_jacobian_of(optimizer, parameters)
    assert view is not None
    operator = view.wrap(Matrix(torch.eye(4)))
    diagonal = torch.stack([operator.matvec(unit) for unit in torch.eye(4)]).diagonal()
    assert bool((diagonal[:2] > 0).all())
    assert diagonal[2:].tolist() == [0.0, 0.0]
    assert float(view.exponents(torch.zeros(1)).max()) == 0.0


def test_embeddings_of_tokens_that_never_came_are_not_past_the_edge() -> None:
    """The probe may hold tokens that training has not seen: their second moment is 0, and P would be eps."""
    table = nn.Embedding(6, 3, _weight=torch.linspace(0.3, 2.0, 18).reshape(6, 3))
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-2, weight_decay=0.0)
    table(torch.tensor([0, 1, 2])).square().sum().backward()
    optimizer.step()
    view = step_jacobian_of(optimizer, [table.weight])
    assert view is not None
    probe = HessianOperator(table(torch.arange(6)).square().sum(), [table.weight])
    nodes = dense(view.wrap(probe)).nodes[0]
    assert float(nodes.max()) < view.threshold
    assert int((nodes == 0).sum()) == 9


def test_half_precision_state_is_read_in_single_precision() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    view = step_jacobian_of(optimizer, [parameter])
    assert view is not None
    found = view.wrap(Matrix(torch.eye(3))).matvec(torch.ones(3))
    square = optimizer.state[parameter]["exp_avg_sq"].double()
    p = (1 - 0.9) * ((square / (1 - 0.999)).sqrt() + 1e-8)
    wanted = 1e-3 / p + 1e-5 * (0.0 if view.threshold < 38.0 else 1.0)
    assert torch.allclose(found.double(), wanted, rtol=1e-5)


def test_a_schedule_is_followed_and_wrappers_are_looked_through() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for wanted in (0.4, 0.2, 0.1):
        view = step_jacobian_of(Wrapper(optimizer), [parameter])
        assert view is not None
        assert view.wrap(Matrix(torch.eye(2))).matvec(torch.ones(2)).tolist() == pytest.approx([wanted] * 2)
        optimizer.step()
        schedule.step()


def test_the_operator_keeps_the_hessians_precision() -> None:
    """Of double precision products nothing may be lost on the way through the preconditioner."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    view = step_jacobian_of(optimizer, [weight])
    assert view is not None
    found = dense(view.wrap(HessianOperator((weight**4).sum(), [weight])))
    assert found.nodes[0].tolist() == pytest.approx([3.0, 12.0], rel=1e-14)


def test_an_unknown_optimizer_has_no_view() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert step_jacobian_of(torch.optim.Adagrad([parameter]), [parameter]) is None
