import pytest
import torch
from torch import nn
from torch.nn import functional

from telltale.signals.activations import gelu_derivatives, kept_curvature, silu_derivatives
from telltale.signals.hessian import HessianOperator, materialise


@pytest.mark.parametrize(
    ("function", "derivatives"), [(functional.gelu, gelu_derivatives), (functional.silu, silu_derivatives)]
)
def test_derivatives_are_those_of_autograd(function, derivatives):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    found = derivatives(x.detach())
    assert torch.allclose(found[0], slope.detach(), atol=1e-13)
    assert torch.allclose(found[1], curvature, atol=1e-13)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.GELU(),
        lambda: nn.SiLU(),
        lambda: nn.LayerNorm(7),
        lambda: nn.Sequential(nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 7), nn.LayerNorm(7), nn.SiLU()),
        lambda: nn.GELU(approximate="tanh"),
        lambda: nn.SiLU(inplace=True),
        lambda: nn.LayerNorm(7, elementwise_affine=False),
        lambda: nn.LayerNorm(7, bias=False),
        lambda: nn.LayerNorm((3, 7)),
    ],
)
def test_loss_gradient_and_products_agree_with_pytorchs_own(middle):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), middle(), nn.Linear(7, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs, targets = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    parameters = list(model.parameters())

    def loss():
        return functional.mse_loss(model(inputs), targets)

    reference, kept = HessianOperator(loss().clone(), parameters), HessianOperator(loss, parameters)
    assert kept.loss == pytest.approx(reference.loss, abs=1e-14)
    assert torch.allclose(kept.gradient, reference.gradient, atol=1e-13)
    assert reference.gradient.abs().max() > 1e-3
    assert torch.allclose(materialise(kept), materialise(reference), atol=1e-12)


def test_the_exchange_ends_with_the_block_and_leaves_inference_alone():
    x = torch.randn(4, 3, requires_grad=True)
    with kept_curvature():
        assert "_Value" in type(functional.gelu(x)).__name__ + str(functional.gelu(x).grad_fn)
        with torch.no_grad():
            assert functional.gelu(x).grad_fn is None
    assert "Gelu" in str(functional.gelu(x).grad_fn)
