"""Models as chains of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from telltale.errors import DataError, PlanError, UnsupportedModelError
from telltale.train.pipeline.layers import Layer, LayeredModel, as_layered, as_values, pair, sequential
from train.pipeline.chain_runs import run_chain
from train.pipeline.pipeline_models import batch, build, loss


@pytest.mark.parametrize("name", ["mixed", "several", "tied", "frozen"])
def test_a_sequential_model_as_a_chain(name: str) -> None:
    net = build(name).eval()
    model = sequential(net, loss)
    values = batch(0)[0]
    for module in net:
        values = module(*values) if isinstance(values, tuple) else module(values)
    found, value = run_chain(model, batch(0))
    assert torch.equal(found[0], values)
    assert value == loss(values, batch(0)[1])
    assert [layer.name for layer in model.layers] == [str(index) for index in range(len(net))]


def test_parameter_names_and_shared_parameters() -> None:
    model = sequential(build("tied"), loss)
    assert model.shared_parameters() == {"0.weight": (0, 5)}
    assert list(model.parameter_names(0, 1)) == ["0.weight", "0.bias"]
    assert list(model.parameter_names(5, 6)) == ["0.weight", "5.bias"]
    assert sequential(build("mixed"), loss).shared_parameters() == {}


def test_the_fingerprint_is_of_names_and_shapes() -> None:
    one = sequential(build("mixed"), loss).fingerprint
    assert one == sequential(build("mixed", seed=1), loss).fingerprint
    assert one != sequential(build("tied"), loss).fingerprint
    wider = build("mixed")
    wider[7] = nn.Linear(16, 5)
    assert one != sequential(wider, loss).fingerprint


def test_models_that_are_no_chain() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a non-empty nn.Sequential"):
        sequential(nn.Linear(2, 2), loss)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Sequential is not a non-empty"):
        sequential(nn.Sequential(), loss)
    with pytest.raises(PlanError, match="the model is Linear; expected a LayeredModel"):
        as_layered(nn.Linear(2, 2), loss)
    model = sequential(build("mixed"), loss)
    assert as_layered(model, None) is model


def test_every_parameter_is_in_a_layer() -> None:
    net = build("mixed")
    whole = sequential(net, loss)
    with pytest.raises(
        UnsupportedModelError, match=r"parameters \['7\.weight', '7\.bias'\] of the model are in no layer"
    ):
        LayeredModel(net, whole.layers[:-1], whole.inputs, whole.loss)
    foreign = Layer("foreign", nn.Linear(2, 2), whole.layers[0].call)
    with pytest.raises(UnsupportedModelError, match="layers hold foreign parameters"):
        LayeredModel(net, (*whole.layers, foreign), whole.inputs, whole.loss)
    with pytest.raises(UnsupportedModelError, match="the model has no layers"):
        LayeredModel(net, (), whole.inputs, whole.loss)


def test_values_and_minibatches() -> None:
    x = torch.ones(2)
    assert as_values(x) == (x,)
    assert as_values((x, x)) == (x, x)
    with pytest.raises(DataError, match="a layer handed on a dict; expected a tensor or a tuple of tensors"):
        as_values({"x": x})
    with pytest.raises(DataError, match="a layer handed on a int"):
        as_values((x, 3))
    assert pair([1, 2]) == (1, 2)
    with pytest.raises(DataError, match="a minibatch is dict; expected a pair"):
        pair({"inputs": x})
