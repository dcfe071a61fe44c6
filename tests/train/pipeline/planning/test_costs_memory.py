"""Peak bytes by policy on figures worked by hand: |W| = 100, A = 10, a = 3, optimizer 2 |W|."""

from __future__ import annotations

import numpy as np
import pytest

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.costs import MEMORY_POLICIES, MemoryModel, stage_memories
from telltale.train.pipeline.schedule import policy_of
from train.pipeline.made_profiles import chain


@pytest.mark.parametrize(
    ("policy", "m", "plain", "recomputed"),
    [
        # w = 3, r = 2: four minibatches in flight. G + O = 300.
        ("stash", None, 400 + 40 + 300, 400 + 12 + 10 + 300),
        ("vertical", None, 300 + 40 + 300, 300 + 12 + 10 + 300),
        ("2bw", None, 200 + 40 + 300, 200 + 12 + 10 + 300),
        ("flush", None, 100 + 40 + 300, 100 + 12 + 10 + 300),
        ("flush", 5, 100 + 30 + 300, 100 + 9 + 10 + 300),
        ("gpipe", 16, 100 + 80 + 300, 100 + 24 + 10 + 300),
        ("none", None, 100 + 40 + 300, 100 + 12 + 10 + 300),
    ],
)
def test_formulas(policy: str, m: int | None, plain: float, recomputed: float) -> None:
    for recompute, expected in ((False, plain), (True, recomputed)):
        model = MemoryModel(policy, 2.0, m, recompute=recompute, delay=2)
        assert model.peak(100.0, 10.0, 3.0, 3, 2) == expected
        many = model.coefficients(np.array([3, 3]), np.array([2, 2]))
        assert (many[0] * 100 + many[1] * 10 + many[2] * 3).tolist() == [expected, expected]


@pytest.mark.parametrize("policy", [name for name in MEMORY_POLICIES if name != "vertical"])
@pytest.mark.parametrize("replicas", [(1, 1, 1, 1), (3, 1), (2, 1, 1), (1, 2, 1), (4,)])
def test_copies_of_the_weights_are_those_that_the_runtime_keeps(policy: str, replicas: tuple[int, ...]) -> None:
    plan = Plan.manual(
        [[stage] for stage in range(len(replicas))], replicas=list(replicas), policy=policy, microbatches=16
    )
    rule = policy_of(plan)
    model = MemoryModel(policy, microbatches=16)
    for stage in range(len(replicas)):
        assert int(model.versions(rule.warmup(stage))) == rule.versions_held(stage)


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (3,)])
def test_stages_of_vertical_sync_keep_its_delay(replicas: tuple[int, ...]) -> None:
    n_stages = len(replicas)
    profile = chain([1.0] * n_stages, [0.0] * n_stages, [100.0] * n_stages)
    rule = policy_of(Plan.manual([[s] for s in range(n_stages)], replicas=list(replicas), policy="vertical"))
    found = stage_memories(profile, list(range(1, n_stages)), replicas, MemoryModel("vertical"))
    assert found == [(rule.versions_held(stage) + 3) * 100.0 for stage in range(n_stages)]


def test_stages_of_a_straight_pipeline() -> None:
    """Input bytes are those of the layer before; the first stage reads the batch."""
    profile = chain([1.0] * 3, [5.0, 6.0, 7.0], [100.0] * 3, [10.0, 20.0, 30.0])
    assert stage_memories(profile, [1, 2], (1, 1, 1), MemoryModel("stash")) == [
        300 + 30 + 300,
        200 + 40 + 300,
        100 + 30 + 300,
    ]
    assert stage_memories(profile, [1, 2], (1, 1, 1), MemoryModel("flush", recompute=True)) == [
        100 + 10 + 300,
        100 + 2 * 5 + 20 + 300,
        100 + 6 + 30 + 300,
    ]


def test_what_has_no_model() -> None:
    with pytest.raises(PlanError, match="policy='interleaved' has no memory model"):
        MemoryModel("interleaved")
    with pytest.raises(PlanError, match=r"gpipe.*needs microbatches"):
        MemoryModel("gpipe")
