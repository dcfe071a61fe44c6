"""Learning rates, clipping, and what makes up for stale gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.runtime.optimizer import (
    RateDiscount,
    StageOptimizer,
    clip,
    delay_aware_nadam,
    gradient_norms,
)
from telltale.train.pipeline.schedule import Policy


def sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.5)


def optimizer_of(policy: Policy, stage: int, **options: Any) -> StageOptimizer:
    return StageOptimizer(sgd, [("w", nn.Parameter(torch.zeros(2)))], policy=policy, stage=stage, **options)


def test_a_stage_that_steps_less_often_takes_larger_steps() -> None:
    """lr_s = lr r_s / r_0: over r_0 r_s minibatches every stage moves by the same sum of rates."""
    policy = Policy("stash", (3, 1, 2))
    assert [optimizer_of(policy, stage).factor(5, 2) for stage in range(3)] == [1.0, 1 / 3, 2 / 3]
    assert [optimizer_of(policy, stage, replica_rates=False).factor(5, 2) for stage in range(3)] == [1.0] * 3
    assert [optimizer_of(Policy("2bw", (3, 1, 2), 6), stage).factor(5, 2) for stage in range(3)] == [1.0] * 3


def test_the_schedule_is_by_minibatch_and_of_the_first_rate() -> None:
    optimizer = optimizer_of(Policy("stash", (1, 1)), 0, schedule=lambda t: 1 / (t + 1))
    (parameter,) = optimizer.parameters
    for t, rate in ((0, 0.5), (4, 0.1), (0, 0.5)):
        parameter.data.zero_()
        parameter.grad = torch.ones(2)
        optimizer.step(t, t + 1)
        assert torch.equal(parameter.data, torch.full((2,), -rate))
        assert parameter.grad is None


def test_the_discount_is_the_papers() -> None:
    """lr / tau^(1 - min(k/K, 1)) with tau in updates."""
    discount = RateDiscount(4)
    assert [discount.factor(3, k) for k in range(6)] == pytest.approx([3**-1, 3**-0.75, 3**-0.5, 3**-0.25, 1, 1])
    assert discount.factor(0, 0) == discount.factor(1, 0) == 1.0
    policy = Policy("stash", (1, 1, 1))
    steady = [optimizer_of(policy, stage, discount=RateDiscount(100)).factor(50, 51) for stage in range(3)]
    assert steady == pytest.approx([2**-0.5, 1.0, 1.0])
    with pytest.raises(ConfigError, match="annealing_updates"):
        RateDiscount(0)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = StageOptimizer(sgd, [("w", frozen)], policy=Policy("stash", (1,)), stage=0)
    optimizer.step(0, 1)
    assert (optimizer.optimizer, optimizer.parameters, optimizer.base_rates) == (None, [], [])


def test_a_factory_that_makes_no_optimizer() -> None:
    with pytest.raises(PlanError, match="the optimizer factory returned list; expected"):
        StageOptimizer(lambda named: [], [("w", nn.Parameter(torch.zeros(2)))], policy=Policy("stash", (1,)), stage=0)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(limit: float) -> None:
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    parameters[0].grad, parameters[2].grad = torch.randn(3, 4), torch.randn(2)
    ours = [None if p.grad is None else p.grad.clone() for p in parameters]
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    norms = gradient_norms(ours)
    assert norms.shape == (3,)
    assert norms[1] == 0
    assert math.isclose(torch.linalg.vector_norm(norms), norm, rel_tol=1e-6)
    clip(ours, norms, limit)
    for given, parameter in zip(ours, parameters, strict=True):
        assert (given is None) == (parameter.grad is None)
        # The two add squares in different orders.
        assert given is None or torch.allclose(given, parameter.grad, rtol=1e-6)
    assert gradient_norms([]).shape == (1,)


def test_delay_aware_nadam() -> None:
    made = delay_aware_nadam(3e-3, weight_decay=0.1, eps=1e-6)([("w", nn.Parameter(torch.zeros(2)))])
    assert isinstance(made, torch.optim.NAdam)
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (3e-3, (0.99, 0.999), 0.1, 1e-6)
    assert group["decoupled_weight_decay"]
