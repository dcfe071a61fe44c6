import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from telltale.errors import DataError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import HessianOperator, Operator, as_operator, materialise


def tiny(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).to(dtype)
    inputs = torch.randn(9, 4, dtype=dtype)
    targets = torch.randint(0, 3, (9,))
    return network, lambda: functional.cross_entropy(network(inputs), targets)


def dense_hessian(network, loss):
    names = list(dict(network.named_parameters()))
    shapes = [parameter.shape for parameter in network.parameters()]
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
    modules = dict(network.named_modules())

    def of(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        for name, part, shape in zip(names, parts, shapes, strict=True):
            owner, _, attribute = name.rpartition(".")
            delattr(modules[owner], attribute)
            setattr(modules[owner], attribute, part.view(shape))
        return loss()

    return torch.autograd.functional.hessian(of, flat)


def test_products_equal_the_dense_columns_to_1e_10():
    network, loss = tiny()
    found = materialise(HessianOperator(loss, list(network.parameters())))
    network, loss = tiny()
    reference = dense_hessian(network, loss)
    assert found.abs().max() > 0.01
    assert (found - reference).abs().max() < 1e-10


def test_products_equal_forward_over_reverse_in_float32():
    network, _ = tiny(torch.float32)
    parameters = dict(network.named_parameters())
    vector = torch.randn(sum(parameter.numel() for parameter in parameters.values()))
    inputs, targets = torch.randn(9, 4), torch.randint(0, 3, (9,))

    def value(values):
        return functional.cross_entropy(torch.func.functional_call(network, values, inputs), targets)

    tangents = {
        name: part.view_as(parameters[name])
        for name, part in zip(parameters, vector.split([p.numel() for p in parameters.values()]), strict=True)
    }
    _, products = torch.func.jvp(torch.func.grad(value), (parameters,), (tangents,))
    reference = torch.cat([part.reshape(-1) for part in products.values()])
    operator = HessianOperator(value(parameters), list(parameters.values()))
    assert (operator.matvec(vector) - reference).norm() < 1e-6 * reference.norm()


def test_products_are_symmetric_and_repeat_bit_for_bit_with_dropout():
    network, loss = tiny(dropout=0.5)
    network.train()
    operator = HessianOperator(loss, list(network.parameters()))
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    assert abs(float(u @ operator.matvec(v) - v @ operator.matvec(u))) < 1e-12
    assert torch.equal(operator.matvec(v), operator.matvec(v))
    rerun = HessianOperator(loss, list(network.parameters()))
    assert not torch.allclose(rerun.matvec(v), operator.matvec(v)), "another mask is another operator"


def test_nothing_is_written_to_grad_and_the_gradient_is_kept():
    network, loss = tiny()
    operator = HessianOperator(loss, list(network.parameters()))
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in network.parameters())
    loss().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
    assert torch.equal(operator.gradient, expected)
    assert operator.loss == loss().item()


def test_a_linear_loss_has_no_curvature_and_a_partly_linear_one_has_zero_rows():
    weight, shift = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    flat = HessianOperator(weight.sum() * 3.0, [weight])
    assert not flat.has_curvature
    assert torch.equal(flat.matvec(torch.ones(3)), torch.zeros(3))
    mixed = HessianOperator((weight**3).sum() + shift.sum(), [shift, weight])
    assert mixed.has_curvature
    expected = torch.diag(torch.cat([torch.zeros(2), 6 * weight.detach()]))
    assert torch.allclose(materialise(mixed), expected)


def test_an_unused_parameter_has_zero_rows():
    weight, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    found = materialise(HessianOperator((weight**2).sum(), [weight, unused]))
    assert torch.equal(found, torch.diag(torch.tensor([2.0, 2, 2, 0, 0])))


class HidesItsCurvature(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        context.value = value.detach()
        return (value**2).sum()

    @staticmethod
    def backward(context, upstream):
        return 2 * context.value * upstream.detach()


def test_a_broken_graph_is_refused_not_read_as_zero():
    weight = torch.randn(3, requires_grad=True)
    with pytest.raises(DataError, match="no graph"):
        HessianOperator((weight**2).sum().detach(), [weight])
    with pytest.raises(DataError, match="does not depend"):
        HessianOperator((torch.randn(3, requires_grad=True) ** 2).sum(), [weight])
    with pytest.raises(DataError, match="HidesItsCurvature"):
        HessianOperator(HidesItsCurvature.apply(weight), [weight])


def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_right():
    network, _ = tiny()
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))

    def loss(reentrant):
        hidden = network[0](inputs)
        for layer in network[1:]:
            hidden = hidden if reentrant is None else checkpoint(layer, hidden, use_reentrant=reentrant)
            hidden = layer(hidden) if reentrant is None else hidden
        return functional.cross_entropy(hidden, targets)

    parameters = list(network.parameters())
    plain = materialise(HessianOperator(loss(None), parameters))
    assert torch.allclose(materialise(HessianOperator(loss(False), parameters)), plain, atol=1e-12)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        HessianOperator(loss(True), parameters)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ([], DataError),
        ([torch.randn(3)], DataError),
        ([torch.randn(3, dtype=torch.bfloat16, requires_grad=True)], DataError),
        ([torch.randn(3, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)], DataError),
    ],
)
def test_unusable_parameters_are_refused(parameters, error):
    with pytest.raises(error):
        HessianOperator(lambda: sum((p**2).sum() for p in parameters), parameters)


def test_losses_that_are_no_finite_scalar_are_refused():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(NumericalError, match="nan"):
        HessianOperator(lambda: (weight * float("nan")).sum(), [weight])
    with pytest.raises(DataError, match="scalar"):
        HessianOperator(lambda: weight**2, [weight])
    with pytest.raises(NumericalError, match="gradient"):
        HessianOperator(lambda: (weight - 1).sqrt().sum(), [weight])


def test_foreign_operators_are_adapted():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    matrix = matrix + matrix.T
    for foreign in (matrix, aslinearoperator(matrix.numpy())):
        operator = as_operator(foreign)
        assert isinstance(operator, Operator)
        assert torch.allclose(materialise(operator), matrix)
    with pytest.raises(DataError, match="no operator"):
        as_operator("hessian")
    with pytest.raises(DataError, match="square"):
        as_operator(torch.randn(2, 3))


def test_a_once_differentiable_function_is_refused_where_its_curvature_would_vanish() -> None:
    """The gradient that comes in is constant here, so autograd has nothing to complain about and the answer would be wrong."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    weight, other = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="SquaredBackward is once differentiable"):
        HessianOperator(Squared.apply(weight).sum() + other.pow(4).sum(), [weight, other])
