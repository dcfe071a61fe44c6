"""A small VGG and a small ResNet with batch norm and activations in place, and what ranks do with them."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from telltale.train.pipeline.layers import LayeredModel
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.split import split
from telltale.train.pipeline.trainer import PipelineTrainer

STOP = 7
"""Minibatches: not a whole number of rounds of two or three, nor of batches of four."""


class Residual(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs, momentum=None)
        self.around = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.first_norm(self.first(x)))
        return self.activation(self.second_norm(self.second(y)) + self.around(x))


class SmallResNet(nn.Module):
    """Stem, two residual blocks, mean over positions, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Residual(6, 6), Residual(6, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def small_vgg() -> nn.Sequential:
    """Convolution, norm and activation in place, twice; dropout; linear."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 9, 5),
    )


CUTS = {
    "vgg": ((0, 1), (2, 3, 4, 5), (6, 7, 8, 9)),
    "resnet": None,
}
"""Stages; the VGG's second and third begin with an activation in place. None: even ones."""


def batch(t: int) -> tuple[Tensor, Tensor]:
    """Images (4, 3, 6, 6), some left without a label; the ResNet's graph has no place for other sizes."""
    generator = torch.Generator().manual_seed(t)
    images, labels = torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 5, (4,), generator=generator)
    labels[: t % 3] = -100
    return images + t / 10, labels


def layered(name: str) -> LayeredModel:
    """The model as it begins. Exported once a process; what an earlier training left in it is put back."""
    model, initial = _exported(name)
    model.root.load_state_dict(initial)
    for parameter in model.root.parameters():
        parameter.grad = None
    return model


@lru_cache
def _exported(name: str) -> tuple[LayeredModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = SmallResNet() if name == "resnet" else small_vgg()
    if name == "vgg in channels-last":
        net = net.to(memory_format=torch.channels_last)
    model = split(net, loss=nn.functional.cross_entropy, example=batch(0))
    return model, {key: value.clone() for key, value in model.root.state_dict().items()}


def plan_of(name: str, layers: int, replicas: tuple[int, ...], policy: str, *, recompute: bool) -> Plan:
    """Stages of ``name`` for as many ranks as ``replicas`` add up to, with 2 minibatches an update where the policy has batches."""
    name = name.partition(" ")[0]
    cuts: Any = CUTS[name]
    if len(replicas) == 1:
        cuts = (tuple(range(layers)),)
    elif len(replicas) == 2:
        middle = 2 if name == "vgg" else layers // 2
        cuts = (tuple(range(middle)), tuple(range(middle, layers)))
    elif cuts is None:
        bounds = [0, layers // 3, 2 * layers // 3, layers]
        cuts = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))
    batched = policy in ("2bw", "flush", "gpipe", "vertical")
    return Plan.manual(
        cuts,
        replicas=replicas,
        policy=policy,
        microbatches=4 if batched and policy != "vertical" else 1,
        recompute=recompute,
    )


def _settings() -> dict[str, Any]:
    return {"optimizer": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.5), "seed": 3}


def reference_of(
    name: str, replicas: tuple[int, ...], policy: str, *, recompute: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the model's weights and buffers afterwards."""
    model = layered(name)
    plan = plan_of(name, len(model.layers), replicas, policy, recompute=recompute)
    losses = Reference(model, plan, **_settings()).run(batch, stop=STOP).losses
    return losses, {key: value.clone() for key, value in model.root.state_dict().items()}


def train(
    rank: int, configurations: list[tuple[Any, ...]], folder: str
) -> list[tuple[list[float], dict[str, Tensor], float]]:
    """Per configuration: losses, weights and buffers of this rank's stage, an evaluation; the export goes to ``folder``."""
    results = []
    for number, (name, replicas, policy, recompute) in enumerate(configurations):
        model = layered(name)
        plan = plan_of(name, len(model.layers), replicas, policy, recompute=recompute)
        trainer = PipelineTrainer(model, plan, reduction="ordered", timeout=30, **_settings())
        losses = trainer.train(batch, stop=STOP)
        names = {id(tensor): key for key, tensor in model.root.state_dict(keep_vars=True).items()}
        state = {
            names[id(tensor)]: tensor.detach().clone()
            for tensor in (*trainer.stage.parameters(), *trainer.stage.buffers())
        }
        evaluated = trainer.evaluate(batch, 5)
        trainer.export(f"{folder}/{number}.safetensors")
        results.append((losses, state, evaluated))
    return results
