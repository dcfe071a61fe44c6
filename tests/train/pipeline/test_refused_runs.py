"""A run that would train wrongly stops on every rank, soon, with words that say what to mend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from telltale.errors import DataError, PlanError
from telltale.train.pipeline.layers import terms_of
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import train
from train.pipeline import refusal_runs as runs
from train.pipeline.rank_runs import run_ranks, values

WORDS = {
    "other data from minibatch 3 on": "given different data as minibatch 3; expected the same minibatch under the same number",
    "other sizes": "given different data as minibatch 0",
    "other labels": "given different data as minibatch 0",
    "other ends": "PlanError: ranks were given different stop: [4, 5]",
    "a buffer that replicas move": "the replicas of stage 0 differ in layers.0.seen; expected the same bits",
    "one replica's weights touched": "the replicas of stage 0 differ in layers.2.bias; expected the same bits",
    "a float": "the loss is a float; expected a scalar tensor",
    "per-sample losses": "the loss has shape (6,); expected a scalar tensor",
    "a loss without graph": "the loss of minibatch 0 has no graph",
    "no label at all": "no minibatch from 0 to 1 has a term in its loss",
    "L-BFGS": "LBFGS.step needs a closure",
    "synchronised batch norm": "PlanError: 1 is a SyncBatchNorm",
    "other data on torch's schedule": "given different data as minibatch 0",
}


IN_ONE_PROCESS_TOO = (
    "other labels",
    "a float",
    "per-sample losses",
    "a loss without graph",
    "no label at all",
    "L-BFGS",
)
"""Their refusals are tested without ranks as well; that other ranks hear of them is left to the slow tier."""


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in IN_ONE_PROCESS_TOO)) for name in WORDS]
)
def test_every_rank_says_why(name: str) -> None:
    for words, seconds in values(run_ranks(runs.refused, 2, name)):
        assert WORDS[name] in words
        assert seconds < 8, "it waited for the time-out"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["2bw", "flush", "gpipe"])
def test_copies_of_a_shared_weight_start_and_stay_equal(kind: str) -> None:
    first, second = values(run_ranks(runs.tied_from_other_seeds, 2, kind))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("targets", "terms"),
    [
        (torch.tensor([1, -100, 0]), 2),
        (torch.full((2, 3), -100), 0),
        (torch.tensor([[1, 2, -100], [-100, -100, 4]]), 3),
        (torch.randn(4, 7), 4),
        (torch.tensor([True, False]), 2),
        (torch.tensor([-100.0, 3.0]), 2),
        ("none", 5),
    ],
)
def test_terms_of_a_mean(targets: object, terms: float) -> None:
    assert terms_of((torch.zeros(5, 2), targets)) == terms


@pytest.mark.parametrize("replicas", [(1, 1), (3, 1), (2,)])
def test_replicas_average_over_labels(replicas: tuple[int, ...]) -> None:
    """Under stash a round of r replicas is one update: the gradient of the mean over the labels of its r minibatches."""
    counts = [6, 1, 3]

    def batch(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = runs.batch(t)
        y[counts[t % 3] :] = -100
        return x, y

    net, plain = runs.net(), runs.net()
    cuts = [[0, 1], [2]] if len(replicas) == 2 else [[0, 1, 2]]
    size = replicas[0]
    train(
        net,
        Plan.manual(cuts, replicas=replicas, policy="stash"),
        batch,
        optimizer=lambda named: torch.optim.SGD(named, lr=0.1),
        loss=nn.functional.cross_entropy,
        stop=size,
        replica_rates=False,
    )
    given = [batch(t) for t in range(size)]
    output = plain(torch.cat([x for x, _ in given]))
    nn.functional.cross_entropy(output, torch.cat([y for _, y in given])).backward()
    wanted = plain[0].weight - 0.1 * plain[0].weight.grad
    if len(replicas) == 1 or size == 1:
        assert torch.allclose(net[0].weight, wanted, atol=1e-6)
    else:  # each minibatch of the round saw a newer last stage, but the round's shares are those of its labels
        assert (net[0].weight - wanted).norm() < 0.2 * (wanted - runs.net()[0].weight).norm()


def test_a_round_without_a_label_is_refused() -> None:
    with pytest.raises(DataError, match="no minibatch"):
        train(
            runs.net(),
            Plan.manual([[0, 1, 2]], replicas=[2], policy="stash"),
            lambda t: (torch.zeros(2, 8), torch.full((2,), -100)),
            optimizer=lambda named: torch.optim.SGD(named, lr=0.1),
            loss=nn.functional.cross_entropy,
            stop=2,
        )


def test_an_optimizer_of_ones_own_that_needs_a_closure_is_refused() -> None:
    class Line(torch.optim.Optimizer):
        def step(self, closure):  # type: ignore[no-untyped-def, override]
            return closure()

    with pytest.raises(PlanError, match=r"Line\.step needs a closure"):
        train(
            runs.net(),
            Plan.even(3, 2),
            runs.batch,
            optimizer=lambda named: Line([p for _, p in named], {"lr": 0.1}),
            loss=nn.functional.cross_entropy,
            stop=2,
        )
