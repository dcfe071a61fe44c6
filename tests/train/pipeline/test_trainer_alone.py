"""The trainer in one process: a plan of one worker needs no process group."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from telltale.errors import NumericalError, TelltaleError
from telltale.train.pipeline import PipelineTrainer, Plan
from telltale.train.pipeline.layers import as_layered, terms_of


def trainer() -> PipelineTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = lambda named: torch.optim.SGD(named, lr=0.1)  # noqa: E731
    return PipelineTrainer(model, Plan.even(2, 1, policy="flush"), optimizer=optimizer, loss=nn.functional.mse_loss)


def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, 2), float("nan") if minibatch == 3 else 1.0), torch.zeros(4, 1)


def test_a_trainer_that_failed_does_not_go_on(tmp_path: Path) -> None:
    alone = trainer()
    assert len(alone.train(batch, stop=2)) == 2
    alone.save(tmp_path)
    with pytest.raises(NumericalError, match="minibatch 3"):
        alone.train(batch, stop=5)
    for again in (
        lambda: alone.train(batch, stop=5),
        lambda: alone.evaluate(batch, 1),
        lambda: alone.save(tmp_path),
        lambda: alone.resume(tmp_path),
    ):
        with pytest.raises(
            TelltaleError, match=r"stopped by an error after minibatch 2.*expected a new trainer on every rank"
        ):
            again()
    fresh = trainer()
    assert fresh.resume(tmp_path) == 2


def test_a_refused_start_leaves_the_trainer_usable() -> None:
    alone = trainer()
    with pytest.raises(TelltaleError):
        alone.train(batch, stop=-1)
    assert len(alone.train(batch, stop=1)) == 1


@pytest.mark.parametrize(("policy", "m"), [("stash", 1), ("flush", 2), ("2bw", 2)])
def test_the_terms_of_a_minibatch_are_counted_once(policy: str, m: int) -> None:
    counted = []

    def weight(minibatch: object) -> float:
        counted.append(1)
        return terms_of(minibatch)

    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model = dataclasses.replace(as_layered(net, nn.functional.mse_loss), weight=weight)
    plan = Plan.manual([range(2)], policy=policy, microbatches=m, recompute=True)
    optimizer = lambda named: torch.optim.SGD(named, lr=0.1)  # noqa: E731
    PipelineTrainer(model, plan, optimizer=optimizer).train([batch(0)] * 4, stop=4)
    assert len(counted) == 4
