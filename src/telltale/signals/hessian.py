"""Hessian-vector products on a retained gradient graph, and the protocol that every matrix-free operator here follows.

The forward pass and the gradient run once; each product is one second-order backward pass through the kept graph. So
repeated products see the same minibatch, the same dropout masks, and are bit-equal: Lanczos needs one fixed operator.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from telltale.errors import DataError, NumericalError, TelltaleError, UnsupportedModelError
from telltale.signals.quiet import Quiet, RandomState, own_precision
from telltale.signals.receipt import Elsewhere, Receipt, all_finite, examine, refuse_unless_right, with_gradient
from telltale.signals.second_derivatives import KEPT

_NO_SECOND_DERIVATIVE = ("not implemented", "double backward", "once_differentiable")
"""What PyTorch says of fused operations, compiled graphs and functions that are once differentiable."""
_HOOKS = "telltale: this graph saves its tensors through hooks"
SYMMETRY = 1e-5
"""|A - A^T| / |A|, by largest entries, up to which a matrix is taken for symmetric: the rounding of float32."""


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

    ``loss`` is a function that computes a scalar tensor, or that tensor with its graph. Of a function the products are checked
    when the operator is opened, against the gradient and the loss beside the present parameters (``receipt``, see
    :mod:`telltale.signals.receipt`): two products and two gradients. A tensor cannot be computed again: its products are
    checked for symmetry alone, and a custom function in its graph is refused. A parameter that the loss does not use has zero
    rows. Nothing is written to ``.grad``. ``at`` computes loss and gradient at other values of the parameters, where the
    tensor given has such a function; ``names`` are the parameters' own and ``suspects`` what may hide a derivative, for
    messages; ``check`` False opens it without a receipt.

    Raises :class:`~telltale.errors.DataError` for no parameters, a loss that is not a scalar, dtypes below float32 or
    mixed, and a loss that is not connected to the parameters;
    :class:`~telltale.errors.NumericalError` for a loss or gradient that is not finite;
    :class:`~telltale.errors.UnsupportedModelError` for reentrant checkpointing and for products that are not those of the
    loss, or that PyTorch does not have.
    """

    receipt: Receipt | None = None
    """Residuals of the check; None if it was left out."""

    def __init__(
        self,
        loss: Tensor | Callable[[], Tensor],
        parameters: Sequence[Tensor],
        *,
        at: Elsewhere | None = None,
        names: Sequence[str] = (),
        suspects: Sequence[str] = (),
        fixed: Sequence[tuple[Tensor, int]] = (),
        check: bool = True,
    ) -> None:
        self._parameters = _checked_parameters(parameters)
        with own_precision(), torch.enable_grad():
            random = RandomState.now()
            value, mode = _evaluated(loss, self._parameters[0].dtype)
            _check_loss(value)
            nodes = list(_graph_nodes(value))
            _refuse_reentrant_checkpoints(nodes)
            with computing("the gradient of the loss"):
                slopes = torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)
            if all(part is None for part in slopes):
                raise DataError(
                    "the loss does not depend on any of the parameters; expected a loss of the model itself."
                )
            curved = [
                (parameter, part)
                for parameter, part in zip(self._parameters, slopes, strict=True)
                if part is not None and part.requires_grad
            ]
            self._flat = torch.cat([part.reshape(-1) for _, part in curved]) if curved else None
        self._where = _placement(self._parameters, curved)
        self._curved = [parameter for parameter, _ in curved]
        self.loss = float(value.detach())
        self.gradient = torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part.detach()).reshape(-1)
                for parameter, part in zip(self._parameters, slopes, strict=True)
            ]
        )
        if not all_finite(self.gradient):
            raise NumericalError("the gradient of the probe's loss is not finite; expected finite parameters and loss.")
        self.size = self.gradient.numel()
        self.has_curvature = bool(curved)
        """False for a loss that is linear in the parameters: H = 0, a legitimate answer."""
        if check:
            if at is None and mode is not None and not isinstance(loss, Tensor):
                at, fixed = _elsewhere(loss, self._parameters, random, recomputes=not mode.keep), mode.fixed
            custom = _custom_functions(nodes)
            if at is None and custom:
                raise UnsupportedModelError(
                    f"the graph holds {', '.join(custom)}, which may hide curvature, and a tensor cannot be computed again to "
                    f"check it; expected the loss as a function that computes it."
                )
            self._check(at, names, fixed, [*suspects, *custom])

    def _check(
        self,
        at: Elsewhere | None,
        names: Sequence[str],
        fixed: Sequence[tuple[Tensor, int]],
        custom: Sequence[str],
    ) -> None:
        receipt, missing = examine(self.matvec, self.gradient, self._parameters, at, fixed=fixed)
        refuse_unless_right(receipt, missing, self._parameters, names, custom)
        self.receipt = receipt

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of every product."""
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.gradient.device

    def matvec(self, v: Tensor) -> Tensor:
        """H v. (N,) -> (N,). Autocast and inference mode of whoever calls have no part in it.

        Raises :class:`~telltale.errors.UnsupportedModelError` for a loss that has no second derivative in PyTorch.
        """
        if v.shape != (self.size,):
            raise DataError(f"the vector has shape {tuple(v.shape)}; expected ({self.size},).")
        if self._flat is None:
            return torch.zeros_like(self.gradient)
        with own_precision(), computing("a product with the Hessian"):
            parts = torch.autograd.grad(
                self._flat,
                self._curved,
                v if self._where is None else v[self._where],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
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


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Every leaf tensor that the graph of ``loss`` reaches: the parameters that it really uses.

    Raises :class:`~telltale.errors.UnsupportedModelError` for reentrant checkpointing, which hides them.
    """
    nodes = list(_graph_nodes(loss))
    _refuse_reentrant_checkpoints(nodes)
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _dtype_of(operator: Operator) -> torch.dtype:
    dtype = getattr(operator, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def _device_of(operator: Operator) -> torch.device:
    return torch.device(getattr(operator, "device", None) or "cpu")


@contextmanager
def computing(what: str) -> Iterator[None]:
    """PyTorch's own failures inside as :class:`~telltale.errors.UnsupportedModelError` that says ``what`` failed."""
    try:
        yield
    except TelltaleError:
        raise
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if any(phrase in str(error) for phrase in _NO_SECOND_DERIVATIVE):
            raise UnsupportedModelError(
                f"the model or the loss has no second derivative, so there is no Hessian to read: {error}; expected operations "
                f"that are differentiable twice."
            ) from error
        if "use_reentrant" in str(error):
            raise _reentrant() from error
        raise UnsupportedModelError(
            f"{what} could not be computed: {error}; expected a model and a loss that run in full precision with dense "
            f"gradients and can be differentiated twice."
        ) from error


def _evaluated(loss: Tensor | Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, Quiet | None]:
    """The loss, and the mode that it was computed under."""
    if isinstance(loss, Tensor):
        return loss, None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS), Quiet(dtype) as mode:
            return loss(), mode
    except RuntimeError:
        # Activation checkpointing computes them anew in the backward pass, where PyTorch does not see the kept forms; and
        # what cannot be computed with them is tried without.
        pass
    with computing("the loss"), Quiet(dtype, keep=False) as mode:
        return loss(), mode


