"""Weight versions as storage: what is alive, that an old one stays as it was, and that memory does not grow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from telltale.errors import CheckpointError
from telltale.train.pipeline.runtime.stage import WeightVersions
from telltale.train.pipeline.schedule import Policy


def counted(policy: Policy, stage: int, *, frozen: bool = False) -> tuple[nn.Linear, WeightVersions]:
    """A layer whose weights are zero at version 0 and count the updates."""
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.bias.requires_grad_(not frozen)
    return layer, WeightVersions(layer, policy, stage)


def add_one(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


@pytest.mark.parametrize(
    ("policy", "stage", "alive"),
    [
        (Policy("stash", (1, 1, 1)), 0, [3, 4, 5]),
        (Policy("stash", (1, 1, 1)), 2, [5]),
        (Policy("vertical", (1, 1, 1)), 2, [3, 4, 5]),
        (Policy("2bw", (1, 1, 1), 2), 1, [4, 5]),
        (Policy("flush", (1, 1, 1), 2), 0, [5]),
        (Policy("none", (1, 1, 1)), 0, [5]),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else "",
)
def test_what_is_alive_after_five_updates(policy: Policy, stage: int, alive: list[int]) -> None:
    layer, versions = counted(policy, stage)
    storages = set()
    for _ in range(5):
        versions.advance(lambda: add_one(layer))
        storages.add(layer.weight.data_ptr())
    assert versions.alive == alive
    assert versions.current == 5
    for number in alive:
        assert torch.equal(versions.at(number)["weight"], torch.full((2, 2), float(number)))
    assert len(storages) <= policy.versions_held(stage) + 1
    assert versions.at(5)["weight"].data_ptr() == layer.weight.data_ptr()


def test_an_old_version_keeps_its_values_while_a_graph_holds_it() -> None:
    layer, versions = counted(Policy("stash", (1, 1)), 0)
    old = versions.at(0)
    outputs = torch.func.functional_call(layer, old, torch.ones(1, 2, requires_grad=True))
    versions.advance(lambda: add_one(layer))
    outputs.sum().backward()
    assert torch.equal(old["weight"], torch.zeros(2, 2))
    assert torch.equal(old["weight"].grad, torch.ones(2, 2))
    assert layer.weight.grad is None
    versions.take_gradients(0)
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))
    assert old["weight"].grad is None


def test_the_ablation_has_one_storage_that_changes_under_the_graph() -> None:
    layer, versions = counted(Policy("none", (1, 1)), 0)
    held = versions.at(0)["weight"]
    versions.advance(lambda: add_one(layer))
    assert torch.equal(held, torch.ones(2, 2))
    assert held._version == 0


def test_a_frozen_parameter_is_not_copied() -> None:
    layer, versions = counted(Policy("stash", (1, 1)), 0, frozen=True)
    where = layer.bias.data_ptr()
    for _ in range(3):
        versions.advance(lambda: add_one(layer))
    assert {versions.at(number)["bias"].data_ptr() for number in versions.alive} == {where}
    assert not versions.at(3)["bias"].requires_grad
    assert list(versions.past()[2]) == ["weight"]


def test_unknown_versions() -> None:
    _, versions = counted(Policy("stash", (1, 1, 1)), 0)
    versions.restart(7)
    assert versions.at(5) is versions.at(7), "before the first known one: the oldest"
    with pytest.raises(CheckpointError, match=r"weight version 8 is not alive; expected one of \[7\]"):
        versions.at(8)


def test_restart_with_past_versions() -> None:
    """What `past` gives, `restart` takes: those that are still held, as separate leaves."""
    layer, versions = counted(Policy("stash", (1, 1, 1)), 0)
    for _ in range(4):
        versions.advance(lambda: add_one(layer))
    past = {number: {name: value.clone() for name, value in one.items()} for number, one in versions.past().items()}
    assert sorted(past) == [2, 3]
    past[1] = past[2]
    again, others = counted(Policy("stash", (1, 1, 1)), 0)
    again.load_state_dict(layer.state_dict())
    others.restart(4, past)
    assert others.alive == [2, 3, 4]
    for number in (2, 3, 4):
        assert torch.equal(others.at(number)["weight"], versions.at(number)["weight"])
    assert others.at(2)["weight"].requires_grad
