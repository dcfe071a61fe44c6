"""Modules cut by torch.export: the same loss and gradients as unsplit, or a refusal that says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from telltale.errors import DataError, UnsupportedModelError
from telltale.train.pipeline import Plan, reference
from telltale.train.pipeline.exported_module import exported
from telltale.train.pipeline.layers import LayeredModel
from telltale.train.pipeline.split import split
from train.pipeline.chain_runs import Gradients, assert_same, gradients_of, run_chain, run_cut


class Residual(nn.Module):
    """Convolutions with a skip over two of them, activations in place, layer norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4 * 5 * 5)
        self.activation = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 5 * 5, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.activation(self.first(images))
        hidden = hidden + self.third(torch.tanh(self.second(hidden)))
        return self.head(self.dropout(self.norm(hidden.flatten(1)) * self.scale))


class Branches(nn.Module):
    """Two inputs, two branches that meet, the first input read again at the end, three outputs, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(4, 8)
        self.deep = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.out = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, wide: Tensor, narrow: Tensor) -> dict[str, Any]:
        left = torch.tanh(self.left(wide))
        right = self.right(narrow)
        joined = self.deep(left) * right
        joined = self.out(joined) + nn.functional.linear(joined, self.deep[0].weight)
        with torch.no_grad():
            size = joined.abs().mean()
        return {"y": joined + wide.mean(), "left": left, "size": size, "none": None}


def residual_case() -> tuple[nn.Module, Any, Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    return Residual().train(), (torch.randn(4, 2, 5, 5), torch.tensor([0, 2, 1, 1])), nn.functional.cross_entropy


def branches_case() -> tuple[nn.Module, Any, Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)

    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        assert output["none"] is None
        return (output["y"] - target).square().mean() + output["left"].mean() / (1 + output["size"])

    return Branches().train(), ((torch.randn(5, 6), torch.randn(5, 4)), torch.randn(5, 8)), loss


def attention_case() -> tuple[nn.Module, Any, Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 2)
    return model.train(), (torch.randn(3, 5, 8), torch.randn(3, 5, 8)), nn.functional.mse_loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0])


def recurrent_case() -> tuple[nn.Module, Any, Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    return Recurrent().train(), (torch.randn(3, 5, 4), torch.randn(3, 5, 2)), nn.functional.mse_loss


CASES = {"residual": residual_case, "branches": branches_case, "attention": attention_case, "recurrent": recurrent_case}


def unsplit(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]) -> tuple[Tensor, Gradients]:
    inputs = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
    torch.manual_seed(3)
    result = loss(model(*inputs), batch[1])
    result.backward()
    return result.detach(), gradients_of(model)


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_the_unsplit_module(case: str) -> None:
    model, batch, loss = CASES[case]()
    chain = split(model, loss=loss, example=batch)
    wanted, gradients = unsplit(model, batch, loss)
    torch.manual_seed(3)
    given = run_chain(chain, batch)[1]
    given.backward()
    assert torch.equal(given, wanted)
    assert_same(gradients_of(model), gradients)
    torch.manual_seed(3)
    given, cut_gradients, _ = run_cut(chain, batch)
    assert torch.equal(given, wanted)
    assert_same(cut_gradients, gradients)


@pytest.mark.parametrize("case", list(CASES))
def test_dropout_follows_the_pieces_train_flag(case: str) -> None:
    model, batch, loss = CASES[case]()
    chain = split(model, loss=loss, example=batch)
    random = run_chain(chain, batch)[1]
    for layer in chain.layers:
        layer.module.eval()
    model.eval()
    wanted, gradients = unsplit(model, batch, loss)
    given = run_chain(chain, batch)[1]
    given.backward()
    assert torch.equal(given, wanted)
    assert_same(gradients_of(model), gradients)
    assert torch.equal(random, given) == (case == "branches")


def test_layers_are_named_after_modules_and_skips_cross_as_extra_values() -> None:
    model, batch, loss = residual_case()
    chain = split(model, loss=loss, example=batch)
    assert [layer.name for layer in chain.layers] == ["first", "second", "third", "norm", "head"]
    assert run_cut(chain, batch)[2] == [1, 2, 1, 1]
    names = [[name for name, _ in layer.module.named_parameters()] for layer in chain.layers]
    assert names == [[f"{layer.name}.weight", f"{layer.name}.bias"] for layer in chain.layers]
    for name, parameter in model.named_parameters():
        assert any(parameter is own for layer in chain.layers for own in layer.module.parameters()), name


class Awkward(nn.Module):
    """The cheapest cuts would hand on a tensor that is written to later, and one that lies transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(24, 4)
        self.third = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        wide = hidden.repeat(1, 4)
        hidden.view(-1).relu_()
        hidden = self.second(wide) + hidden.sum()
        return self.third(hidden.transpose(0, 1)[:, :5])


