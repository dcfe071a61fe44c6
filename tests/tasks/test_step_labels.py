"""Every labeler honours one protocol: labels of reference solutions, of planted errors, of text as a model gives it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from telltale.tasks.chain_checker import ERRORS, ChainLabeler, corrupted
from telltale.tasks.chains import generate
from telltale.tasks.gsm8k import Problem, stepwise
from telltale.tasks.gsm8k_checker import Gsm8kLabeler
from telltale.tasks.step_labels import StepLabel, StepLabeler

PENS = Problem("Ada has 3 pens and buys 4.", "Now <<3+4=7>>7.\nThen she has them.\n#### 7")
CASES: list[tuple[StepLabeler[Any], Any, str]] = [
    *((ChainLabeler(), problem, problem.solution) for problem in generate(5, seed=0)),
    (Gsm8kLabeler(), PENS, stepwise(PENS.solution)),
]


@pytest.mark.parametrize(("labeler", "problem", "solution"), CASES)
def test_reference_solutions_have_no_wrong_step(labeler: StepLabeler[Any], problem: Any, solution: str) -> None:
    assert problem.prompt.endswith("\n\n")
    for index, step in enumerate(problem.steps):
        label = labeler.label(problem, problem.steps[:index], step)
        assert label.right is not False
        assert label.error is None
        # As decoded: with the blank line, and an end-of-text word after the last one.
        raw = [f"{before} \n\n" for before in problem.steps[:index]]
        assert labeler.label(problem, raw, f" {step} \n\n") == label
        assert labeler.label(problem, raw, f"{step} <eos>") == label
    assert labeler.answer_right(problem, solution)
    assert labeler.answer_right(problem, f"{solution} <eos>")
    assert not labeler.answer_right(problem, problem.steps[0])
    assert not labeler.answer_right(problem, "")


@pytest.mark.parametrize("error", ERRORS)
def test_chain_labels_are_those_of_the_checker(error: str) -> None:
    labeler, chance = ChainLabeler(), random.Random(0)
    for problem in generate(30, seed=5):
        steps = corrupted(problem, error, chance).split(" \n\n ")
        labels = [labeler.label(problem, steps[:index], step) for index, step in enumerate(steps)]
        assert next(label.error for label in labels if not label.right) == error
        assert all(label.error in labeler.errors for label in labels if not label.right)


def test_a_label_follows_accepted_values_not_true_ones() -> None:
    (problem,) = generate(1, seed=1)
    first, second = problem.steps[:2]
    wrong = f"{first[:-1]}{(int(first[-1]) + 1) % 7}"
    assert ChainLabeler().label(problem, [], wrong) == StepLabel(False, "arithmetic")
    if first.split()[0] in second.split():
        assert ChainLabeler().label(problem, [wrong], second).right is False
    assert ChainLabeler().label(problem, [first], second) == StepLabel(True, None)
    assert ChainLabeler().label(problem, [], second).right is False
