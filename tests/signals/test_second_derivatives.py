import pytest
import torch
from torch import nn
from torch.nn import functional

from telltale.signals.hessian import HessianOperator, materialise
from telltale.signals.quiet import Quiet
from telltale.signals.second_derivatives import gelu_derivatives


def test_derivatives_are_those_of_autograd():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.gelu(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    found = gelu_derivatives(x.detach())
    assert torch.allclose(found[0], slope.detach(), atol=1e-13)
    assert torch.allclose(found[1], curvature, atol=1e-13)


@pytest.mark.long
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
        lambda: nn.ReLU(),
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Softmax(dim=-1),
        lambda: nn.Softmax(dim=1),
        lambda: nn.Sequential(nn.Linear(7, 9, bias=False), nn.ReLU(), nn.Linear(9, 7), nn.Softmax(-1), nn.LayerNorm(7)),
        lambda: nn.Sequential(nn.Linear(7, 3), nn.Hardtanh(inplace=True), nn.Linear(3, 7)),
        lambda: nn.Flatten(1, 1),
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


def written_out(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Attention over the second axis, masked, with one matrix for all of its parts and a residual in place."""
    mask = torch.full((hidden.shape[1], hidden.shape[1]), float("-inf"), dtype=hidden.dtype).triu(1)
    mixed = functional.linear(hidden, weight)
    scores = mixed @ hidden.transpose(-1, -2) * 0.3 + mask
    mixed = torch.softmax(scores, -1) @ mixed + scores.masked_fill(mask < 0, 0.0).softmax(1) @ hidden
    turned = torch.relu(functional.linear(mixed.transpose(0, 1), weight)).transpose(0, 1)
    return functional.linear(turned, weight).add_(mixed)


@pytest.mark.parametrize("leaves", ["weight", "bias", "input", "all"])
def test_attention_and_linear_layers_for_every_choice_of_parameters(leaves):
    torch.manual_seed(1)
    weight, inputs, bias = torch.randn(7, 7).double() / 2, torch.randn(6, 3, 7).double(), torch.randn(7).double()
    chosen = [weight, bias, inputs] if leaves == "all" else [{"weight": weight, "bias": bias, "input": inputs}[leaves]]
    frozen = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    for leaf in chosen:
        leaf.requires_grad_()

    def loss():
        hidden = functional.linear(functional.linear(inputs, frozen, bias), weight, bias)
        return written_out(hidden, weight).square().mean() + functional.linear(hidden[0, 0], weight, bias).cos().sum()

    reference, kept = HessianOperator(loss().clone(), chosen), HessianOperator(loss, chosen)
    assert torch.allclose(kept.gradient, reference.gradient, atol=1e-12)
    assert reference.gradient.abs().max() > 1e-3
    assert torch.allclose(materialise(kept), materialise(reference), atol=1e-11)


def test_inside_vmap_and_other_transforms_pytorchs_own_functions_stay():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def loss():
        return torch.vmap(lambda row: torch.softmax(functional.linear(row, weight).relu(), -1))(inputs).square().sum()

    reference, kept = HessianOperator(loss().clone(), [weight]), HessianOperator(loss, [weight])
    assert torch.allclose(materialise(kept), materialise(reference), atol=1e-12)


def test_a_loss_linear_in_some_parameters_has_no_curvature_there():
    weight, bias = torch.randn(1, 3, requires_grad=True), torch.zeros(1, requires_grad=True)
    inputs = torch.randn(4, 3)
    assert not HessianOperator(lambda: functional.linear(inputs, weight, bias).mean(), [weight, bias]).has_curvature
    assert HessianOperator(
        lambda: functional.linear(inputs, weight, bias).square().mean(), [weight, bias]
    ).has_curvature


def test_the_exchange_ends_with_the_block_and_leaves_inference_alone():
    x = torch.randn(4, 3, requires_grad=True)
    with Quiet(torch.float32):
        assert "_Value" in str(functional.gelu(x).grad_fn)
        with torch.no_grad():
            assert functional.gelu(x).grad_fn is None
    assert "Gelu" in str(functional.gelu(x).grad_fn)
