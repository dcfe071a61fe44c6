"""Activations whose second derivative is computed once and kept, for Hessian-vector products on a retained graph.

Linear layers, layer norm and softmax are exchanged with them (``telltale.signals.kept_linear``, ``kept_norm``,
``kept_softmax``).

PyTorch evaluates GELU's and SiLU's second derivatives anew, from a dozen elementwise operations, in every product; their
values depend on the forward pass alone. Inside :func:`kept_curvature` they are kept: a product costs three
multiplications; ReLU's is zero and costs none. Values and gradients agree with PyTorch's to rounding. Third derivatives are not
defined.
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

from telltale.signals import kept_linear, kept_norm, kept_softmax

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x -> first and second derivative at x."""


@contextmanager
def kept_curvature() -> Iterator[None]:
    """Inside, ``linear``, ``relu``, ``gelu``, ``silu``, ``layer_norm`` and ``softmax`` (functions, methods and modules) are the
    forms that suit repeated products."""
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
        if torch._C._are_functorch_transforms_active():
            return function(*arguments, **keywords)
        exchanged = _EXCHANGED.get(function)
        if exchanged is not None and (found := exchanged(*arguments, **keywords)) is not None:
            return found
        derivatives = _derivatives(function, keywords)
        # Only a plain floating input in the first place; anything else is PyTorch's business.
        if derivatives is None or len(arguments) != 1 or not (torch.is_grad_enabled() and arguments[0].requires_grad):
            return function(*arguments, **keywords)
        with torch.no_grad():
            value = function(arguments[0].detach(), **keywords)
            slope, curvature = derivatives(arguments[0].detach())
        return _Value.apply(arguments[0], value, slope, curvature)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The kept form, where it applies: a matrix of weights that is differentiated, all in one dtype."""
    others = (weight,) if bias is None else (weight, bias)
    if weight.ndim != 2 or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    if any(other.dtype != x.dtype for other in others) or not x.numel() or torch.is_autocast_enabled(x.device.type):
        return None
    return kept_linear.linear(x, weight, bias)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """The kept form, where it applies: over the last axis, with weight and bias, all in one differentiable dtype."""
    if weight is None or bias is None or len(shape) != 1 or x.ndim < 2 or not torch.is_grad_enabled():
        return None
    if not (x.requires_grad and weight.requires_grad and bias.requires_grad and x.dtype == weight.dtype == bias.dtype):
        return None
    return kept_norm.layer_norm(x, weight, bias, eps)


def _softmax(x: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor | None:
    """The kept form, where it applies: along one given axis, in the dtype of ``x``."""
    if not isinstance(dim, int) or dtype not in (None, x.dtype) or not x.ndim:
        return None
    return kept_softmax.softmax(x, dim) if torch.is_grad_enabled() and x.requires_grad else None


def _plain_softmax(x: Tensor, dim: Any = None, dtype: torch.dtype | None = None) -> Tensor | None:
    return _softmax(x, dim, dtype=dtype)


def _relu(x: Tensor, inplace: bool = False) -> Tensor | None:
    """The kept form, where it applies: a value of its own."""
    if inplace or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    found: Tensor = _Relu.apply(x)
    return found


_EXCHANGED: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    functional.softmax: _softmax,
    torch.softmax: _plain_softmax,
    Tensor.softmax: _plain_softmax,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
}
"""What takes the place of a function, or says None where it does not apply."""


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
        x, slope, curvature = context.saved_tensors
        if not torch.is_grad_enabled():
            return upstream * slope, None, None, None
        return _Gradient.apply(upstream, x, slope, curvature), None, None, None


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


class _Relu(torch.autograd.Function):
    """max(x, 0), whose second derivative is no term at all, not a tensor of zeros."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        value = torch.relu(x)
        context.save_for_backward(value)
        return value

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        (value,) = context.saved_tensors
        if not torch.is_grad_enabled():
            return _where_positive(upstream, value)
        return _ReluGradient.apply(upstream, value.detach())


class _ReluGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, upstream: Tensor, value: Tensor) -> Tensor:
        context.save_for_backward(value)
        return _where_positive(upstream, value)

    @staticmethod
    @once_differentiable
    def backward(context: Any, direction: Tensor) -> Any:
        (value,) = context.saved_tensors
        return _where_positive(direction, value), None


KEPT: frozenset[Any] = frozenset((_Value, _Relu, kept_linear.Value, kept_norm.Value, kept_softmax.Value))
"""The functions that take the places: their gradients are differentiable, whatever they are made of."""


def _where_positive(upstream: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(upstream, value, 0)