def test_no_cut_before_a_write_in_place_nor_at_a_transposed_tensor() -> None:
    torch.manual_seed(0)
    model, batch = Awkward().train(), (torch.randn(5, 4), torch.randn(4, 3))
    chain = split(model, loss=nn.functional.mse_loss, example=batch)
    wanted, gradients = unsplit(model, batch, nn.functional.mse_loss)
    given, cut_gradients, crossed = run_cut(chain, batch)
    assert torch.equal(given, wanted)
    assert_same(cut_gradients, gradients)
    assert crossed == [2, 1]
    values = chain.inputs(batch)
    for layer in chain.layers[:-1]:
        values = layer.call(values, batch, 0)
        assert all(value.is_contiguous() for value in values)


class DrawsInVain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        nn.functional.dropout(x, 0.5, self.training)
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


def test_random_numbers_that_nobody_reads_are_drawn_all_the_same() -> None:
    torch.manual_seed(0)
    model, batch = DrawsInVain().train(), (torch.randn(5, 4), torch.randn(5, 4))
    chain = split(model, loss=nn.functional.mse_loss, example=batch)
    wanted, gradients = unsplit(model, batch, nn.functional.mse_loss)
    torch.manual_seed(3)
    given, cut_gradients, _ = run_cut(chain, batch)
    assert torch.equal(given, wanted)
    assert_same(cut_gradients, gradients)


def test_module_inputs_are_never_sent() -> None:
    model, batch, loss = branches_case()
    chain = split(model, loss=loss, example=batch)
    wide = batch[0][0]
    values = chain.inputs(batch)
    for layer in chain.layers:
        values = layer.call(values, batch, 0)
        assert not any(value.shape == wide.shape and torch.equal(value, wide) for value in values)
    assert "deep.0.weight" in chain.shared_parameters()
    assert any(own is model.unused.weight for own in chain.layers[-1].module.parameters())


def test_weights_put_in_place_by_functional_call_are_read() -> None:
    model, batch, loss = residual_case()
    chain = split(model.eval(), loss=loss, example=batch)
    assert not any(layer.module.training for layer in chain.layers)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layer.module for layer in chain.layers)

        def forward(self) -> Tensor:
            return run_chain(chain, batch)[1]

    whole = Whole()
    doubled = {name: 2 * value.detach() for name, value in whole.named_parameters()}
    given = functional_call(whole, doubled, ())
    wanted = loss(
        functional_call(model, {n: 2 * p.detach() for n, p in model.named_parameters()}, (batch[0],)), batch[1]
    )
    assert torch.equal(given, wanted)


def test_splitting_leaves_the_module_as_it_was() -> None:
    model, batch, loss = residual_case()
    model.eval()
    model.dropout.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    split(model, loss=loss, example=batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, part in model.named_modules() if part.training] == ["dropout"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_norm_that_moves_buffers_is_refused_by_name_unless_it_is_a_batch_norm() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    for norm in (Activated(4), nn.InstanceNorm2d(4, track_running_stats=True)):
        model = nn.ModuleDict({"body": nn.Conv2d(2, 4, 3), "norm": norm}).train()
        model.forward = lambda x, model=model: model["norm"](model["body"](x)).mean((2, 3))
        with pytest.raises(UnsupportedModelError, match=f"norm is a {type(norm).__name__} in train mode"):
            exported(model, (torch.randn(4, 2, 5, 5), torch.tensor([0, 2, 1, 1])), loss=nn.functional.cross_entropy)


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Conv2d(2, 4, 3), "norm": nn.BatchNorm2d(4)}).train()
    model.forward = lambda x: model["norm"](model["body"](x)).mean((2, 3))
    batch = (torch.randn(4, 2, 5, 5), torch.tensor([0, 2, 1, 1]))
    model["norm"].eval()
    chain = exported(model, batch, loss=nn.functional.cross_entropy)
    wanted, gradients = unsplit(model, batch, nn.functional.cross_entropy)
    given, cut_gradients, _ = run_cut(chain, batch)
    assert torch.equal(given, wanted)
    assert_same(cut_gradients, gradients)


class _Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))


