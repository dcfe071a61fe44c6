"""Hessian-vector products on a retained gradient graph, and the protocol that every matrix-free operator here follows.

The forward pass and the gradient run once; each product is one second-order backward pass through the kept graph. So
repeated products see the same minibatch, the same dropout masks, and are bit-equal: Lanczos needs one fixed operator.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from telltale.errors import DataError, NumericalError, UnsupportedModelError
from telltale.signals.second_derivatives import KEPT, closed_form_second_derivatives

_NO_SECOND_DERIVATIVE = ("not implemented", "double backward", "once_differentiable")
"""What PyTorch says of fused operations, compiled graphs and functions that are once differentiable."""
_HOOKS = "telltale: this graph saves its tensors through hooks"
SYMMETRY = 1e-5
"""|A - A^T| / |A|, by largest entries, up to which a matrix is taken for symmetric: the rounding of float32."""
_FUNCTION_FILE = torch.autograd.function.once_differentiable.__code__.co_filename


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map on R^N that is known by its products."""

    @property
    def size(self) -> int:
        """N."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """(N,) -> (N,), in the dtype of ``v``; ``v`` is left as it is."""
        ...


class HessianOperator:
    """H = d^2 loss / d theta^2 of a scalar loss with respect to ``parameters``, flattened in their order.

    ``loss`` is a scalar tensor with its graph, or a function that computes one; it runs once (twice with activation
    checkpointing). A parameter that the loss does not use has zero rows. Nothing is written to ``.grad``.

    Raises :class:`~telltale.errors.DataError` for no parameters, a loss that is not a scalar, dtypes below float32 or
    mixed, and a loss or gradient that is not connected to the parameters;
    :class:`~telltale.errors.NumericalError` for a loss or gradient that is not finite;
    :class:`~telltale.errors.UnsupportedModelError` for reentrant checkpointing and for custom functions that are once
    differentiable, whose second derivative reads as zero.
    """

    def __init__(self, loss: Tensor | Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self._parameters = _checked_parameters(parameters)
        with torch.enable_grad():
            value = _evaluated(loss)
            _check_loss(value)
            nodes = list(_graph_nodes(value))
            _refuse_reentrant_checkpoints(nodes)
            _refuse_once_differentiable(nodes)
            gradients = torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)
            if all(part is None for part in gradients):
                raise DataError(
                    "the loss does not depend on any of the parameters; expected a loss of the model itself."
                )
            curved = [
                (parameter, part)
                for parameter, part in zip(self._parameters, gradients, strict=True)
                if part is not None and part.requires_grad
            ]
            self._flat = torch.cat([part.reshape(-1) for _, part in curved]) if curved else None
        if not curved:
            _check_no_curvature_is_real(nodes)
        self._where = _placement(self._parameters, curved)
        self._curved = [parameter for parameter, _ in curved]
        self.loss = float(value.detach())
        self.gradient = torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part.detach()).reshape(-1)
                for parameter, part in zip(self._parameters, gradients, strict=True)
            ]
        )
        if not bool(torch.isfinite(self.gradient).all()):
            raise NumericalError("the gradient of the probe's loss is not finite; expected finite parameters and loss.")
        self.size = self.gradient.numel()
        self.has_curvature = bool(curved)
        """False for a loss that is linear in the parameters: H = 0, a legitimate answer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of every product."""
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.gradient.device

    def matvec(self, v: Tensor) -> Tensor:
        """H v. (N,) -> (N,).

        Raises :class:`~telltale.errors.UnsupportedModelError` for a loss that has no second derivative in PyTorch.
        """
        if v.shape != (self.size,):
            raise DataError(f"the vector has shape {tuple(v.shape)}; expected ({self.size},).")
        if self._flat is None:
            return torch.zeros_like(self.gradient)
        try:
            parts = torch.autograd.grad(
                self._flat,
                self._curved,
                v if self._where is None else v[self._where],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            if not any(phrase in str(error) for phrase in _NO_SECOND_DERIVATIVE):
                raise
            raise UnsupportedModelError(
                f"the model or the loss has no second derivative, so there is no Hessian to read: {error}; expected operations "
                f"that are differentiable twice."
            ) from error
        product = torch.cat([part.reshape(-1) for part in parts])
        if self._where is None:
            return product
        return torch.zeros_like(self.gradient).index_put_((self._where,), product)


class MatrixOperator:
    """A symmetric matrix (N, N) in float32 or float64 as an operator.

    Raises :class:`~telltale.errors.DataError` for a matrix that is not square, not symmetric, or of another dtype.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise DataError(f"the matrix has shape {tuple(matrix.shape)}; expected a square matrix.")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise DataError(f"the matrix is {matrix.dtype}; expected float32 or float64.")
        lopsided, largest = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
        if lopsided > SYMMETRY * largest:
            raise DataError(
                f"the matrix differs from its transpose by {lopsided:.3g} (entries up to {largest:.3g}); expected a symmetric one."
            )
        self.matrix = matrix
        self.size = matrix.shape[0]
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        """A v. (N,) -> (N,)."""
        return torch.mv(self.matrix, v)


