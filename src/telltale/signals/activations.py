"""Activations whose second derivative is computed once and kept, for Hessian-vector products on a retained graph.

Layer norm is exchanged with them (``telltale.signals.kept_norm``).

PyTorch evaluates GELU's and SiLU's second derivatives anew, from a dozen elementwise operations, in every product; their
values depend on the forward pass alone. Inside :func:`kept_curvature` they are kept: a product costs three
multiplications. Values and gradients agree with PyTorch's to rounding. Third derivatives are not defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from telltale.signals.kept_norm import kept_layer_norm

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x -> first and second derivative at x."""


@contextmanager
def kept_curvature() -> Iterator[None]:
    """Inside, ``gelu``, ``silu`` and ``layer_norm`` (functions and modules) are the forms that suit repeated products."""
    with _Replacing():
        yield


def gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """d/dx and d2/dx2 of x Phi(x): Phi(x) + x phi(x), and phi(x) (2 - x^2)."""
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    return slope, density * (2 - x * x)


def silu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """d/dx and d2/dx2 of x s(x), s the sigmoid: s (1 + x (1 - s)), and s (1 - s) (2 + x (1 - 2 s))."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate)), gate * (1 - gate) * (2 + x * (1 - 2 * gate))


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function is functional.layer_norm and (norm := _layer_norm(*arguments, **keywords)) is not None:
            return norm
        derivatives = _derivatives(function, keywords)
        # Only a plain floating input in the first place; anything else is PyTorch's business.
        if derivatives is None or len(arguments) != 1 or not (torch.is_grad_enabled() and arguments[0].requires_grad):
            return function(*arguments, **keywords)
        with torch.no_grad():
            value = function(arguments[0].detach(), **keywords)
            slope, curvature = derivatives(arguments[0].detach())
        return _Value.apply(arguments[0], value, slope, curvature)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """The kept form, where it applies: over the last axis, with weight and bias, all in one differentiable dtype."""
    if weight is None or bias is None or len(shape) != 1 or x.ndim < 2 or not torch.is_grad_enabled():
        return None
    if not (x.requires_grad and weight.requires_grad and bias.requires_grad and x.dtype == weight.dtype == bias.dtype):
        return None
    return kept_layer_norm(x, weight, bias, eps)


def _derivatives(function: Any, keywords: dict[str, Any]) -> Derivatives | None:
    if function is functional.gelu and keywords.get("approximate", "none") == "none":
        return gelu_derivatives
    if function is functional.silu and not keywords.get("inplace", False):
        return silu_derivatives
    return None


class _Value(torch.autograd.Function):
    """f(x), with f' and f'' at hand."""

    @staticmethod
    def forward(context: Any, x: Tensor, value: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        context.save_for_backward(x, slope, curvature)
        return value

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        return _Gradient.apply(upstream, *context.saved_tensors), None, None, None


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
