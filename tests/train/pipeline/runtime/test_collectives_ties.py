"""Weights that several stages use: recognised, refused where they would drift apart, and untied on request."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import PlanError
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.runtime.collectives import tied_groups, untie
from telltale.train.pipeline.schedule import policy_of
from train.pipeline.pipeline_models import OPTIMIZERS, batch, build, loss

CUT = [[0, 1, 2], [3, 4, 5]]


def groups(name: str, plan: Plan) -> dict[str, tuple[int, ...]]:
    return tied_groups(sequential(build(name), loss), plan, policy_of(plan))


@pytest.mark.parametrize("policy", ["vertical", "2bw", "flush", "gpipe"])
def test_owners(policy: str) -> None:
    assert groups("tied", Plan.manual(CUT, policy=policy)) == {"0.weight": (0, 1)}
    assert groups("untied", Plan.manual(CUT, policy=policy)) == {}
    three = Plan.manual([[0], [1, 2, 3], [4, 5]], policy=policy, microbatches=2)
    assert groups("tied-thrice", three) == {"0.weight": (0, 1, 2)}
    assert groups("tied", three) == {"0.weight": (0, 2)}


@pytest.mark.parametrize("policy", ["stash", "none"])
def test_refused_where_stages_update_at_different_times(policy: str) -> None:
    with pytest.raises(
        PlanError, match=f"0.weight is shared by stages 0, 1, which policy '{policy}' updates at different"
    ):
        groups("tied", Plan.manual(CUT, policy=policy))
    assert groups("tied", Plan.manual([list(range(6))], policy=policy)) == {}
    assert groups("untied", Plan.manual(CUT, policy=policy)) == {}


def test_a_frozen_shared_weight_is_no_tie() -> None:
    net = build("tied")
    net[0].weight.requires_grad_(False)
    plan = Plan.manual(CUT)
    assert tied_groups(sequential(net, loss), plan, policy_of(plan)) == {}


def test_untie_gives_every_later_use_a_copy() -> None:
    net = build("tied-thrice")
    assert untie(net) == ["3.weight", "5.weight"]
    assert len({id(net[index].weight) for index in (0, 3, 5)}) == 3
    assert torch.equal(net[0].weight, net[5].weight)
    assert untie(net) == []


@pytest.mark.parametrize("cut", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3, 4, 5]]])
def test_a_tied_weight_under_flush_is_the_one_of_one_stage(cut: list[list[int]]) -> None:
    """The sum of both uses' gradients; in which order they are added may differ from autograd's in the last bit."""
    results = []
    for stages in (cut, [list(range(6))]):
        net = build("tied")
        plan = Plan.manual(stages, policy="flush", microbatches=3)
        Reference(sequential(net, loss), plan, optimizer=OPTIMIZERS["sgd"]).run(batch, stop=9)
        assert net[0].weight is net[5].weight
        results.append(net[0].weight)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