class _ForeignOperator:
    """Operators of others: of curvlinops and hessian-eigenthings on tensors, of SciPy on NumPy arrays, or anybody's own."""

    def __init__(self, foreign: Any, size: int) -> None:
        self._foreign, self.size = foreign, size
        dtype = getattr(foreign, "dtype", None)
        self._on_arrays = not isinstance(dtype, torch.dtype) and (dtype is not None or hasattr(foreign, "shape"))
        self.dtype = torch.float64 if self._on_arrays else dtype
        self.device = torch.device(getattr(foreign, "device", None) or "cpu")

    def matvec(self, v: Tensor) -> Tensor:
        given = v.detach().cpu().numpy() if self._on_arrays else v
        product = self._foreign.matvec(given) if hasattr(self._foreign, "matvec") else self._foreign @ given
        if self._on_arrays:
            if np.iscomplexobj(product):
                raise DataError(f"{type(self._foreign).__name__} returned complex numbers; expected a real operator.")
            product = torch.as_tensor(np.asarray(product), device=v.device)
        if not isinstance(product, Tensor) or product.numel() != self.size:
            found = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise DataError(
                f"{type(self._foreign).__name__} returned {found} for a vector of {self.size}; expected as many numbers."
            )
        return product.reshape(-1).to(v)


def as_operator(thing: Any) -> Operator:
    """``thing`` as an :class:`Operator`.

    One of ours stays as it is. A square tensor or array is a matrix. Else it has ``matvec`` or ``@``, on NumPy arrays if its
    dtype is one of NumPy (SciPy's operators and sparse matrices), on tensors if not (curvlinops', hessian-eigenthings', your
    own); N is its ``size``, or the rows of its ``shape``. Its ``dtype`` is that of the probes, default torch's.

    Raises :class:`~telltale.errors.DataError` for anything else.
    """
    if isinstance(thing, (HessianOperator, MatrixOperator)):
        return thing
    if isinstance(thing, (Tensor, np.ndarray)):
        return MatrixOperator(torch.as_tensor(thing))
    shape = getattr(thing, "shape", None)
    if isinstance(shape, (tuple, torch.Size)) and len(shape) == 2:
        if shape[0] != shape[1]:
            raise DataError(f"the operator has shape {tuple(shape)}; expected a square one.")
        size = int(shape[0])
    else:
        found = getattr(thing, "size", None)
        size = int(found) if isinstance(found, numbers.Integral) else 0
    if size < 1 or not (hasattr(thing, "matvec") or hasattr(thing, "__matmul__")):
        raise DataError(
            f"{type(thing).__name__} is no operator; expected size and matvec, a linear operator or a matrix."
        )
    return _ForeignOperator(thing, size)


def materialise(operator: Operator) -> Tensor:
    """The dense matrix (N, N), a column per product, symmetrised: N products and N^2 numbers."""
    columns = torch.eye(operator.size, dtype=_dtype_of(operator), device=_device_of(operator))
    dense = torch.stack([operator.matvec(column) for column in columns])
    return (dense + dense.T) / 2


