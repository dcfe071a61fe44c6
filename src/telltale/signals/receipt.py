"""Whether products are those of the loss: what is measured when an operator is opened, and what is refused.

Double backward is silently wrong wherever a backward pass hides what it depends on: a custom function, a hook, a gradient
that is scaled or reversed on purpose. No list of such things is complete, so the numbers themselves are checked, along a
direction u of length 1 and with v = Hu / |Hu|:

    asymmetry    |u . Hv - v . Hu| / |Hu|
    difference   |Hu - (g(theta + h u) - g(theta - h u)) / 2h| / |Hu|
    slope        |g . u - (L(theta + h u) - L(theta - h u)) / 2h| / |g . u|

Two products and two gradients. The passes beside theta run in float64 with a step of 1e-8 of the weights: one so small
crosses next to no kink of a ReLU, and the difference is good to six digits. Among hundreds of thousands of activations one
may lie that near to its kink: a difference that does not agree is taken again with a tenth and a hundredth of the step, at two
gradients each, and what hides curvature hides it there as well. Where the model cannot run in float64 the passes run in the
operator's own precision, with a larger step and a wider tolerance; so are products checked that have nothing beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.errors import NumericalError, UnsupportedModelError
from telltale.signals.quiet import own_precision

STEP = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Length of the step beside theta, as a part of |theta|."""
TOLERANCE = {torch.float64: 1e-3, torch.float32: 3e-2}
"""Residual up to which a number is taken for right, by the precision of the passes beside theta."""
SHORTER = (0.1, 0.01)
"""Parts of the step that are tried in float64 where a difference does not agree."""
ROUNDING = 64
"""Rounding errors of a product, in units of its precision and length, that asymmetry is not made of."""
SPREAD = 2.0
"""Residual of right products at most, in units of the rounding of the gradient: .8 was the most on nets trained to 1e-5."""
STEADY = 1e-2
"""The passes on both sides agree to this part of what is called rounding; noise that is drawn anew does not."""
PIECE = 65536
"""Numbers whose squares are added up in float32 before the sum goes on in float64."""
SQUARES = (1e-24, 1e30)
"""Sums of squares between which float32 neither loses nor overflows any that matters."""
NEGLIGIBLE = 1e-4
"""Curvature and slope below this part of |g| / |theta| (of |g|) are compared with it, not with themselves."""


class RoundedAway(UnsupportedModelError):
    """Products cannot be checked because too little of the gradient is left in the operator's precision. It may pass."""


@dataclass(frozen=True)
class Receipt:
    """Residuals of one operator; each is relative, and below ``tolerance``. None: could not be measured."""

    asymmetry: float
    difference: float | None
    slope: float | None
    precision: str | None
    """Of the passes beside theta."""
    tolerance: float
    """Of asymmetry and difference; ``slope`` has no part in the operator's rounding."""
    rounding: float = 0.0
    """Of the gradient, as a part of it."""

    @property
    def worst(self) -> float:
        """The largest of the residuals."""
        return max(value for value in (self.asymmetry, self.difference, self.slope) if value is not None)


Elsewhere = Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]
"""Values of the leaves, in any precision -> the loss there and its gradient (see :func:`with_gradient`)."""