def _elsewhere(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], random: RandomState, *, recomputes: bool
) -> Elsewhere:
    """Loss and gradient as a function of the parameters' values, with the same random draws; the parameters stay as they are."""
    live = {id(parameter) for parameter in parameters}

    def at(values: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        dtype = values[0].dtype
        if not recomputes:
            instead = {id(parameter): value for parameter, value in zip(parameters, values, strict=True)}
            quiet = Quiet(dtype, drawn=parameters[0].dtype, instead=instead, keep=False, renormalise=False)
            with random.replayed(), torch.enable_grad(), own_precision(), quiet:
                value = loss()
            if all(id(leaf) not in live for leaf in leaves_of(value)):
                with own_precision():
                    return with_gradient(value, values)
        # A parameter that goes to a custom function directly, or to a part that is computed anew, is only moved in its place.
        if dtype != parameters[0].dtype:
            raise TypeError("parameters that are moved in place keep their precision")
        with random.replayed(), torch.enable_grad(), own_precision(), _moved(parameters, values):
            with Quiet(dtype, keep=False, renormalise=False):
                value = loss()
            return with_gradient(value, parameters)

    return at


@contextmanager
def _moved(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters at other values, and afterwards at their own memory as before."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.detach()
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


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
    if not value.is_floating_point():
        raise DataError(f"the loss is {value.dtype}; expected a real floating-point scalar.")
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
        raise _reentrant()


def _reentrant() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model uses reentrant activation checkpointing, under which second derivatives read as zero; expected "
        "use_reentrant=False, or checkpointing off for the probe."
    )


def _custom_functions(nodes: Sequence[Any]) -> list[str]:
    """Names of the graph's functions that are not PyTorch's own and not ours."""
    return sorted(
        {
            type(node).__name__
            for node in nodes
            if isinstance(node, torch.autograd.function.BackwardCFunction)
            and getattr(type(node), "_forward_cls", None) not in KEPT
            and type(node).__name__ != "BackwardHookFunctionBackward"  # PyTorch's own, for a module's hooks.
        }
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