class DataDependent(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Counting(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) * self.count


class AveragesStatistics(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.count.repeat(4), torch.ones(4)
        return nn.functional.batch_norm(self.linear(x), mean, self.statistics, training=True) + variance

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.ones(4))


class WritesToItsInput(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class CustomBackward(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        return _Rounded.apply(self.linear(x))


class OtherInEvalMode(_Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.training else self.linear(2 * x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DataDependent, "cannot trace DataDependent"),
        (Counting, "buffer count"),
        (AveragesStatistics, "buffer statistics"),
        (WritesToItsInput, "its input"),
        (CustomBackward, "gradient of linear.weight"),
        (OtherInEvalMode, "more in train mode than dropout"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(kind: type[nn.Module], said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        split(kind().train(), loss=nn.functional.mse_loss, example=(torch.randn(3, 4), torch.randn(3, 4)))
    assert "\n" not in str(caught.value)


def test_minibatches_of_another_form_are_refused() -> None:
    model, batch, loss = residual_case()
    chain: LayeredModel = split(model, loss=loss, example=batch)
    with pytest.raises(DataError, match=r"\(4, 2, 5, 4\) float32.*any number of rows.*\(4, 2, 5, 5\) float32"):
        run_chain(chain, (batch[0][..., :4], batch[1]))
    with pytest.raises(DataError, match=r"\(0, 2, 5, 5\) float32"):
        run_chain(chain, (batch[0][:0], batch[1][:0]))
    with pytest.raises(DataError, match="float64"):
        run_chain(chain, (batch[0].double(), batch[1]))
    with pytest.raises(DataError, match=r"pair \(inputs, targets\)"):
        split(model, loss=loss, example=batch[0])
    with pytest.raises(DataError, match="expected a tensor or a tuple of tensors"):
        split(model, loss=loss, example=({"x": batch[0]}, batch[1]))


class Flattening(nn.Module):
    """Residual, with batch norm; asks for the number of rows in the middle and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.head = nn.Linear(4 * 9, 4 * 9), nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x = x + self.inner(x.view(x.shape[0], -1)).view(x.shape[0], 4, 3, 3)
        return self.head(x.reshape(x.shape[0], 36)) + torch.ones(x.size(0), 5)


def test_a_smaller_last_minibatch_trains_as_the_module_does() -> None:
    def batch(t: int) -> tuple[Tensor, Tensor]:
        generator, rows = torch.Generator().manual_seed(t), (4, 4, 4, 1)[t]
        return torch.randn(rows, 2, 3, 3, generator=generator), torch.randint(0, 5, (rows,), generator=generator)

    torch.manual_seed(0)
    net = Flattening()
    plain, ce = copy.deepcopy(net), nn.functional.cross_entropy
    chain = split(net, loss=ce, example=batch(0))
    assert len(chain.layers) == 4
    plan = Plan.even(4, 4, policy="flush", microbatches=2)
    reference.train(chain, plan, batch, optimizer=lambda named: torch.optim.SGD(named, lr=0.1), stop=4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for first in (0, 2):
        both = [batch(first), batch(first + 1)]
        rows = sum(len(targets) for _, targets in both)
        for images, targets in both:
            (ce(plain(images), targets) * (len(targets) / rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(net.state_dict()[key], tensor, atol=1e-7), key


class ManyRowsCentred(nn.Module):
    """Another way for few rows: a chain that was exported for many must not be used for them."""

    def __init__(self, above: int) -> None:
        super().__init__()
        self.above = above
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, values: Tensor) -> Tensor:
        out = self.layers(values)
        return out - out.mean(0) if values.shape[0] > self.above else out


@pytest.mark.parametrize("above", [1, 3])
def test_rows_for_which_the_module_takes_another_way_are_refused(above: int) -> None:
    model = ManyRowsCentred(above)
    chain = exported(model, (torch.randn(6, 4), torch.zeros(6, 3)), loss=nn.functional.mse_loss)
    for rows in (4, 6):
        batch = torch.randn(rows, 4), torch.randn(rows, 3)
        assert torch.allclose(run_chain(chain, batch)[1], nn.functional.mse_loss(model(batch[0]), batch[1]))
    with pytest.raises(DataError, match=r"one row|another way"):
        chain.inputs((torch.randn(above, 4), torch.randn(above, 3)))


class ByRows(ManyRowsCentred):
    """Python arithmetic on the number of rows, which torch.export compiles in."""

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values) * (2 if len(values) % 2 == 0 else 1)


def test_a_module_that_is_only_for_the_examples_rows_is_cut_for_those() -> None:
    model, example = ByRows(0), (torch.randn(6, 4), torch.zeros(6, 3))
    chain = exported(model, example, loss=nn.functional.mse_loss)
    assert torch.allclose(run_chain(chain, example)[1], nn.functional.mse_loss(model(example[0]), example[1]))
    assert not hasattr(example[0], "_dynamo_dynamic_indices")  # the marks that an export leaves
    with pytest.raises(DataError, match="expected those of the example"):
        chain.inputs((torch.randn(5, 4), torch.randn(5, 3)))
