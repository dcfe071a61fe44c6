"""Version traces: the integers of the paper's rule for straight pipelines, and their properties for replicated ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.schedule import BY_BATCH, BY_ROUND, Policy, noam, policy_of

replicas_of_up_to_eight = st.lists(st.integers(1, 4), min_size=1, max_size=5).filter(lambda r: sum(r) <= 8).map(tuple)


def trace(policy: Policy, minibatches: int) -> list[list[int]]:
    return [[policy.version(stage, t) for t in range(minibatches)] for stage in range(policy.n_stages)]


STRAIGHT = (1, 1, 1, 1)
TRACES = {
    "stash": (
        1,
        [
            [0, 0, 0, 0, 1, 2, 3, 4, 5],
            [0, 0, 0, 1, 2, 3, 4, 5, 6],
            [0, 0, 1, 2, 3, 4, 5, 6, 7],
            [0, 1, 2, 3, 4, 5, 6, 7, 8],
        ],
    ),
    "vertical": (1, [[0, 0, 0, 0, 1, 2, 3, 4, 5]] * 4),
    "2bw": (4, [[0, 0, 0, 0, 0, 0, 0, 0, 1]] * 4),
    "flush": (4, [[0, 0, 0, 0, 1, 1, 1, 1, 2]] * 4),
    "gpipe": (4, [[0, 0, 0, 0, 1, 1, 1, 1, 2]] * 4),
    "none": (
        1,
        [
            [0, 0, 0, 0, 1, 2, 3, 4, 5],
            [0, 0, 0, 1, 2, 3, 4, 5, 6],
            [0, 0, 1, 2, 3, 4, 5, 6, 7],
            [0, 1, 2, 3, 4, 5, 6, 7, 8],
        ],
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_straight_pipeline_of_four(name: str) -> None:
    microbatches, wanted = TRACES[name]
    policy = Policy(name, STRAIGHT, microbatches)
    assert trace(policy, 9) == wanted
    assert [policy.warmup(stage) for stage in range(4)] == [3, 2, 1, 0]
    backward = [[policy.backward_version(stage, t) for t in range(9)] for stage in range(4)]
    assert backward == ([list(range(9))] * 4 if name == "none" else wanted)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("stash", [4, 3, 2, 1]),
        ("vertical", [4] * 4),
        ("2bw", [2] * 4),
        ("flush", [1] * 4),
        ("gpipe", [1] * 4),
        ("none", [1] * 4),
    ],
)
def test_versions_held_is_the_tables_column(name: str, held: list[int]) -> None:
    policy = Policy(name, STRAIGHT, 4)
    assert [policy.versions_held(stage) for stage in range(4)] == held


@pytest.mark.parametrize(
    ("replicas", "warmups", "wanted"),
    [
        ((2, 1), [1, 0], [[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7]]),
        ((1, 2), [2, 0], [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2, 3, 3]]),
        (
            (2, 1, 1),
            [1, 1, 0],
            [[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]],
        ),
        ((3, 2), [1, 0], [[0, 0, 0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]),
        (
            (1, 2, 1),
            [3, 1, 0],
            [[0, 0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7]],
        ),
    ],
    ids=["2-1", "1-2", "2-1-1", "3-2", "1-2-1"],
)
def test_stashing_on_replicas(replicas: tuple[int, ...], warmups: list[int], wanted: list[list[int]]) -> None:
    policy = Policy("stash", replicas)
    assert [policy.warmup(stage) for stage in range(len(replicas))] == warmups
    assert trace(policy, len(wanted[0])) == wanted
    assert trace(Policy("none", replicas), len(wanted[0])) == wanted


@pytest.mark.parametrize(
    ("replicas", "batch", "delay"),
    [((1,), 1, 0), ((1, 1), 1, 1), ((1,) * 6, 1, 5), ((2, 1), 2, 1), ((1, 2), 2, 1), ((2, 1, 1), 2, 1), ((3, 2), 6, 1)],
)
def test_vertical_sync_on_replicas(replicas: tuple[int, ...], batch: int, delay: int) -> None:
    """One update of all stages per lcm(r) minibatches, so that every stage can number its versions alike."""
    policy = Policy("vertical", replicas)
    assert (policy.microbatches, policy.delay) == (batch, delay)
    wanted = [max(0, t // batch - delay) for t in range(40)]
    assert trace(policy, 40) == [wanted] * len(replicas)


def test_stashing_is_the_papers_formula_counted_from_one() -> None:
    """Minibatch t (from 1) at stage s of n (from 1) reads w^(t-n+s), where w^(1) is the initial weight: section 3.3."""
    for n in range(1, 7):
        policy = Policy("stash", (1,) * n)
        for s in range(1, n + 1):
            for t in range(1, 20):
                assert policy.version(s - 1, t - 1) == max(1, t - n + s) - 1


def test_double_buffering_is_the_papers_formula_counted_from_one() -> None:
    """Microbatch k (from 1) reads version max(floor((k-1)/m) - 1, 0)."""
    for m in range(3, 9):
        policy = Policy("2bw", STRAIGHT, m)
        assert trace(policy, 40)[0] == [max((k - 1) // m - 1, 0) for k in range(1, 41)]


def test_warmup_plus_one_is_the_number_of_minibatches_admitted() -> None:
    """floor((W-1)/r_0) + 1 == ceil(W/r_0) for all W and r_0; so warm-up and NOAM are the same count."""
    for workers in range(1, 200):
        for first in range(1, workers + 1):
            assert (workers - 1) // first + 1 == math.ceil(workers / first)
            replicas = (first, workers - first) if workers > first else (first,)
            assert Policy("stash", replicas).warmup(0) + 1 == noam(replicas)
            assert noam(replicas) * first >= workers


@pytest.mark.long
@given(
    replicas=replicas_of_up_to_eight,
    name=st.sampled_from(BY_ROUND + BY_BATCH),
    extra=st.integers(0, 5),
    minibatch=st.integers(0, 200),
)
def test_a_minibatch_reads_what_exists_and_its_gradient_goes_forward(
    replicas: tuple[int, ...], name: str, extra: int, minibatch: int
) -> None:
    policy = Policy(name, replicas, _enough(replicas) + extra)
    for stage in range(len(replicas)):
        read, made = policy.version(stage, minibatch), policy.update_after(stage, minibatch)
        assert 0 <= read <= policy.backward_version(stage, minibatch) < made
        assert policy.version(stage, minibatch + 1) - read in (0, 1)
        if name != "none":
            assert made - read <= policy.versions_held(stage)
        if policy.synchronous:
            assert read == policy.version(0, minibatch)


def _enough(replicas: tuple[int, ...]) -> int:
    """The least m that 2bw takes: every minibatch between two that run F and B at once lies in the batch before."""
    return max(1, max(r * ((sum(replicas[s:]) - 1) // r) for s, r in enumerate(replicas)))


@given(replicas=replicas_of_up_to_eight)
def test_too_few_microbatches_for_double_buffering(replicas: tuple[int, ...]) -> None:
    least = _enough(replicas)
    assert Policy("2bw", replicas, least).microbatches == least
    if least > 1:
        with pytest.raises(PlanError, match=f"microbatches={least - 1} is too few.*at least {least}"):
            Policy("2bw", replicas, least - 1)


def test_straight_double_buffering_needs_one_less_than_the_stages() -> None:
    assert Policy("2bw", STRAIGHT, 3).microbatches == 3
    with pytest.raises(PlanError, match="microbatches=2 is too few"):
        Policy("2bw", STRAIGHT, 2)


@pytest.mark.parametrize("name", ["interleaved", "paci", ""])
def test_policies_without_a_schedule(name: str) -> None:
    with pytest.raises(PlanError, match="has no schedule of ours"):
        Policy(name, (1, 1))


def test_policy_of_a_plan() -> None:
    plan = Plan.manual([[0], [1, 2]], replicas=[2, 1], policy="2bw", microbatches=4)
    assert policy_of(plan) == Policy("2bw", (2, 1), 4)
    assert (policy_of(plan).round_size(0), policy_of(plan).alignment) == (4, 4)
    assert Policy("stash", (2, 3)).alignment == 6


def test_the_ablation_reads_the_newest_weights_after_a_drain() -> None:
    policy = Policy("none", (1, 1, 1))
    assert [policy.version(0, t, start=6) for t in range(6, 12)] == [6, 6, 6, 7, 8, 9]
    assert [Policy("stash", (1, 1, 1)).version(0, t, start=6) for t in range(6, 12)] == [4, 5, 6, 7, 8, 9]
