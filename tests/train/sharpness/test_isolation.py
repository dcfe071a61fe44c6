"""What a model, a loss or a loop may have around them: the probe reads the same Hessian, and none of it is moved."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.signals.hessian import materialise
from telltale.train.sharpness import Probe, SharpnessMonitor, measure
from telltale.train.sharpness.isolation import on_device


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, 3))


def hessian(model: nn.Module, loss: Any = loss_of, data: Any = None, mode: str = "as is") -> Tensor:
    return materialise(Probe(model, loss, [batch() if data is None else data], mode=mode).operator())


class Checkpointed(nn.Module):
    """A block in the middle whose activations are computed anew in every backward pass, or kept."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.anew = nn.Linear(4, 6), nn.Linear(6, 3), anew
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        hidden = checkpoint(self.block, hidden, use_reentrant=False) if self.anew else self.block(hidden)
        return self.last(hidden)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["no dropout", "eval", "train"])
def test_what_checkpointing_computes_anew_is_quiet_as_well(mode: str) -> None:
    model = Checkpointed(True)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = hessian(model, mode=mode)
    # Kept second derivatives of GELU round differently from PyTorch's.
    assert torch.allclose(found, hessian(Checkpointed(False), mode=mode), atol=1e-5)
    assert float(found.abs().max()) > 0.01
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.long
def test_training_with_checkpointing_is_the_same_with_and_without_a_monitor() -> None:
    def trained(watched: bool) -> list[Tensor]:
        model = Checkpointed(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        monitor = None
        if watched:
            monitor = SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, every=2, budget=1.0, sd_every=5)
        for step in range(12):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
        assert monitor is None or len(monitor.dimensions) == 2
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(one, other) for one, other in zip(trained(True), trained(False), strict=True))


def test_autocast_stays_off_where_the_model_or_the_loss_switches_it_on() -> None:
    model = network()
    expected = hessian(model)

    def mixed_loss(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(module(data[0]).float(), data[1])

    assert torch.equal(hessian(model, mixed_loss), expected)
    # As Accelerate prepares a model: one context, entered again at every call.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    model.forward = autocast(model.forward)  # type: ignore[method-assign]
    assert torch.equal(hessian(model, lambda m, b: functional.cross_entropy(m(b[0]).float(), b[1])), expected)
    assert model(batch()[0]).dtype == torch.bfloat16, "and it is back afterwards"


def test_hooks_on_parameters_neither_see_nor_change_the_probe() -> None:
    model, seen = network(), []
    expected = hessian(model)

    def clip(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient.clamp(-1e-3, 1e-3)

    handles = [parameter.register_hook(clip) for parameter in model.parameters()]
    parameters = list(model.parameters())
    assert torch.equal(hessian(model), expected)
    assert not seen
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    loss_of(model, batch()).backward()
    assert len(seen) == len(handles), "training's own gradients still pass them"


def test_a_compiled_loss_runs_eagerly() -> None:
    model = network()
    compiled = torch.compile(loss_of, backend="aot_eager")
    compiled(model, batch())
    assert torch.equal(hessian(model, compiled), hessian(model))


def test_a_loss_that_reads_half_precision_parameters_past_its_argument_is_refused() -> None:
    model = network().bfloat16()
    held = list(model.parameters())

    def decayed(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(module, data) + sum(parameter.float().square().sum() for parameter in held)

    with pytest.raises(DataError, match="4 parameters past the model"):
        Probe(model, decayed, [batch()])


def test_without_dropout_batch_norm_stays_as_training_has_it() -> None:
    model = network(nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))
    without = network(nn.BatchNorm1d(6), nn.Tanh())
    assert torch.equal(hessian(model, mode="no dropout"), hessian(without, mode="train"))
    model[1].eval()
    assert torch.equal(hessian(model, mode="no dropout"), hessian(model, mode="eval"))
    assert [module.training for module in model] == [True, False, True, True, True]


@pytest.mark.long
def test_a_monitor_reads_the_edge_of_batch_norm_as_it_trains() -> None:
    """With running statistics the bias before a norm has curvature and no gradient: under Adam that reads as thousands."""
    model = network(nn.BatchNorm1d(6), nn.Tanh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitors = {
        mode: SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, mode=mode, steps=12, every=1, budget=1.0)
        for mode in ("no dropout", "train", "eval")
    }
    default = SharpnessMonitor(model, loss_of, [batch()], optimizer=optimizer, steps=12, every=1, budget=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
        ratios = {mode: monitor.check().ratio for mode, monitor in monitors.items()}
        assert default.check().ratio == ratios["no dropout"] == ratios["train"]
    assert ratios["train"] < 1
    assert ratios["eval"] > 100


def test_synchronised_batch_norm_does_not_wait_for_other_processes() -> None:
    model = network(nn.SyncBatchNorm(6), nn.Tanh())
    assert torch.equal(hessian(model), hessian(network(nn.BatchNorm1d(6), nn.Tanh())))
    assert type(model[1]) is nn.SyncBatchNorm


Pair = namedtuple("Pair", ["inputs", "targets"])


def test_minibatches_keep_their_kind() -> None:
    inputs, targets = batch()
    model = network()
    expected = hessian(model)
    by_attribute = lambda m, b: functional.cross_entropy(m(b.inputs), b.targets)  # noqa: E731
    assert torch.equal(hessian(model, by_attribute, BatchEncoding({"inputs": inputs, "targets": targets})), expected)
    assert torch.equal(hessian(model, by_attribute, Pair(inputs, targets)), expected)
    halves = network().bfloat16()
    half = hessian(halves, by_attribute, Pair(inputs.bfloat16(), targets))
    assert torch.equal(
        half, hessian(halves, by_attribute, BatchEncoding({"inputs": inputs.bfloat16(), "targets": targets}))
    )


def test_minibatches_follow_the_model_to_its_device() -> None:
    given = [Pair(*batch()), {"ids": [torch.ones(2), "name"]}]
    moved = on_device(given, torch.device("meta"))
    assert moved[0].inputs.device.type == moved[1]["ids"][0].device.type == "meta"
    assert moved[1]["ids"][1] == "name"
    assert on_device(given, torch.device("cpu")) is given


def test_what_has_no_second_derivative_is_refused_by_a_measurement() -> None:
    def connectionist(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        scores = module(data[0])[:8, None].log_softmax(-1)
        return functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))

    with pytest.raises(UnsupportedModelError, match="no second derivative"):
        measure(network(), connectionist, [batch()], rate=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, loss_of, [batch()]), "model is int"),
        ((network(), "cross-entropy", [batch()]), "loss_fn is 'cross-entropy'"),
        ((network(), loss_of, None), "probe is NoneType"),
    ],
)
def test_what_is_no_model_loss_or_probe_is_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Probe(*arguments)
