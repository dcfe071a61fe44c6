"""The distributed trainer against the one-process reference: the same bits, the same versions, at every operation."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from telltale.train.pipeline.schedule import operations, policy_of
from train.pipeline import pipeline_worlds as worlds
from train.pipeline.pipeline_worlds import Case, Run
from train.pipeline.rank_runs import run_ranks, values

CASES = [(world, case) for world in (2, 3, 4) for case in worlds.cases_of(world)]
every_case = pytest.mark.parametrize(("world", "case"), CASES, ids=[f"{world} ranks, {c.name}" for world, c in CASES])


@lru_cache
def ranks_of(world: int) -> list[dict[str, Run]]:
    """What each rank did; one set of processes runs all of a world's configurations."""
    return values(run_ranks(worlds.run_cases, world, worlds.cases_of(world)))


@lru_cache
def reference_of(world: int, name: str) -> Run:
    return worlds.reference_of(next(case for case in worlds.cases_of(world) if case.name == name))


@every_case
def test_weights_and_losses_are_the_references(world: int, case: Case) -> None:
    wanted = reference_of(world, case.name)
    names = set()
    for rank, results in enumerate(ranks_of(world)):
        found = results[case.name]
        assert found.losses == wanted.losses
        assert len(found.losses) == case.stops[-1]
        assert found.evaluations[-1] == wanted.evaluations[-1]
        for name, value in found.state.items():
            assert torch.equal(value, wanted.state[name]), f"rank {rank}, {name}"
        names |= found.state.keys()
    assert names == wanted.state.keys()


@every_case
def test_every_operation_finds_the_weights_of_its_version(world: int, case: Case) -> None:
    """The weights in place at each forward and backward are, bit for bit, the ones that the reference had under that
    number; and no more versions were alive than the policy's column of the table."""
    policy, history = policy_of(case.plan), reference_of(world, case.name).history
    for rank, results in enumerate(ranks_of(world)):
        found = results[case.name]
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


@every_case
def test_receive_buffers_do_not_grow_with_the_run(world: int, case: Case) -> None:
    """At most ``prefetch`` minibatches are awaited in each direction."""
    prefetch = case.own.get("prefetch", 2)
    for results in ranks_of(world):
        assert results[case.name].buffers <= 2 * max(prefetch, 1)


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in CASES if len(c.stops) > 1 and "/sgd" in c.name])
def test_evaluation_between_two_runs_uses_the_newest_weights_everywhere(world: int, case: Case) -> None:
    shorter = Case(**{**vars(case), "stops": case.stops[:1]})
    assert ranks_of(world)[0][case.name].evaluations[0] == worlds.reference_of(shorter).evaluations[0]


def test_a_cut_changes_the_ablation_as_its_docstring_says() -> None:
    """ "none" keeps no old version: after a drain its first forwards read the newest one."""
    case = next(case for case in worlds.cases_of(4) if case.name == "none/sgd")
    uncut = worlds.reference_of(Case(**{**vars(case), "stops": case.stops[-1:]}))
    assert uncut.losses[: case.stops[0]] == ranks_of(4)[0][case.name].losses[: case.stops[0]]
    assert uncut.losses != ranks_of(4)[0][case.name].losses
