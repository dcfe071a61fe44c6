"""The check of an operator by itself: residuals of right and wrong products, and where the passes beside theta run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import UnsupportedModelError
from telltale.signals.hessian import HessianOperator
from telltale.signals.quiet import Quiet, own_precision
from telltale.signals.receipt import (
    TOLERANCE,
    Receipt,
    RoundedAway,
    all_finite,
    examine,
    refuse_unless_right,
    with_gradient,
)


def cubic(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    weight = torch.linspace(-1, 2, 7, dtype=dtype).requires_grad_()
    return weight, lambda values: with_gradient((values[0] ** 3).sum() + values[0][0] * values[0][1], values)


def product(weight: Tensor, v: Tensor, off: float = 0.0) -> Tensor:
    found = 6 * weight.detach() * v
    found[0] += v[1] * (1 + off)
    found[1] += v[0]
    return found


def gradient(weight: Tensor) -> Tensor:
    return torch.cat(with_gradient((weight**3).sum() + weight[0] * weight[1], [weight])[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_products_leave_rounding(dtype: torch.dtype) -> None:
    weight, at = cubic(dtype)
    receipt, _ = examine(lambda v: product(weight, v), gradient(weight), [weight], at)
    assert receipt.worst < 1e-5
    assert receipt.precision == "float64"


def test_each_residual_sees_its_own_fault() -> None:
    weight, at = cubic()
    lopsided, _ = examine(lambda v: product(weight, v, off=2.0), gradient(weight), [weight], at)
    assert lopsided.asymmetry > TOLERANCE[torch.float64]
    scaled, _ = examine(lambda v: 1.1 * product(weight, v), gradient(weight), [weight], at)
    assert scaled.asymmetry < 1e-5
    assert scaled.difference == pytest.approx(1 / 11, rel=0.1)

    def doubled(values: Any) -> Any:
        loss, found = at(values)
        return loss, [2 * part for part in found]

    whole, _ = examine(lambda v: 2 * product(weight, v), 2 * gradient(weight), [weight], doubled)
    assert max(whole.asymmetry, whole.difference) < 1e-5
    assert whole.slope == pytest.approx(0.5, rel=1e-3), "a gradient that is scaled as a whole"


def test_a_refusal_names_the_residual_the_place_and_the_tolerance() -> None:
    receipt = Receipt(1e-8, 0.3, 1e-9, "float64", 1e-3)
    leaves, names = [torch.zeros(2), torch.zeros(3)], ["block.1.weight", "head.bias"]
    missing = torch.tensor([0.0, 0.0, 0.1, 0.9, 0.0], dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match=r"0\.3, tolerance 0\.001.*head \(parameter head\.bias\)"):
        refuse_unless_right(receipt, missing, leaves, names, [])
    with pytest.raises(UnsupportedModelError, match="likely place is MineBackward"):
        refuse_unless_right(receipt, missing, leaves, names, ["MineBackward"])
    refuse_unless_right(Receipt(1e-8, 1e-6, 1e-9, "float64", 1e-3), missing, leaves, names, [])


def test_where_float64_is_not_to_be_had_the_passes_run_in_the_operators_own_precision() -> None:
    weight, at = cubic()

    def single(values: Any) -> Any:
        if values[0].dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return at(values)

    receipt, _ = examine(lambda v: product(weight, v), gradient(weight), [weight], single)
    assert receipt.precision == "float32"
    assert receipt.worst < receipt.tolerance == TOLERANCE[torch.float32]


def test_a_tensor_cannot_be_computed_again_and_has_its_symmetry_alone() -> None:
    weight = torch.randn(4, requires_grad=True)
    receipt = HessianOperator(weight.pow(4).sum(), [weight]).receipt
    assert (receipt.difference, receipt.slope, receipt.precision) == (None, None, None)
    assert HessianOperator(weight.pow(4).sum(), [weight], check=False).receipt is None


def test_a_loss_with_dropout_sees_the_same_masks_beside_theta() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 5), torch.randn(9, 5)
    receipt = HessianOperator(
        lambda: functional.dropout(layer(x).tanh(), 0.5).square().mean(), list(layer.parameters())
    ).receipt
    assert receipt.worst < 1e-5


def test_quiet_raises_lower_precisions_and_leaves_autocast() -> None:
    x, layer = torch.randn(3, 4), nn.Linear(4, 4)
    with Quiet(torch.float32), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32
        assert torch.zeros(2, dtype=torch.float16).dtype == torch.float32
    weight = layer.weight.detach().double().requires_grad_()
    with Quiet(torch.float64, instead={id(layer.weight): weight}):
        assert layer(x).dtype == torch.float64
        assert torch.ones(2).dtype == torch.float64
    assert layer(x).dtype == torch.float32


def test_own_precision_puts_back_what_it_found() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with own_precision():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()


def fitted(margin: float, *, doubled: bool = False) -> HessianOperator:
    """Cross-entropy of logits that are right by ``margin`` or a little more, so that float32 rounds 1 - p."""
    weight = torch.eye(4).mul(margin).add(torch.linspace(0, 1, 16).view(4, 4)).requires_grad_()
    x = torch.eye(4).repeat(3, 1) + 0.01 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return functional.cross_entropy(x.to(weight) @ (2 * weight - weight.detach() if doubled else weight), labels)

    labels = torch.arange(4).repeat(3)
    return HessianOperator(loss, [weight])


def test_near_a_loss_of_zero_the_tolerance_is_as_wide_as_the_rounding_of_the_gradient() -> None:
    assert fitted(2.0).receipt.tolerance == TOLERANCE[torch.float64]
    near = fitted(11.5)
    assert 1e-6 < near.loss < 1e-4
    assert near.receipt.rounding > 1e-4
    assert TOLERANCE[torch.float64] <= near.receipt.tolerance <= TOLERANCE[torch.float32]
    exact = Receipt(0.0, 5e-3, 1e-9, "float64", 0.03, rounding=0.01)
    refuse_unless_right(exact, None, [], [], [])
    with pytest.raises(UnsupportedModelError, match="slope"):
        refuse_unless_right(Receipt(0.0, 5e-3, 5e-3, "float64", 0.03, rounding=0.01), None, [], [], [])
    with pytest.raises(UnsupportedModelError, match="change of the gradient"):
        fitted(11.5, doubled=True)
    with pytest.raises(RoundedAway, match=r"rounding is .* of the gradient of this loss"):
        fitted(17.0)


def test_finite_numbers_are_told_from_others_also_where_their_sum_is_not() -> None:
    large = torch.full((9,), 3e38)
    assert all_finite(large)
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite(large.index_fill(0, torch.tensor([4]), bad))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e25])
def test_curvature_of_any_size_has_its_residuals(scale: float) -> None:
    weight = torch.linspace(-1, 2, 7).requires_grad_()
    receipt, _ = examine(
        lambda v: scale * 6 * weight.detach() * v,
        scale * 3 * weight.detach() ** 2,
        [weight],
        lambda values: with_gradient(scale * (values[0] ** 3).sum(), values),
    )
    assert receipt.worst < 1e-5
