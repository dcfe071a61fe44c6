"""The operator of an optimizer's live state against the matrix of its own steps, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from telltale.errors import DataError
from telltale.train.sharpness.preconditioner import preconditioned_edge, view_of

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
            }
        elif kind is not torch.optim.SGD:
            count = torch.tensor(1e16, dtype=torch.float64)
            optimizer.state[parameter] = {"step": count, "exp_avg": zero.clone(), "exp_avg_sq": square}
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
    view = view_of(optimizer, parameters)
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
    view = view_of(optimizer, [parameter])
    assert view is not None
    operator = view.wrap(Matrix(torch.eye(3, dtype=torch.float64)))
    found = torch.stack([operator.matvec(unit) for unit in torch.eye(3, dtype=torch.float64)]).diagonal()
    assert torch.allclose(found, 0.1 / p, rtol=1e-12)
    assert preconditioned_edge(optimizer).threshold == pytest.approx(38.0)


def test_the_live_rate_is_read() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.4
    view = view_of(optimizer, [parameter])
    assert view is not None
    assert torch.allclose(
        view.wrap(Matrix(torch.eye(2).double())).matvec(torch.ones(2).double()), torch.full((2,), 0.4).double()
    )


def test_an_adaptive_optimizer_that_has_not_stepped_and_foreign_parameters_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(DataError, match="has not stepped yet"):
        view_of(torch.optim.AdamW([parameter]), [parameter])
    with pytest.raises(DataError, match="does not hold 1 of the 1"):
        view_of(torch.optim.SGD([parameter], lr=0.1), [nn.Parameter(torch.ones(2))])


def test_an_unknown_optimizer_has_no_view() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert view_of(torch.optim.Adagrad([parameter]), [parameter]) is None
