"""Softmax with its first and second derivative in closed form, for Hessian-vector products on a retained graph.

With p = softmax(x) along an axis, the gradient is s = p (g - sum(g p)). Along a direction a, its derivatives are
p (a - sum(a p)) with respect to g and t - p sum(t) with respect to x, where t = s (a - sum(a p)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def softmax(x: Tensor, dim: int) -> Tensor:
    """``torch.softmax`` of ``x`` along ``dim``."""
    value: Tensor = Value.apply(x, dim)
    return value


class Value(torch.autograd.Function):
    """The function itself; its gradient is a function of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, dim: int) -> Tensor:
        value = torch.softmax(x, dim)
        context.save_for_backward(x, value)
        context.dim = dim
        return value

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        x, value = context.saved_tensors
        if not torch.is_grad_enabled():
            return _projected(upstream, value, context.dim), None
        return _Gradient.apply(upstream, x, value.detach(), context.dim), None


class _Gradient(torch.autograd.Function):
    """dx as a function of the upstream gradient and x."""

    @staticmethod
    def forward(context: Any, upstream: Tensor, x: Tensor, value: Tensor, dim: int) -> Tensor:
        context.save_for_backward(value, upstream - (upstream * value).sum(dim, keepdim=True))
        context.dim = dim
        return _projected(upstream, value, dim)

    @staticmethod
    @once_differentiable
    def backward(context: Any, along: Tensor) -> Any:
        value, centred = context.saved_tensors
        to_upstream = _projected(along, value, context.dim)
        turned = to_upstream * centred
        to_x = torch.addcmul(turned, value, turned.sum(context.dim, keepdim=True), value=-1)
        return to_upstream, to_x, None, None


def _projected(along: Tensor, value: Tensor, dim: int) -> Tensor:
    """p (a - sum(a p)), in one pass of PyTorch's own."""
    return torch.ops.aten._softmax_backward_data(along, value, dim, value.dtype)
