"""Plans as data and as files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telltale.errors import PlanError
from telltale.train.pipeline.plan import POLICIES, Plan, PlannedStage

PLAN = Plan(
    (
        PlannedStage((0, 1), 2, ("embed", "block"), compute=0.25, synchronisation=0.125, cut_bytes=4096.0, memory=1e9),
        PlannedStage((2,), 1),
    ),
    policy="2bw",
    microbatches=4,
    bottleneck=0.5,
    cost_model="v1",
    recompute=True,
    fingerprint="abc",
    reasons=("because",),
)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    seconds=st.floats(0, 1e6),
    policy=st.sampled_from(POLICIES),
    microbatches=st.integers(1, 99),
)
def test_any_plan_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seconds: float, policy: str, microbatches: int
) -> None:
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    stages = tuple(PlannedStage(tuple(range(low, high)), high - low, compute=seconds) for low, high in pairwise(bounds))
    plan = Plan(stages, policy=policy, microbatches=microbatches, bottleneck=seconds)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan


def test_places_and_ranks() -> None:
    plan = Plan.manual([[0], [1, 2], [3]], replicas=[2, 1, 3])
    assert (plan.describe(), plan.workers, plan.n_layers, plan.replicas) == ("2-1-3", 6, 4, (2, 1, 3))
    assert [plan.place(rank) for rank in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert [plan.rank(*plan.place(rank)) for rank in range(6)] == list(range(6))
    with pytest.raises(PlanError, match="the plan has 6 workers; rank 7 has no place in it"):
        plan.place(7)


def test_even_cuts() -> None:
    assert [stage.layers for stage in Plan.even(7, 3).stages] == [(0, 1), (2, 3), (4, 5, 6)]
    with pytest.raises(PlanError, match="4 stages for 3 layers; expected 1 to 3 stages"):
        Plan.even(3, 4)
    with pytest.raises(PlanError, match="0 stages for 3 layers"):
        Plan.even(3, 0)


@pytest.mark.parametrize(
    ("stages", "options", "words"),
    [
        ([], {}, "the plan has no stages"),
        ([[0], []], {}, "stage 1 is empty"),
        ([[1], [0]], {}, r"stage 0 holds layers \[1\]; expected consecutive ones from 0 on"),
        ([[0], [2]], {}, r"stage 1 holds layers \[2\]; expected consecutive ones from 1 on"),
        ([[0, 1], [1, 2]], {}, r"stage 1 holds layers \[1, 2\]"),
        ([[0]], {"replicas": [0]}, "stage 0 has replicas=0; expected an integer >= 1"),
        ([[0]], {"replicas": [True]}, "stage 0 has replicas=True"),
        ([[0]], {"replicas": [1.0]}, "stage 0 has replicas=1.0"),
        ([[0]], {"replicas": [1, 1]}, r"replicas=\[1, 1\] names 2 stages; expected 1"),
        ([[0]], {"policy": "hope"}, "policy='hope' is unknown"),
        ([[0]], {"microbatches": 0}, "microbatches=0 is not allowed"),
        ([[0]], {"microbatches": 2.0}, "microbatches=2.0 is not allowed"),
        ([[0]], {"chunks": 2}, "chunks=2 needs policy='interleaved', not 'stash'"),
    ],
)
def test_bad_plans(stages: list[list[int]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan.manual(stages, **options)


def _written(tmp_path: Path, **changes: Any) -> Path:
    PLAN.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**document, **changes}))
    return tmp_path / "plan.json"


def test_bad_files(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for changes, words in [
        ({"format": "telltale-pipeline-plan-0"}, "is not a pipeline plan; expected a JSON file with format"),
        ({"stages": [{"replicas": 1}]}, "missing or unknown field: 'layers'"),
        ({"stages": [{"layers": [0], "replicas": 1, "gpus": 4}]}, "missing or unknown field.*gpus"),
        ({"stages": 7}, "missing or unknown field"),
        ({"stages": [{"layers": ["0"], "replicas": 1}]}, "stage 0 holds layers"),
        ({"stages": [{"layers": [0], "replicas": "2"}]}, "stage 0 has replicas='2'"),
        ({"speed": "high"}, "missing or unknown field.*speed"),
        ({"policy": None}, "policy=None is unknown"),
        ({"policy": ["stash"]}, "is unknown"),
        ({"microbatches": "4"}, "microbatches='4' is not allowed"),
        ({"recompute": "yes"}, "recompute='yes'"),
        ({"fingerprint": 7}, "fingerprint=7"),
        ({"reasons": 7}, "missing or unknown field"),
        ({"reasons": "why"}, "reasons='why' are not allowed"),
        ({"bottleneck": "fast"}, "bottleneck='fast'"),
        ({"bottleneck": float("nan")}, "bottleneck=nan"),
        ({"cost_model": 5}, "cost_model=5"),
        ({"placement": [1]}, r"placement=\(1,\) is not allowed; expected the ranks 0 to"),
        ({"placement": 3}, "placement=3 is not allowed"),
        ({"stages": [{"layers": [0.0], "replicas": 1}]}, r"stage 0 holds layers \[0.0\]"),
        ({"stages": [{"layers": [0], "replicas": 1, "compute": "1 s"}]}, "a stage has compute='1 s'"),
        ({"stages": [{"layers": [0], "replicas": 1, "memory": -1}]}, "a stage has memory=-1"),
    ]:
        with subtests.test(changes=changes), pytest.raises(PlanError, match=words):
            Plan.load(_written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not JSON"), ("[]", "is not a pipeline plan"), ("3", "is not a pip")]
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=words):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_placement_says_which_rank_is_which_replica(tmp_path: Path) -> None:
    plan = Plan.manual([[0], [1]], replicas=[2, 1], placement=(2, 0, 1))
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.placement == (2, 0, 1)
    assert [plan.rank(0, 0), plan.rank(0, 1), plan.rank(1, 0)] == [2, 0, 1]
    assert [plan.place(rank) for rank in range(3)] == [(0, 1), (1, 0), (0, 0)]
    with pytest.raises(PlanError, match="rank 3 has no place"):
        plan.place(3)
