"""Functions whose second derivatives are computed once and kept, for Hessian-vector products on a retained graph.

PyTorch evaluates GELU's and SiLU's second derivatives anew, from a dozen elementwise operations, in every product; their
values depend on the forward pass alone. Inside :func:`closed_form_second_derivatives` they are kept: a product costs three
multiplications; ReLU's is zero and costs none. Linear layers, layer norm and softmax are exchanged for closed forms as
well. Values and gradients agree with PyTorch's to rounding. Third derivatives are not defined.

**Linear layer.** With z = x W^T + b the gradient is (g W, g^T x, sum g). Its own derivatives are sums of matrix products,
which are summed inside the products here; PyTorch's composed ones write every product out and add them up afterwards.

**Layer norm.** With h = (x - mean) r, r = 1 / std and the projection P z = z - mean(z) - h mean(z h) along the last axis,
the gradient is dx = r P(g w). Its own derivatives are projections again, r P(a) and r P(g a_w), which PyTorch's fused
backward of a layer norm computes in one pass, and three multiples of vectors that are kept:

    to g: w r P(a) + h a_w + a_b        to x: r P(g a_w) - r (dx mean(a h) + r P(a) mean(g w h) + h mean(a dx))

**Softmax.** With p = softmax(x) along an axis, the gradient is s = p (g - sum(g p)). Along a direction a, its derivatives
are p (a - sum(a p)) with respect to g and t - p sum(t) with respect to x, where t = s (a - sum(a p)).
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

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x -> first and second derivative at x."""


@contextmanager
def closed_form_second_derivatives() -> Iterator[None]:
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
    return linear(x, weight, bias)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """The kept form, where it applies: over the last axis, with weight and bias, all in one differentiable dtype."""
    if weight is None or bias is None or len(shape) != 1 or x.ndim < 2 or not torch.is_grad_enabled():
        return None
    if not (x.requires_grad and weight.requires_grad and bias.requires_grad and x.dtype == weight.dtype == bias.dtype):
        return None
    return layer_norm(x, weight, bias, eps)


def _softmax(x: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor | None:
    """The kept form, where it applies: along one given axis, in the dtype of ``x``."""
    if not isinstance(dim, int) or dtype not in (None, x.dtype) or not x.ndim:
        return None
    return softmax(x, dim) if torch.is_grad_enabled() and x.requires_grad else None


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


def _where_positive(upstream: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(upstream, value, 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of ``x`` (..., in), ``weight`` (out, in) and ``bias`` (out,)."""
    value: Tensor = _LinearValue.apply(x, weight, bias)
    return value


class _LinearValue(torch.autograd.Function):
    """The layer itself; its gradient is a function of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        # No view of a product: autograd forbids in-place changes of such a view.
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
        return _LinearGradient.apply(upstream, x, weight, to_x, to_weight, to_bias)


class _LinearGradient(torch.autograd.Function):
    """(dx, dW, db) as functions of the upstream gradient, x and W; None where it is not needed."""

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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis of ``x`` (..., d), with ``weight`` and ``bias`` (d,)."""
    value: Tensor = _NormValue.apply(x, weight, bias, eps)
    return value


class _NormValue(torch.autograd.Function):
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
        return *_NormGradient.apply(upstream, x, weight, mean, scale), None


class _NormGradient(torch.autograd.Function):
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


def softmax(x: Tensor, dim: int) -> Tensor:
    """``torch.softmax`` of ``x`` along ``dim``."""
    value: Tensor = _SoftmaxValue.apply(x, dim)
    return value


class _SoftmaxValue(torch.autograd.Function):
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
        return _SoftmaxGradient.apply(upstream, x, value.detach(), context.dim), None


class _SoftmaxGradient(torch.autograd.Function):
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


KEPT: frozenset[Any] = frozenset((_Value, _Relu, _LinearValue, _NormValue, _SoftmaxValue))
"""The functions that take the places: their gradients are differentiable, whatever they are made of."""
