"""The order of operations: complete, with every version made before it is read, and free of deadlocks, for any replicas."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telltale.errors import PlanError
from telltale.train.pipeline.schedule import BY_BATCH, BY_ROUND, Operation, Policy, operations

NAMES = BY_ROUND + BY_BATCH


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    replicas = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    least = max(1, max(r * ((sum(replicas[s:]) - 1) // r) for s, r in enumerate(replicas)))
    name = draw(st.sampled_from(NAMES))
    extra = draw(st.integers(0, 6))
    return Policy(name, replicas, least + extra if name == "2bw" else 1 + extra)


def text(todo: list[Operation]) -> str:
    return " ".join(f"{o.kind}{o.minibatch}.{o.version}" for o in todo)


def ranks(policy: Policy) -> list[tuple[int, int]]:
    return [(stage, replica) for stage, count in enumerate(policy.replicas) for replica in range(count)]


def test_one_forward_one_backward_on_four_stages() -> None:
    policy = Policy("stash", (1, 1, 1, 1))
    assert text(operations(policy, 0, 0, 0, 5)) == (
        "F0.0 F1.0 F2.0 F3.0 B0.0 U0.1 F4.1 B1.0 U1.2 B2.0 U2.3 B3.0 U3.4 B4.1 U4.5"
    )
    assert text(operations(policy, 2, 0, 0, 4)) == "F0.0 F1.0 B0.0 U0.1 F2.1 B1.0 U1.2 F3.2 B2.1 U2.3 B3.2 U3.4"
    assert text(operations(policy, 3, 0, 0, 3)) == "F0.0 B0.0 U0.1 F1.1 B1.1 U1.2 F2.2 B2.2 U2.3"


def test_round_robin_on_two_replicas() -> None:
    """2-1: each replica takes every other minibatch and both step once per two, the last time for one alone."""
    policy = Policy("stash", (2, 1))
    assert text(operations(policy, 0, 0, 0, 5)) == "F0.0 F2.0 B0.0 U1.1 F4.1 B2.0 U3.2 B4.1 U4.3"
    assert text(operations(policy, 0, 1, 0, 5)) == "F1.0 F3.0 B1.0 U1.1 B3.0 U3.2 U4.3"
    assert text(operations(policy, 1, 0, 0, 3)) == "F0.0 B0.0 U0.1 F1.1 B1.1 U1.2 F2.2 B2.2 U2.3"


def test_batches_that_drain_and_batches_that_do_not() -> None:
    assert (
        text(operations(Policy("flush", (1, 1), 2), 0, 0, 0, 4)) == "F0.0 F1.0 B0.0 B1.0 U1.1 F2.1 F3.1 B2.1 B3.1 U3.2"
    )
    assert (
        text(operations(Policy("gpipe", (1, 1), 3), 1, 0, 0, 4)) == "F0.0 F1.0 F2.0 B0.0 B1.0 B2.0 U2.1 F3.1 B3.1 U3.2"
    )
    assert text(operations(Policy("2bw", (1, 1), 1), 0, 0, 0, 4)) == (
        "F0.0 F1.0 B0.0 U0.1 F2.1 B1.0 U1.2 F3.2 B2.1 U2.3 B3.2 U3.4"
    )


@settings(max_examples=150, deadline=None)
@given(policy=policies(), rounds=st.integers(0, 3), length=st.integers(0, 30))
def test_what_every_rank_does(policy: Policy, rounds: int, length: int) -> None:
    start = rounds * policy.alignment
    stop = start + length
    for stage, count in enumerate(policy.replicas):
        lists = [operations(policy, stage, replica, start, stop) for replica in range(count)]
        size = policy.round_size(stage)
        for replica, todo in enumerate(lists):
            own = [t for t in range(start, stop) if t % count == replica]
            for kind in "FB":
                assert [o.minibatch for o in todo if o.kind == kind] == own
            _check_versions(policy, stage, todo, start)
            _check_warmup(policy, stage, todo, own)
        updates = [[(o.minibatch, o.version) for o in todo if o.kind == "U"] for todo in lists]
        assert all(one == updates[0] for one in updates)
        first = start // size
        assert [version for _, version in updates[0]] == list(
            range(first + 1, -(-stop // size) + 1 if length else first + 1)
        )
        assert [t for t, _ in updates[0]] == [min(version * size, stop) - 1 for _, version in updates[0]]


def _check_versions(policy: Policy, stage: int, todo: list[Operation], start: int) -> None:
    """Each version is read only after it was made and while the policy still holds it; each gradient is there when its
    update happens, and before an update no gradient of a later round is."""
    size = policy.round_size(stage)
    newest, forwards = start // size, {}
    for o in todo:
        if o.kind == "F":
            assert newest - policy.versions_held(stage) < o.version <= newest
            assert o.version == policy.version(stage, o.minibatch, start=start)
            forwards[o.minibatch] = o.version
        elif o.kind == "B":
            assert policy.update_after(stage, o.minibatch) == newest + 1
            if policy.name == "none":
                assert o.version == newest
            else:
                assert o.version == forwards[o.minibatch] > newest - policy.versions_held(stage)
        else:
            newest += 1
            assert o.version == newest
    if policy.drains:
        assert all(o.version == o.minibatch // size for o in todo if o.kind != "U")


def _check_warmup(policy: Policy, stage: int, todo: list[Operation], own: list[int]) -> None:
    """Forwards before the first backward: w_s and the steady state's first; all of the batch under gpipe."""
    in_first = (
        [t for t in own if t < own[0] // policy.microbatches * policy.microbatches + policy.microbatches] if own else []
    )
    within = len(in_first) if policy.drains else len(own)
    ahead = 0
    for o in todo:
        if o.kind == "B":
            break
        ahead += o.kind == "F"
    wanted = within if policy.name == "gpipe" else min(policy.warmup(stage) + 1, within)
    assert ahead == wanted
    waiting = most = 0
    for o in todo:
        waiting += (o.kind == "F") - (o.kind == "B")
        most = max(most, waiting)
    if policy.name != "gpipe":
        assert most <= policy.warmup(stage) + 1


@settings(max_examples=150, deadline=None)
@given(policy=policies(), length=st.integers(1, 40), across=st.booleans())
def test_no_deadlock(policy: Policy, length: int, across: bool) -> None:
    """Ranks run their lists with sends that never block; receives and updates block. With ``across``, an update also
    waits for the same update of all other stages (tied weights, a norm of the whole model)."""
    lists = {rank: operations(policy, *rank, 0, length) for rank in ranks(policy)}
    assert run_tokens(policy, lists, across=across and policy.synchronous) == []


def run_tokens(policy: Policy, lists: dict[tuple[int, int], list[Operation]], *, across: bool) -> list[str]:
    """What is left undone when no rank can go on: every value and gradient is a token, every update a meeting."""
    at = dict.fromkeys(lists, 0)
    sent: set[tuple[str, int, int]] = set()
    arrived: Counter[tuple[int, int]] = Counter()
    counted: set[tuple[tuple[int, int], int]] = set()
    last = policy.n_stages - 1
    moved = True
    while moved:
        moved = False
        for rank, todo in lists.items():
            while at[rank] < len(todo):
                o, stage = todo[at[rank]], rank[0]
                if o.kind == "F" and stage > 0 and ("F", stage - 1, o.minibatch) not in sent:
                    break
                if o.kind == "B" and stage < last and ("B", stage + 1, o.minibatch) not in sent:
                    break
                if o.kind == "U":
                    if (rank, o.version) not in counted:
                        counted.add((rank, o.version))
                        arrived[stage, o.version] += 1
                        moved = True
                    needed = range(policy.n_stages) if across else (stage,)
                    if any(arrived[s, o.version] < policy.replicas[s] for s in needed):
                        break
                sent.add((o.kind, stage, o.minibatch))
                at[rank] += 1
                moved = True
    return [f"{rank}: {text(todo[at[rank] :])}" for rank, todo in lists.items() if at[rank] < len(todo)]


def test_the_token_run_notices_a_deadlock() -> None:
    """A backward moved before the forward that the next stage needs for it."""
    policy = Policy("stash", (1, 1))
    lists = {rank: operations(policy, *rank, 0, 4) for rank in ranks(policy)}
    first = lists[0, 0]
    first[0], first[2] = first[2], first[0]
    assert run_tokens(policy, lists, across=False) != []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (1, 2), (3, 2)])
def test_cutting_a_run_leaves_versions_as_they_were(name: str, replicas: tuple[int, ...]) -> None:
    """All but "none": what is read by each minibatch does not depend on where the pipe was drained."""
    policy = Policy(name, replicas, 4)
    cut, stop = 3 * policy.alignment, 7 * policy.alignment + 1
    for rank in ranks(policy):
        whole = operations(policy, *rank, 0, stop)
        pieces = operations(policy, *rank, 0, cut) + operations(policy, *rank, cut, stop)
        assert (sorted(map(repr, whole)) == sorted(map(repr, pieces))) == (
            name != "none" or policy.warmup(rank[0]) == 0
        )


def test_runs_start_at_round_boundaries() -> None:
    with pytest.raises(PlanError, match="start=3 is inside a round; expected a multiple of 6"):
        operations(Policy("stash", (3, 2)), 0, 0, 3, 9)
    with pytest.raises(PlanError, match="stop=4 is before start=6"):
        operations(Policy("stash", (3, 2)), 0, 0, 6, 4)
    assert operations(Policy("stash", (3, 2)), 0, 0, 6, 6) == []
