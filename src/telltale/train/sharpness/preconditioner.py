"""An optimizer's live state as a symmetric operator: S (H + wd) S with S^2 = rate / P, entry by entry.

For Adam P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), for RMSprop sqrt(v) + eps (less the squared mean if centered),
for SGD 1. Rates, weight decay and eps are those of each parameter's own group, read when the view is made, so a schedule is
followed. The eigenvalues of the operator are rate * alpha along each direction; ``edges`` turns them into roots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.errors import DataError
from telltale.signals.hessian import Operator
from telltale.train.sharpness.edges import Edge, edge_of
from telltale.train.sharpness.view import View

KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


def view_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> View | None:
    """How a step of ``optimizer`` sees the Hessian over ``parameters`` (in the operator's order); None for one whose Jacobian
    is not known.

    The preconditioner is taken as constant during the step. Groups may differ in rate and weight decay. Where they differ
    in *decoupled* decay, that is put into the operator: exact without momentum, to first order in rate * decay with it.

    Raises :class:`~telltale.errors.DataError` for parameters that the optimizer does not hold and for an adaptive one that
    has not stepped yet, and :class:`~telltale.errors.ConfigError` for groups that differ in momentum.
    """
    if type(optimizer) not in KNOWN:
        return None
    whole = edge_of(optimizer)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = sum(id(parameter) not in group_of for parameter in parameters)
    if missing:
        raise DataError(
            f"the optimizer does not hold {missing} of the {len(parameters)} parameters; expected the one that trains them."
        )
    groups = [group_of[id(parameter)] for parameter in parameters]
    edges = [edge_of(type(optimizer).__name__, **group) for group in groups]
    decays = {edge.decay for edge in edges}
    common = decays.pop() if len(decays) == 1 else None
    squares, shifts = [], []
    for parameter, group, edge in zip(parameters, groups, edges, strict=True):
        precondition = _preconditioner(optimizer, parameter, group)
        square = edge.rate / precondition
        shift = square * edge.coupled
        if common is None:
            shift = shift + edge.decay * (1.0 - edge.momentum) / edge.gain
        squares.append(square.reshape(-1))
        shifts.append(shift.reshape(-1))
    scale, shift = torch.cat(squares).sqrt(), torch.cat(shifts)
    step = dataclasses.replace(whole, rate=1.0, coupled=0.0, decay=common or 0.0)
    return View("optimizer", step.log_moduli, lambda hessian: _Scaled(hessian, scale, shift), step.roots)


def preconditioned_edge(optimizer: torch.optim.Optimizer) -> Edge:
    """The edge in the units of :func:`view_of`'s operator: its ``threshold`` is the eigenvalue at which a step is unstable."""
    return dataclasses.replace(edge_of(optimizer), rate=1.0, coupled=0.0)


def _preconditioner(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """P of one parameter, in its shape; 1 for SGD, and for a parameter that has had no gradient yet while others had."""
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(parameter.detach())
    state = optimizer.state.get(parameter, {})
    if not state:
        if not any(optimizer.state.values()):
            raise DataError(
                f"{type(optimizer).__name__} has not stepped yet, so it has no preconditioner; expected at least one step."
            )
        return torch.ones_like(parameter.detach())
    if isinstance(optimizer, torch.optim.RMSprop):
        square = state["square_avg"]
        if group["centered"]:
            square = (square - state["grad_avg"].square()).clamp_min(0.0)
        return square.sqrt() + group["eps"]
    count = float(state["step"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    square = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return (1.0 - beta1**count) * ((square / (1.0 - beta2**count)).sqrt() + group["eps"])


class _Scaled:
    """S H S + diag(shift)."""

    def __init__(self, hessian: Operator, scale: Tensor, shift: Tensor) -> None:
        if hessian.size != scale.numel():
            raise DataError(f"the operator has size {hessian.size} and the optimizer's state {scale.numel()}.")
        self._hessian, self._scale, self._shift = hessian, scale, shift

    @property
    def size(self) -> int:
        """N."""
        return self._hessian.size

    def matvec(self, v: Tensor) -> Tensor:
        """(N,) -> (N,)."""
        scale = self._scale.to(v.dtype)
        return scale * self._hessian.matvec(scale * v) + self._shift.to(v.dtype) * v
