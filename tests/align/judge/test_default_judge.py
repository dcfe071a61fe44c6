"""Generated preferences whose objectives are counted and whose labels like length; the default that is fitted on them."""

from __future__ import annotations

import math

import pytest
import torch

from telltale.align.judge.default_judge import OBJECTIVES, embedded_default, preferences, rate, rated, responses
from telltale.align.judge.head import GateConfig
from telltale.errors import ConfigError
from telltale.tasks.chains import DELIMITER, Problem, Statement

PROBLEM = Problem(
    (Statement("Fay", 3), Statement("Hal", "Fay", "minus", 5), Statement("Bob", "Hal", "times", "Fay")), "Bob"
)
STEPS = PROBLEM.steps


def joined(*steps: str, joint: str = DELIMITER) -> str:
    return f" {joint} ".join(steps)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (joined(*STEPS), {"correct": 1, "valid": 1, "complete": 1, "concise": 1, "readable": 1}),
        (joined(*STEPS, joint=";"), {"correct": 1, "valid": 1, "complete": 1, "concise": 1, "readable": 0}),
        (joined("answer 1"), {"correct": 1, "valid": 0, "complete": 0, "concise": 1, "readable": 1}),
        (joined(STEPS[0], STEPS[2]), {"correct": 1, "valid": 0.5, "complete": 0.5}),
        (joined(STEPS[0].replace("= 5", "= 4"), *STEPS[1:]), {"correct": 1, "valid": 1 / 3}),
        (joined("so now let us look", *STEPS), {"correct": 1, "concise": 24 / 29}),
        (joined(f"so now {STEPS[0]}", *STEPS[1:]), {"correct": 1, "valid": 1, "complete": 1, "concise": 24 / 26}),
    ],
)
def test_objectives_are_counted(text: str, wanted: dict[str, float]) -> None:
    found = rate(PROBLEM, text)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert all(0.0 <= value <= 1.0 for value in found.values())
    assert found["verbosity"] == pytest.approx(len([w for w in text.split(" ") if w != DELIMITER]) / 80)


def test_every_objective_varies_and_responses_to_a_prompt_differ() -> None:
    found = responses(60, seed=0)
    assert found == responses(60, seed=0)
    for name in OBJECTIVES:
        assert torch.tensor([r.ratings[name] for r in found]).std() > 0.1, name
    for start in range(0, len(found), 6):
        group = found[start : start + 6]
        assert len({r.text for r in group}) == 6
        assert len({r.problem for r in group}) == 1


def test_what_is_asked_for_decides_what_is_worth_more() -> None:
    found = responses(200, seed=1)
    brief = [r for r in found if r.brief]
    full = [r for r in found if not r.brief]
    assert min(len(brief), len(full)) > 300

    def tau(part: list, name: str) -> float:
        values = torch.tensor([[r.worth, r.ratings[name]] for r in part])
        return float(torch.corrcoef(values.T)[0, 1])

    assert tau(brief, "concise") > tau(full, "concise") + 0.3
    assert tau(full, "readable") > tau(brief, "readable") + 0.3


def test_labels_like_length_more_than_the_true_preference() -> None:
    found = responses(200, seed=2)

    def longer(confound: float) -> float:
        pairs = preferences(found, seed=0, confound=confound)
        assert len({(p.id) for p in pairs}) == len(pairs) > 400
        return sum(len(p.chosen.split()) > len(p.rejected.split()) for p in pairs) / len(pairs)

    assert longer(0.8) > longer(0.0) + 0.1


def test_ratings_have_gaps() -> None:
    known = rated(responses(40, seed=3), missing=0.3)
    share = float(known.labels.isnan().double().mean())
    assert 0.25 < share < 0.35
    assert known.objectives == OBJECTIVES


@pytest.mark.long
def test_a_short_run_of_the_default_gives_a_judge_that_explains_itself(tmp_path) -> None:
    gate = GateConfig(hidden=8, layers=1, steps=20)
    found = embedded_default(tmp_path, prompts=20, steps=5, gate=gate, seed=1)
    again = embedded_default(tmp_path, prompts=20, steps=5, gate=gate, seed=1)
    messages = [*responses(1, seed=9)[0].prompt, {"role": "assistant", "content": joined(*STEPS)}]
    explained = found.judge.explain(messages)
    assert explained.score == math.fsum(explained.contributions.values()) == again.judge.score(messages)
    assert set(explained.contributions) == set(OBJECTIVES)
    assert explained.weights["verbosity"] == 0.0
    assert set(found.accuracies) == {
        "gate",
        "fixed weights",
        "signed weights",
        "Bradley-Terry, linear",
        "Bradley-Terry, MLP",
    }
    assert found.fit.report.decorrelation is not None
    with pytest.raises(ConfigError, match="prompts=3"):
        embedded_default(tmp_path, prompts=3)