def vector_like(operator: Operator) -> Tensor:
    """An empty vector (N,) of the dtype and device that ``operator`` takes."""
    return torch.empty(operator.size, dtype=_dtype_of(operator), device=_device_of(operator))


def leaves_of(loss: Tensor) -> set[int]:
    """``id`` of every leaf tensor that the graph of ``loss`` reaches: the parameters that it really uses.

    Raises :class:`~telltale.errors.UnsupportedModelError` for reentrant checkpointing, which hides them.
    """
    nodes = list(_graph_nodes(loss))
    _refuse_reentrant_checkpoints(nodes)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _dtype_of(operator: Operator) -> torch.dtype:
    dtype = getattr(operator, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def _device_of(operator: Operator) -> torch.device:
    return torch.device(getattr(operator, "device", None) or "cpu")


def _evaluated(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    if isinstance(loss, Tensor):
        return loss
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS), closed_form_second_derivatives():
            return loss()
    except RuntimeError as error:
        if _HOOKS not in str(error):
            raise
    # Activation checkpointing computes them anew in the backward pass, where PyTorch does not see the kept forms.
    return loss()


def _checked_parameters(parameters: Sequence[Tensor]) -> list[Tensor]:
    listed = list(parameters)
    if not listed:
        raise DataError("there are no parameters; expected at least one tensor that requires a gradient.")
    frozen = sum(not parameter.requires_grad for parameter in listed)
    if frozen:
        raise DataError(f"{frozen} of {len(listed)} parameters are frozen; expected tensors that require a gradient.")
    kinds = {(parameter.dtype, parameter.device) for parameter in listed}
    if len(kinds) > 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise DataError(f"the parameters are {found}; expected all float32 or all float64 on one device.")
    return listed


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"the loss is {shape}; expected a scalar tensor.")
    if not math.isfinite(float(value.detach())):
        raise NumericalError(f"the probe's loss is {float(value.detach())}; expected a finite number.")
    if value.grad_fn is None:
        raise DataError(
            "the loss has no graph (computed without gradients, or detached); expected one of the parameters."
        )


def _graph_nodes(value: Tensor) -> Iterator[Any]:
    """Every node of the backward graph once."""
    pending, seen = [value.grad_fn], {value.grad_fn}
    while pending:
        node = pending.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                pending.append(following)


def _refuse_reentrant_checkpoints(nodes: Sequence[Any]) -> None:
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise UnsupportedModelError(
            "the model uses reentrant activation checkpointing, under which second derivatives read as zero; expected "
            "use_reentrant=False, or checkpointing off for the probe."
        )


def _refuse_once_differentiable(nodes: Sequence[Any]) -> None:
    """Where the incoming gradient is constant, autograd drops the curvature behind such a function without a word."""
    for node in nodes:
        backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
        code = getattr(backward, "__code__", None)
        if hasattr(backward, "__wrapped__") and code is not None and code.co_filename == _FUNCTION_FILE:
            raise UnsupportedModelError(
                f"{type(node).__name__} is once differentiable, so its curvature would be missing; expected functions with a "
                f"differentiable backward."
            )


def _check_no_curvature_is_real(nodes: Sequence[Any]) -> None:
    """Autograd's own functions have differentiable gradients; a custom one may hide its curvature."""
    custom = sorted(
        {
            type(node).__name__
            for node in nodes
            if isinstance(node, torch.autograd.function.BackwardCFunction)
            and getattr(type(node), "_forward_cls", None) not in KEPT
        }
    )
    if custom:
        raise DataError(
            f"the gradient is not connected to the parameters behind {', '.join(custom)}; expected a custom function "
            "with a differentiable backward."
        )


def _placement(parameters: Sequence[Tensor], curved: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The places in the flat vector of the parameters whose gradient is not constant; None for all of it."""
    if not curved or len(curved) == len(parameters):
        return None
    members = {id(parameter) for parameter, _ in curved}
    offset, spans = 0, []
    for parameter in parameters:
        if id(parameter) in members:
            spans.append(torch.arange(offset, offset + parameter.numel(), device=parameter.device))
        offset += parameter.numel()
    return torch.cat(spans)
