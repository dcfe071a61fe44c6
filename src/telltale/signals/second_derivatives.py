"""GELU with its second derivative computed once and kept, for Hessian-vector products on a retained graph.

PyTorch evaluates GELU's second derivative anew, from a dozen elementwise operations, in every product; its values depend on
the forward pass alone. Kept, a product of a network of GELUs costs a tenth less (``benchmarks/sharpness_closed_forms.py``).
Closed forms of linear layers, ReLU, SiLU, layer norm and softmax saved less than that and are gone. Value and gradient agree
with PyTorch's to rounding; third derivatives are not defined.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def gelu(x: Tensor) -> Tensor:
    """``torch.nn.functional.gelu`` of ``x``, its first two derivatives at hand."""
    value: Tensor = _Value.apply(x)
    return value


def gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """d/dx and d2/dx2 of x Phi(x): Phi(x) + x phi(x), and phi(x) (2 - x^2)."""
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    return slope, density * (2 - x * x)


class _Value(torch.autograd.Function):
    """The function itself. Its value is its own tensor, no input handed on: autograd lets others change it in place."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        slope, curvature = gelu_derivatives(x)
        context.save_for_backward(x, slope, curvature)
        return functional.gelu(x)

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        x, slope, curvature = context.saved_tensors
        if not torch.is_grad_enabled():
            return upstream * slope
        return _Gradient.apply(upstream, x, slope, curvature)


class _Gradient(torch.autograd.Function):
    """upstream * f'(x), as a function of both."""

    @staticmethod
    def forward(context: Any, upstream: Tensor, x: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        context.save_for_backward(slope, upstream * curvature)
        return upstream * slope

    @staticmethod
    @once_differentiable
    def backward(context: Any, direction: Tensor) -> Any:
        slope, bend = context.saved_tensors
        return direction * slope, direction * bend, None, None


KEPT: frozenset[Any] = frozenset((_Value,))
"""The functions whose gradients are differentiable, whatever they are made of."""
