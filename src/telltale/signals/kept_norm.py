"""Layer norm with its first and second derivative in closed form, for Hessian-vector products on a retained graph.

With h = (x - mean) r, r = 1 / std and the projection P z = z - mean(z) - h mean(z h) along the last axis, the gradient is
dx = r P(g w). Its own derivatives are projections again, r P(a) and r P(g a_w), which PyTorch's fused backward of a layer norm
computes in one pass, and three multiples of vectors that are kept:

    to g: w r P(a) + h a_w + a_b        to x: r P(g a_w) - r (dx mean(a h) + r P(a) mean(g w h) + h mean(a dx))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis of ``x`` (..., d), with ``weight`` and ``bias`` (d,)."""
    value: Tensor = Value.apply(x, weight, bias, eps)
    return value


class Value(torch.autograd.Function):
    """The layer itself; its gradient is a function of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        value, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        context.save_for_backward(x, weight, mean, scale)
        return value

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        x, weight, mean, scale = context.saved_tensors
        if not torch.is_grad_enabled():
            return *_fused(upstream, x, weight, mean, scale), None
        return *_Gradient.apply(upstream, x, weight, mean, scale), None


class _Gradient(torch.autograd.Function):
    """(dx, dw, db) as functions of the upstream gradient, x and the weight."""

    @staticmethod
    def forward(context: Any, upstream: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> Any:
        unit, found = (x - mean) * scale, _fused(upstream, x, weight, mean, scale)
        share = scale / x.shape[-1]
        overlap = _sum(upstream * weight * unit) * share
        context.save_for_backward(upstream, x, weight, mean, scale, share, unit, found[0], overlap)
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, along: Tensor, along_weight: Tensor, along_bias: Tensor) -> Any:
        upstream, x, weight, mean, scale, share, unit, found, overlap = context.saved_tensors
        turned = _turned(along, x, None, mean, scale)
        to_upstream = torch.addcmul(along_bias, turned, weight).addcmul_(unit, along_weight)
        to_x = _turned(upstream, x, along_weight, mean, scale)
        to_x.addcmul_(found, _sum(along * unit).mul_(share), value=-1)
        to_x.addcmul_(turned, overlap, value=-1)
        to_x.addcmul_(unit, _sum(along * found).mul_(share), value=-1)
        return to_upstream, to_x, (upstream * turned).flatten(0, -2).sum(dim=0), None, None


def _fused(upstream: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r P(g w), sum g h, sum g) in one pass of PyTorch's own."""
    # The bias is asked for its presence alone; the weight has its shape.
    return torch.ops.aten.native_layer_norm_backward(
        upstream, x, weight.shape, mean, scale, weight, weight, [True, True, True]
    )


def _turned(along: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """r P(a w) in one pass of PyTorch's own."""
    turned: Tensor = torch.ops.aten.native_layer_norm_backward(
        along, x, x.shape[-1:], mean, scale, weight, None, [True, False, False]
    )[0]
    return turned


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=-1, keepdim=True)
