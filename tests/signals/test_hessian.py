import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from telltale.errors import DataError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import HessianOperator, Operator, as_operator, materialise
from telltale.signals.spectrum import slq


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
    with pytest.raises(UnsupportedModelError, match=r"HidesItsCurvature.* computed again"):
        HessianOperator(HidesItsCurvature.apply(weight), [weight])
    with pytest.raises(UnsupportedModelError, match=r"not the change of the gradient.*HidesItsCurvature"):
        HessianOperator(lambda: HidesItsCurvature.apply(weight * 1), [weight])
    kept = weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match=r"not the change of the gradient.*HidesItsCurvature"):
        HessianOperator(lambda: HidesItsCurvature.apply(weight), [weight])
    assert torch.equal(weight, kept)


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


MATRIX = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MATRIX = MATRIX + MATRIX.T


class Own:
    """What a user may write: a size, a product, and perhaps a dtype."""

    def __init__(self, size=5, dtype=torch.float64, product=lambda v: MATRIX.to(v) @ v):
        self.size, self.dtype, self.matvec = size, dtype, product


class Curvature:
    """As curvlinops has it: a shape, a dtype of torch, and only ``@``."""

    shape, dtype, device = (5, 5), torch.float64, torch.device("cpu")

    def __matmul__(self, v):
        return MATRIX @ v


ARRAY = MATRIX.numpy()


@pytest.mark.parametrize(
    "foreign",
    [
        MATRIX,
        ARRAY,
        aslinearoperator(ARRAY),
        csr_array(ARRAY),
        LinearOperator((5, 5), matvec=lambda v: ARRAY.astype("float32") @ v, dtype="float32"),
        Own(),
        Own(size=np.int64(5)),
        Own(dtype=None),
        Own(dtype=np.dtype("float64"), product=lambda v: ARRAY @ v),
        Own(product=lambda v: (MATRIX @ v)[:, None]),
        Curvature(),
    ],
    ids=lambda foreign: type(foreign).__name__,
)
def test_foreign_operators_are_adapted(foreign):
    operator = as_operator(foreign)
    assert isinstance(operator, Operator)
    assert torch.allclose(materialise(operator).double(), MATRIX, atol=1e-6)
    assert slq([foreign], runs=2, steps=5).extremes()[1][0] == pytest.approx(
        float(torch.linalg.eigvalsh(MATRIX)[-1]), abs=1e-5
    )


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("hessian", "no operator"),
        (Own(size=0), "no operator"),
        (torch.randn(2, 3), "square"),
        (csr_array(ARRAY[:3]), "square"),
        (torch.ones(3, 3).half(), "float16"),
        (np.ones((3, 3), dtype=int), "int64"),
        (torch.ones(3, 3).triu(), "transpose"),
        (Own(product=lambda v: v[:3]), r"shape \(3,\)"),
        (Own(product=lambda v: None), "NoneType"),
        (Own(dtype=np.dtype("float64"), product=lambda v: v + 1j), "complex"),
    ],
)
def test_what_is_no_symmetric_operator_is_named(thing, words):
    with pytest.raises(DataError, match=words):
        materialise(as_operator(thing))


def test_a_checkpointed_loss_keeps_its_curvature():
    weight = torch.linspace(0.1, 1.0, 6, dtype=torch.float64, requires_grad=True)

    def block(values):
        return functional.gelu(values) ** 2

    plain = materialise(HessianOperator(lambda: block(weight).sum(), [weight]))
    anew = HessianOperator(lambda: checkpoint(block, weight, use_reentrant=False).sum(), [weight])
    assert torch.allclose(materialise(anew), plain, atol=1e-12)


def test_a_loss_without_a_second_derivative_is_refused_in_a_sentence():
    scores = torch.randn(8, 1, 3, requires_grad=True)
    loss = functional.ctc_loss(scores.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))
    with pytest.raises(UnsupportedModelError, match="no second derivative"):
        HessianOperator(loss, [scores]).matvec(torch.ones(24))


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
    with pytest.raises(UnsupportedModelError, match="SquaredBackward"):
        HessianOperator(Squared.apply(weight).sum() + other.pow(4).sum(), [weight, other])
    with pytest.raises(UnsupportedModelError, match=r"not the change of the gradient.*SquaredBackward"):
        HessianOperator(lambda: Squared.apply(2 * weight).sum() + other.pow(4).sum(), [weight, other])
