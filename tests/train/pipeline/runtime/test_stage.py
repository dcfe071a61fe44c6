"""A stage under a given version: what is in place in the forward and in the backward, and where random numbers come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from telltale.errors import DataError
from telltale.train.pipeline.layers import LayeredModel, sequential
from telltale.train.pipeline.runtime.stage import Stage
from train.pipeline.pipeline_models import batch, build, loss


def layered(net: nn.Sequential) -> LayeredModel:
    return sequential(net, loss)


def old_weights(stage: Stage, factor: float) -> dict[str, Tensor]:
    return {name: (p.detach() * factor).requires_grad_() for name, p in stage.named_parameters()}


def gradients(net: nn.Sequential, *, recompute: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of an old version (the half of the live weights), and of the input, while the live weights are NaN."""
    stage = Stage(layered(net), 0, len(net), recompute=recompute)
    weights = old_weights(stage, 0.5)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(float("nan"))
    inputs = batch(0)[0].requires_grad_()
    outputs = stage.run_forward(weights, (inputs,), batch(0), 0)
    stage.run_backward(weights, outputs, [torch.ones(())])
    return {stage.names[name]: weight.grad for name, weight in weights.items()}, inputs.grad


@pytest.mark.parametrize("name", ["mixed", "checkpointed", "tied"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_sees_the_version_of_the_forward(name: str, recompute: bool) -> None:
    """The live weights are NaN all the while: nothing may read them, no user's checkpoint and no recomputation of ours."""
    net = build(name)
    found, at_input = gradients(net, recompute=recompute)
    plain = build(name)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)
    stage = Stage(layered(plain), 0, len(plain))
    inputs = batch(0)[0].requires_grad_()
    stage((inputs,), batch(0), 0)[0].backward()
    assert torch.equal(at_input, inputs.grad)
    for parameter_name, parameter in plain.named_parameters():
        assert torch.equal(found[parameter_name], parameter.grad), parameter_name


def test_checkpointing_under_functional_call_alone_would_read_the_live_weights() -> None:
    """Why the backward runs with the version in place: the recomputation happens after the call has put the live ones back."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: torch.tanh(x * self.gain), x, use_reentrant=False)

    module, x = Gain(), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    old = {"gain": torch.full((3,), 0.5, requires_grad=True)}
    (wanted,) = torch.autograd.grad(torch.tanh(x * old["gain"]).sum(), x)
    torch.func.functional_call(module, old, x).sum().backward()
    assert not torch.allclose(x.grad, wanted)


def test_parameters_are_back_in_place_also_after_an_error() -> None:
    net = build("mixed")
    stage = Stage(layered(net), 0, 8)
    own = list(net.parameters())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stage.run_forward(old_weights(stage, 0.5), (torch.ones(2, 3),), batch(0), 0)
    assert all(a is b for a, b in zip(net.parameters(), own, strict=True))


def test_a_tied_weight_is_swapped_at_both_its_places() -> None:
    net = build("tied")
    stage = Stage(layered(net), 0, 6)
    weights = old_weights(stage, 0.5)
    with stage.holding(weights):
        assert net[0].weight is net[5].weight is weights["layers.0.weight"]
    assert stage.names["layers.0.weight"] == "0.weight"
    assert "layers.5.weight" not in stage.names


def test_dropout_does_not_depend_on_the_cut_or_the_order() -> None:
    net = build("mixed")
    inputs = batch(3)[0]
    whole = Stage(layered(net), 0, 8, seed=5)
    value = whole((inputs,), batch(3), 3)[0]
    for cut in range(1, 8):
        torch.manual_seed(cut)
        first, second = Stage(layered(net), 0, cut, seed=5), Stage(layered(net), cut, 8, seed=5)
        second.train()
        first((inputs,), batch(2), 2)
        assert torch.equal(second(first((inputs,), batch(3), 3), batch(3), 3)[0], value)
    assert not torch.equal(whole((inputs,), batch(3), 4)[0], value), "another minibatch, another mask"
    assert not torch.equal(Stage(layered(net), 0, 8, seed=6)((inputs,), batch(3), 3)[0], value), "another seed"


def test_the_callers_random_numbers_are_left_alone() -> None:
    stage = Stage(layered(build("mixed")), 0, 8)
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    stage((batch(0)[0],), batch(0), 0)
    assert torch.equal(torch.rand(3), wanted)


def test_the_ends() -> None:
    model = layered(build("mixed"))
    first, last = Stage(model, 0, 3), Stage(model, 3, 8)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert set(first.names.values()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert not [name for name, _ in first.named_parameters() if name.startswith("model")]


def test_a_loss_per_row_is_refused() -> None:
    rows = sequential(build("mixed"), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(DataError, match=r"the loss has shape \(6,\); expected a scalar"):
        Stage(rows, 0, 8)((batch(0)[0],), batch(0), 0)
