"""The distributed trainer against the one-process reference: the same bits, the same versions, at every operation."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from telltale.train.pipeline.schedule import operations, policy_of
from train.pipeline import delayed_oracle
from train.pipeline import pipeline_worlds as worlds
from train.pipeline.pipeline_models import OPTIMIZERS, batch, build, loss
from train.pipeline.pipeline_worlds import Case, Run
from train.pipeline.rank_runs import run_ranks, values

CASES = [(world, case) for world in (2, 3, 4) for case in worlds.cases_of(world)]
every_case = pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, id=f"{world} ranks, {case.name}", marks=[pytest.mark.slow] * worlds.is_slow(case))
        for world, case in CASES
    ],
)
pytestmark = pytest.mark.long


@lru_cache
def ranks_of(world: int, slow: bool) -> list[dict[str, Run]]:
    """What each rank did; one set of processes runs all configurations of a world and a tier."""
    cases = [case for case in worlds.cases_of(world) if worlds.is_slow(case) is slow]
    return values(run_ranks(worlds.run_cases, world, cases))


def runs_of(world: int, case: Case) -> list[Run]:
    """What each rank did in one configuration."""
    return [results[case.name] for results in ranks_of(world, worlds.is_slow(case))]


@every_case
def test_the_ranks_do_what_the_reference_does(world: int, case: Case) -> None:
    wanted, found = worlds.reference_of(case), runs_of(world, case)
    assert_weights_and_losses(found, wanted, case)
    assert_versions(found, wanted, case)
    assert_bounded_buffers(found, case)


WRITTEN_OUT = [
    (world, case)
    for world, case in CASES
    if case.model == "mixed" and case.batches == "even" and not case.settings and case.policy != "none"
]


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, id=f"{world} ranks, {case.name}", marks=[pytest.mark.slow] * worlds.is_slow(case))
        for world, case in WRITTEN_OUT
    ],
)
def test_the_ranks_do_what_the_papers_say(world: int, case: Case) -> None:
    """An oracle that shares no code with the runtime, to the last bit."""
    losses, state = delayed_oracle.train(
        build(case.model),
        [stage.layers for stage in case.plan.stages],
        case.plan.replicas,
        case.policy,
        case.plan.microbatches,
        optimizer=OPTIMIZERS[case.optimizer],
        batch=batch,
        loss=loss,
        stop=case.stops[-1],
    )
    seen = set()
    for found in runs_of(world, case):
        assert found.losses == losses
        for name, value in found.state.items():
            assert torch.equal(value, state[name]), name
        seen |= found.state.keys()
    assert seen == state.keys()


def assert_weights_and_losses(runs: list[Run], wanted: Run, case: Case) -> None:
    """The reference's, to the last bit, and every parameter is some rank's."""
    names = set()
    for rank, found in enumerate(runs):
        assert found.losses == wanted.losses
        assert len(found.losses) == case.stops[-1]
        assert found.evaluations[-1] == wanted.evaluations[-1]
        for name, value in found.state.items():
            assert torch.equal(value, wanted.state[name]), f"rank {rank}, {name}"
        names |= found.state.keys()
    assert names == wanted.state.keys()


def assert_versions(runs: list[Run], reference: Run, case: Case) -> None:
    """The weights in place at each forward and backward are, bit for bit, the ones that the reference had under that
    number; and no more versions were alive than the policy's column of the table."""
    policy, history = policy_of(case.plan), reference.history
    for rank, found in enumerate(runs):
        stage, replica = case.plan.place(rank)
        wanted = [
            (o.kind, o.minibatch, o.version)
            for start, stop in zip((0, *case.stops), case.stops, strict=False)
            for o in operations(policy, stage, replica, start, stop)
        ]
        assert found.trace == wanted
        # A first stage with nothing to train has no backward to speak of.
        kinds = "F" if case.name.startswith("frozen-first") and stage == 0 else "FB"
        read = [(stage, version) for kind, _, version in found.trace if kind in kinds]
        assert [history[key] for key in read] == found.read
        assert max(found.alive, default=0) <= found.most_versions <= policy.versions_held(stage)


def assert_bounded_buffers(runs: list[Run], case: Case) -> None:
    """At most ``prefetch`` minibatches are awaited in each direction, so receive buffers do not grow with the run."""
    prefetch = case.own.get("prefetch", 2)
    for found in runs:
        assert found.buffers <= 2 * max(prefetch, 1)


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in CASES if len(c.stops) > 1 and "/sgd" in c.name])
def test_evaluation_between_two_runs_uses_the_newest_weights_everywhere(world: int, case: Case) -> None:
    shorter = Case(**{**vars(case), "stops": case.stops[:1]})
    assert runs_of(world, case)[0].evaluations[0] == worlds.reference_of(shorter).evaluations[0]


def test_a_cut_changes_the_ablation_as_its_docstring_says() -> None:
    """ "none" keeps no old version: after a drain its first forwards read the newest one."""
    case = next(case for case in worlds.cases_of(4) if case.name == "none/sgd")
    uncut = worlds.reference_of(Case(**{**vars(case), "stops": case.stops[-1:]}))
    assert uncut.losses[: case.stops[0]] == runs_of(4, case)[0].losses[: case.stops[0]]
    assert uncut.losses != runs_of(4, case)[0].losses
