"""The linear layer with its first and second derivative in closed form, for Hessian-vector products on a retained graph.

With z = x W^T + b the gradient is (g W, g^T x, sum g). Its own derivatives are sums of matrix products, which are summed inside
the products here; PyTorch's composed ones write every product out and add them up afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of ``x`` (..., in), ``weight`` (out, in) and ``bias`` (out,)."""
    value: Tensor = Value.apply(x, weight, bias)
    return value


class Value(torch.autograd.Function):
    """The layer itself; its gradient is a function of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        # No view of a product, which nobody could then change in place.
        product = functional.linear(_rows(x), weight, bias)
        value: Tensor = torch.ops.aten._unsafe_view(product, (*x.shape[:-1], len(weight)))
        return value

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        x, weight = context.saved_tensors
        to_x, to_weight, to_bias = context.needs_input_grad
        # Where upstream and x are constant, so is dW: autograd sees that in plain products, and has no graph for it.
        if not torch.is_grad_enabled() or not (upstream.requires_grad or x.requires_grad):
            return _gradient(upstream, x, weight, to_x, to_weight, to_bias)
        return _Gradient.apply(upstream, x, weight, to_x, to_weight, to_bias)


class _Gradient(torch.autograd.Function):
    """(dx, dW, db) as functions of the upstream gradient, x and W; None where nobody asks."""

    @staticmethod
    def forward(
        context: Any, upstream: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool, to_bias: bool
    ) -> Any:
        context.save_for_backward(upstream, x, weight)
        context.set_materialize_grads(False)
        return _gradient(upstream, x, weight, to_x, to_weight, to_bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Any:
        upstream, x, weight = context.saved_tensors
        rows, inputs = _rows(upstream), _rows(x)
        to_upstream = to_x = to_weight = None
        if along_weight is not None:
            to_upstream = functional.linear(inputs, along_weight, along_bias)
            to_x = (rows @ along_weight).view(x.shape) if context.needs_input_grad[1] else None
        elif along_bias is not None:
            to_upstream = along_bias.expand(rows.shape).contiguous()
        if along_x is not None:
            along = _rows(along_x)
            to_upstream = along @ weight.T if to_upstream is None else to_upstream.addmm_(along, weight.T)
            to_weight = _outer(rows, along) if context.needs_input_grad[2] else None
        shaped = None if to_upstream is None else to_upstream.view(upstream.shape)
        return shaped, to_x, to_weight, None, None, None


def _gradient(upstream: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool, to_bias: bool) -> Any:
    rows = _rows(upstream)
    return (
        (rows @ weight).view(x.shape) if to_x else None,
        _outer(rows, _rows(x)) if to_weight else None,
        rows.sum(dim=0) if to_bias else None,
    )


def _outer(rows: Tensor, inputs: Tensor) -> Tensor:
    """rows^T inputs; the product is up to a third faster with its longer axis last."""
    return rows.T @ inputs if rows.shape[1] <= inputs.shape[1] else (inputs.T @ rows).T


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
