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
from telltale.signals.hessian import Operator, vector_like
from telltale.train.sharpness.edges import KINDS, edge_of, group_edges, underlying
from telltale.train.sharpness.view import View


def view_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> View | None:
    """How a step of ``optimizer`` sees the Hessian over ``parameters`` (in the operator's order); None for one whose Jacobian
    is not known.

    The preconditioner is taken as constant during the step. Groups may differ in rate and weight decay. Where they differ
    in *decoupled* decay, that is put into the operator: exact without momentum; with it right to second order for null
    directions, and off by up to about rate * decay in the exponents of others.
    What an adaptive optimizer has had no gradient for (no state, or a second moment of exactly 0, as in the embeddings of
    tokens that never came) is left where it is by its steps; eps alone would make it look unstable.

    Raises :class:`~telltale.errors.DataError` for parameters that the optimizer does not hold and for an adaptive one that
    has not stepped yet, and :class:`~telltale.errors.ConfigError` for groups that differ in momentum.
    """
    optimizer = underlying(optimizer)
    if type(optimizer) not in KINDS:
        return None
    whole = edge_of(optimizer)
    places = zip(optimizer.param_groups, group_edges(optimizer), strict=True)
    found = {id(parameter): (group, edge) for group, edge in places for parameter in group["params"]}
    missing = sum(id(parameter) not in found for parameter in parameters)
    if missing:
        raise DataError(
            f"the optimizer does not hold {missing} of the {len(parameters)} parameters; expected the one that trains them."
        )
    conditioners = [_preconditioner(optimizer, parameter, found[id(parameter)][0]) for parameter in parameters]
    edges = [found[id(parameter)][1] for parameter in parameters]
    decays = {0.0 if p is None else edge.decay for edge, p in zip(edges, conditioners, strict=True)}
    common = decays.pop() if len(decays) == 1 else None
    squares, shifts = [], []
    for parameter, edge, conditioner in zip(parameters, edges, conditioners, strict=True):
        square = torch.zeros_like(_single(parameter)) if conditioner is None else edge.rate / conditioner
        shift = square * edge.coupled
        if common is None and conditioner is not None:
            shift = shift + edge.decay * (1.0 - edge.momentum) / edge.gain
        squares.append(square.reshape(-1))
        shifts.append(shift.reshape(-1))
    scale, shift = torch.cat(squares).sqrt(), torch.cat(shifts)
    step = dataclasses.replace(whole, rate=1.0, coupled=0.0, decay=common or 0.0)
    return View("optimizer", step.log_moduli, step.threshold, lambda hessian: Scaled(hessian, scale, shift), step.roots)


def _preconditioner(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
    """P of one parameter, in its shape and at least single precision; 1 for SGD, None where there is no state."""
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(_single(parameter))
    state = optimizer.state.get(parameter, {})
    if not state:
        if not any(optimizer.state.values()):
            raise DataError(
                f"{type(optimizer).__name__} has not stepped yet, so it has no preconditioner; expected at least one step."
            )
        return None
    if isinstance(optimizer, torch.optim.RMSprop):
        square = _single(state["square_avg"])
        if group["centered"]:
            square = (square - _single(state["grad_avg"]).square()).clamp_min(0.0)
        return _where_moved(square, square.sqrt() + group["eps"])
    count = float(state["step"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    square = _single(state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"])
    return _where_moved(square, (1.0 - beta1**count) * ((square / (1.0 - beta2**count)).sqrt() + group["eps"]))


def _where_moved(square: Tensor, conditioner: Tensor) -> Tensor:
    """Infinite where there has never been a gradient."""
    return conditioner.masked_fill(square == 0, torch.inf)


def _single(tensor: Tensor) -> Tensor:
    """In float32 or wider: the Hessian of a half-precision model is computed in float32 as well."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class Scaled:
    """S H S + diag(shift)."""

    def __init__(self, hessian: Operator, scale: Tensor, shift: Tensor) -> None:
        if hessian.size != scale.numel():
            raise DataError(f"the operator has size {hessian.size} and the optimizer's state {scale.numel()}.")
        self._hessian, self.scale, self._shift = hessian, scale, shift

    @property
    def size(self) -> int:
        """N."""
        return self._hessian.size

    @property
    def dtype(self) -> torch.dtype:
        """The Hessian's own."""
        return vector_like(self._hessian).dtype

    @property
    def device(self) -> torch.device:
        """The Hessian's own."""
        return vector_like(self._hessian).device

    def matvec(self, v: Tensor) -> Tensor:
        """(N,) -> (N,)."""
        scale = self.scale.to(v)
        return scale * self._hessian.matvec(scale * v) + self._shift.to(v) * v
