"""Convolutional networks with batch norm, activations in place and residuals: every policy gives the bits of one process, the
running statistics included, and so does what is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from telltale.errors import UnsupportedModelError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.profiler import profile
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.split import split
from telltale.train.pipeline.trainer import PipelineTrainer
from train.pipeline import convolution_runs as runs
from train.pipeline.rank_runs import run_ranks, values

POLICIES = ("stash", "vertical", "2bw", "flush", "gpipe", "none")
SHAPES = ((1, 1, 1), (2, 1), (1, 2), (3,))
CONFIGURATIONS = [
    (name, shape, policy, policy == "flush" and name == "vgg")
    for name in ("vgg", "resnet")
    for shape in SHAPES
    for policy in POLICIES
    if (name == "vgg" and shape in ((1, 1, 1), (2, 1))) or policy in ("stash", "flush", "2bw")
] + [("vgg in channels-last", (1, 1, 1), "2bw", False), ("vgg in channels-last", (2, 1), "flush", False)]


@pytest.mark.long
def test_ranks_reference_and_export_agree_to_the_bit(tmp_path: Path) -> None:
    found = values(run_ranks(runs.train, 3, CONFIGURATIONS, str(tmp_path)))
    for number, (name, shape, policy, recompute) in enumerate(CONFIGURATIONS):
        losses, state = runs.reference_of(name, shape, policy, recompute=recompute)
        exported = load_file(tmp_path / f"{number}.safetensors")
        seen: set[str] = set()
        for results in found:
            own_losses, own, evaluated = results[number]
            assert own_losses == losses, (name, shape, policy)
            assert evaluated == found[0][number][2]
            for key, tensor in own.items():
                assert torch.equal(tensor, state[key]), (name, shape, policy, key)
            seen |= own.keys()
        assert seen == state.keys() == exported.keys()
        for key, tensor in exported.items():
            assert torch.equal(tensor, state[key]), (name, shape, policy, key)
        assert int(state[next(key for key in state if "num_batches" in key)]) == runs.STOP


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_the_reference_is_plain_training(name: str, request: pytest.FixtureRequest) -> None:
    """Batches of two minibatches with unequal numbers of labels: torch's own loop over the sum of both losses."""
    model = runs.layered(name)
    if name == "vgg":
        model.root[8].p = 0.0
        request.addfinalizer(lambda: setattr(model.root[8], "p", 0.2))
    plan = Plan.even(len(model.layers), 3, policy="flush", microbatches=2)
    factory = lambda named: torch.optim.SGD(named, lr=0.05)  # noqa: E731
    Reference(model, plan, optimizer=factory).run(runs.batch, stop=6)
    torch.manual_seed(0)
    net = runs.small_vgg() if name == "vgg" else runs.SmallResNet()
    if name == "vgg":
        net[8].p = 0.0
    optimizer = factory(net.parameters())
    for first in (0, 2, 4):
        images, labels = zip(*(runs.batch(t) for t in (first, first + 1)), strict=True)
        terms = float((torch.cat(labels) != -100).sum())
        for x, y in zip(images, labels, strict=True):
            (nn.functional.cross_entropy(net(x), y, reduction="sum") / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in net.state_dict().items():
        assert torch.allclose(model.root.state_dict()[key].float(), tensor.float(), rtol=1e-5, atol=1e-6), key


def test_profiling_leaves_statistics_and_minibatch_alone() -> None:
    net, example = nn.Sequential(nn.ReLU(inplace=True), *runs.small_vgg()), runs.batch(0)
    before, images = {k: v.clone() for k, v in net.state_dict().items()}, example[0].clone()
    found = profile(split(net, loss=nn.functional.cross_entropy), example, repeats=2, warm_up=1)
    assert len(found.layers) == 11
    assert torch.equal(example[0], images)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_recomputation_reads_the_buffers_of_its_forward() -> None:
    """A layer whose output depends on its buffer: the second forward must see the first one's."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1.0
            return x * self.weight * self.calls.clone()

    def run(recompute: bool) -> tuple[float, torch.Tensor]:
        net = nn.Sequential(Counting(), nn.Linear(4, 3))
        torch.manual_seed(1)
        nn.init.normal_(net[1].weight)
        nn.init.zeros_(net[1].bias)
        trainer = PipelineTrainer(
            net,
            Plan.manual([[0, 1]], policy="gpipe", microbatches=3, recompute=recompute),
            optimizer=lambda named: torch.optim.SGD(named, lr=0.01),
            loss=nn.functional.cross_entropy,
        )
        trainer.train(lambda t: (torch.full((2, 4), 0.1 * t), torch.tensor([0, 2])), stop=6)
        return float(net[0].calls), net[0].weight.detach().clone()

    (calls, weight), (calls_again, weight_again) = run(False), run(True)
    assert calls == calls_again == 6
    assert torch.equal(weight, weight_again)


def test_a_norm_that_runs_twice_is_refused_by_the_exporter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(self.norm(x))).mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match="norm runs more than once"):
        split(Twice(), loss=nn.functional.cross_entropy, example=runs.batch(0))