def with_gradient(loss: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """``loss`` and its gradient, zero where ``values`` are not used."""
    return loss, torch.autograd.grad(loss, list(values), allow_unused=True, materialize_grads=True)


@dataclass(frozen=True)
class Beside:
    """Loss and gradient (N,) float64 at theta + h u or theta - h u."""

    loss: float
    gradient: Tensor


@own_precision()
def examine(
    matvec: Callable[[Tensor], Tensor],
    gradient: Tensor,
    leaves: Sequence[Tensor],
    at: Elsewhere | None,
    *,
    fixed: Sequence[tuple[Tensor, int]] = (),
    seed: int = 0,
) -> tuple[Receipt, Tensor | None]:
    """The receipt of the Hessian of ``leaves`` by its products, and Hu less the difference of gradients (N,).

    ``at`` computes loss and gradient at other values of the leaves; None leaves the symmetry alone. ``fixed``:
    (leaf, row) that take no part, such as an embedding's padding.
    """
    u = _direction(gradient, leaves, fixed, seed)
    product = matvec(u)
    length = _length(product)
    asymmetry = 0.0
    if length > 0:
        v = product / length
        again = matvec(v)
        apart = abs(float(torch.dot(u.double(), again.double())) - float(torch.dot(v.double(), product.double())))
        # Where v is much steeper than u, the rounding of Hv alone is large beside Hu.
        asymmetry = max(0.0, apart - ROUNDING * torch.finfo(product.dtype).eps * _length(again)) / length
    if at is None:
        return Receipt(asymmetry, None, None, None, TOLERANCE[product.dtype]), None
    ahead, behind, step, dtype = _beside(at, leaves, u)
    weights = _length_of(leaves) or 1.0
    least = NEGLIGIBLE * _length(gradient) / weights
    difference, missing = _apart(product, ahead, behind, step, least)
    shorter = step
    for part in SHORTER if dtype == torch.float64 else ():
        if difference <= TOLERANCE[dtype]:
            break
        near, far = _pass(at, leaves, u, part * step, dtype), _pass(at, leaves, u, -part * step, dtype)
        less, rest = _apart(product, near, far, part * step, least)
        if less < difference:
            difference, missing, ahead, behind, shorter = less, rest, near, far, part * step
    climb = (ahead.loss - behind.loss) / (2 * shorter)
    said = float(torch.dot((ahead.gradient + behind.gradient) / 2, u.double().to(ahead.gradient)))
    # The two losses carry rounding, which weighs where the slope is small.
    rounding = 16 * torch.finfo(dtype).eps * max(abs(ahead.loss), abs(behind.loss)) / (2 * shorter)
    off = max(0.0, abs(climb - said) - rounding)
    slope = off / max(abs(climb), abs(said), NEGLIGIBLE * _length(gradient), torch.finfo(torch.float64).tiny)
    rounded = _rounding(gradient, ahead, behind)
    tolerance = max(TOLERANCE[dtype], min(SPREAD * rounded, TOLERANCE[torch.float32]))
    return Receipt(asymmetry, difference, slope, str(dtype).removeprefix("torch."), tolerance, rounded), missing


def _rounding(gradient: Tensor, ahead: Beside, behind: Beside) -> float:
    """How far ``gradient`` is from that of the passes beside it, as a part of it: what precisions differ in, not places."""
    middle = (ahead.gradient + behind.gradient) / 2
    off = _length(gradient.double().to(middle) - middle)
    if _length(ahead.gradient - behind.gradient) > STEADY * off:
        return 0.0
    return off / max(_length(middle), torch.finfo(torch.float64).tiny)


def _apart(product: Tensor, ahead: Beside, behind: Beside, step: float, least: float) -> tuple[float, Tensor]:
    """How far ``product`` is from the change of the gradient, as a part of the larger one; and their difference (N,)."""
    bend = (ahead.gradient - behind.gradient) / (2 * step)
    missing = product.double() - bend.to(product.device)
    return _length(missing) / max(_length(product), _length(bend), least, torch.finfo(torch.float64).tiny), missing


def refuse_unless_right(
    receipt: Receipt, missing: Tensor | None, leaves: Sequence[Tensor], names: Sequence[str], suspects: Sequence[str]
) -> None:
    """Raises :class:`~telltale.errors.UnsupportedModelError` if a residual is above the tolerance, and says where to look.

    ``suspects``: what is known to be able to hide a derivative, such as custom functions in the graph.
    """
    plain = receipt.tolerance if receipt.precision is None else TOLERANCE[getattr(torch, receipt.precision)]
    for value, claim, tolerance in (
        (receipt.asymmetry, "the Hessian's products are not symmetric", receipt.tolerance),
        (receipt.difference, "the Hessian's products are not the change of the gradient", receipt.tolerance),
        (receipt.slope, "the gradient is not the slope of the loss", plain),
    ):
        if value is not None and not value <= tolerance:
            if SPREAD * receipt.rounding > TOLERANCE[torch.float32]:
                raise RoundedAway(
                    f"rounding is {receipt.rounding:.2g} of the gradient of this loss, too much for second derivatives to be "
                    f"checked; expected a larger loss, or weights in float64."
                )
            place = ", ".join(suspects) or _farthest(missing, leaves, names)
            raise UnsupportedModelError(
                f"{claim} (relative residual {value:.2g}, tolerance {tolerance:.2g}), so nothing can be read from "
                f"second derivatives; the likely place is {place}. Expected a loss whose backward pass is its derivative, "
                f"without hidden, scaled or clamped gradients, and not exactly on a kink."
            )


def _beside(at: Elsewhere, leaves: Sequence[Tensor], u: Tensor) -> tuple[Beside, Beside, float, torch.dtype]:
    """The two passes, in float64 if the model can, else in the leaves' own precision."""
    dtypes = dict.fromkeys((torch.float64, leaves[0].dtype))
    weights = _length_of(leaves) or math.sqrt(u.numel()) * 1e-2
    for dtype in dtypes:
        step = STEP[dtype] * weights
        try:
            return _pass(at, leaves, u, step, dtype), _pass(at, leaves, u, -step, dtype), step, dtype
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            failure = error
    raise UnsupportedModelError(
        f"the loss could not be computed beside the present parameters, so its derivatives cannot be checked: {failure}"
    ) from failure


def _pass(at: Elsewhere, leaves: Sequence[Tensor], u: Tensor, step: float, dtype: torch.dtype) -> Beside:
    parts = u.split([leaf.numel() for leaf in leaves])
    values = [
        leaf.detach().to(dtype).add(part.view_as(leaf).to(dtype), alpha=step).requires_grad_()
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    loss, found = at(values)
    gradient = torch.cat([part.detach().reshape(-1).double() for part in found])
    if not (math.isfinite(float(loss.detach())) and all_finite(gradient)):
        raise NumericalError("loss or gradient beside the present parameters is not finite; expected finite ones.")
    return Beside(float(loss.detach()), gradient)


def _direction(gradient: Tensor, leaves: Sequence[Tensor], fixed: Sequence[tuple[Tensor, int]], seed: int) -> Tensor:
    """Half the gradient, so that slope and curvature are large along it, and half noise in proportion to each tensor."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for leaf in leaves:
        typical = _length(leaf.detach()) / math.sqrt(max(leaf.numel(), 1))
        parts.append(torch.randn(leaf.shape, generator=generator).to(leaf).reshape(-1) * (typical or 1e-2))
    noise = torch.cat(parts)
    direction = noise / _length(noise)
    steepest = _length(gradient)
    if steepest > 0:
        direction = direction + gradient / steepest
    for leaf, part in zip(leaves, direction.split([leaf.numel() for leaf in leaves]), strict=True):
        for owner, row in fixed:
            # Of the gradient as well: a readout that shares the table's weight has one for the padding's row.
            if owner is leaf:
                part.view_as(leaf)[row] = 0.0
    return direction / _length(direction)


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; by its sum, which is a fifth of the work, as long as that is finite."""
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def _length(vector: Tensor) -> float:
    """To six digits; a norm in float64 of float32 numbers takes five times as long."""
    flat = vector.reshape(-1)
    square = sum(float(torch.dot(piece, piece)) for piece in flat.split(PIECE))
    if SQUARES[0] < square < SQUARES[1]:
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64))


def _length_of(leaves: Iterable[Tensor]) -> float:
    return math.sqrt(sum(_length(leaf.detach()) ** 2 for leaf in leaves))


def _farthest(missing: Tensor | None, leaves: Sequence[Tensor], names: Sequence[str]) -> str:
    """The module of the parameter with the largest share of the residual: what hides a derivative is there or next to it."""
    if missing is None or not names:
        return "a custom function or a hook"
    shares: Mapping[str, float] = {
        name: _length(part) for name, part in zip(names, missing.split([leaf.numel() for leaf in leaves]), strict=True)
    }
    worst = max(shares, key=lambda name: shares[name])
    return f"{worst.rpartition('.')[0] or 'the model'} (parameter {worst}) or next to it"
