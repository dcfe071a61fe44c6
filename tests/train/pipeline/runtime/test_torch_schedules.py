"""torch's synchronous schedules, built from our plans, train as our flush reference does, to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from telltale.errors import PlanError
from telltale.train.pipeline import reference
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.torch_schedules import check_plan
from train.pipeline import torch_runs as runs
from train.pipeline.rank_runs import run_ranks, values


@pytest.fixture(scope="module")
def of_two():
    return values(run_ranks(runs.run, 2))


@pytest.mark.long
@pytest.mark.parametrize("case", runs.CASES)
def test_torch_trains_as_the_reference_does(of_two, case):
    options = runs.CASES[case]
    plan = dataclasses.replace(options["plan"], policy="flush", chunks=1)
    net = runs.model(tied=options.get("tied", False))
    wanted = reference.train(
        net,
        plan,
        runs.batch,
        optimizer=runs.optimizer,
        stop=runs.STOP,
        loss=runs.loss,
        schedule=runs.rate,
        grad_clip=options.get("grad_clip"),
    )
    state = net.state_dict()
    seen = set()
    for losses, own in (outcome[case] for outcome in of_two):
        assert losses == wanted.losses
        for name, value in own.items():
            assert torch.equal(value, state[name]), name
        seen |= own.keys()
    assert seen == state.keys()


def test_torch_is_refused_what_it_cannot_do(of_two):
    for outcome in of_two:
        assert outcome["inside a batch"].endswith("stop=13 is inside a batch; expected a multiple of 2 minibatches.")
        assert outcome["nan"].startswith("NumericalError: the loss of minibatch 12 is nan")
        assert "needs 4 processes and 2 were started" in outcome["too many processes"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan.even(8, 4, policy="flush", microbatches=3), "microbatches=3 is too few for torch's 1F1B on 4 stages"),
        (Plan.even(8, 2, policy="stash"), "policy 'stash' is none of torch's schedules"),
        (Plan.manual([[0], [1]], replicas=[2, 1], policy="flush", microbatches=4), "2-1 has replicated stages"),
        (Plan.even(8, 4, policy="interleaved", microbatches=5, chunks=2), "does not divide into 2 rounds"),
        (Plan.even(8, 3, policy="interleaved", microbatches=4, chunks=2), "expected a multiple of 2 stages"),
    ],
)
def test_plans_that_torch_cannot_run(plan, message):
    with pytest.raises(PlanError, match=message):
        check_plan(plan)


def test_zero_bubble_is_for_interleaved_plans():
    with pytest.raises(PlanError, match="zero_bubble needs policy 'interleaved'"):
        check_plan(Plan.even(8, 2, policy="flush", microbatches=4), zero_bubble=True)
