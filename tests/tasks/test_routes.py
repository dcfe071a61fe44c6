"""Multi-route arithmetic: every route's program is right by the verifier, and what is almost right is wrong."""

import math

import pytest
import torch

from telltale.errors import ConfigError, DataError
from telltale.tasks import routes
from telltale.tasks.routes import Problem, answers_right, check, solution
from telltale.tasks.verifiers import verify_gsm8k

EXAMPLE = Problem(7, 8, 12)


def test_every_program_solves_every_problem_it_fits():
    problems = routes.problems()
    assert len(problems) == 4400
    assert sum(problem.hard for problem in problems) / 4400 == pytest.approx(6 / 11)
    for problem in problems:
        for route in ("S5", "S10", "D2", "X"):
            assert check(problem, solution(problem, route)) == route
        fits = len(solution(problem, "R").split()) < routes.LONGEST
        assert fits is not problem.hard
        assert check(problem, solution(problem, "R")) == (("X" if problem.b == 2 else "R") if fits else None)


def test_numbers_of_all_programs_are_in_the_vocabulary():
    words = {
        word for p in routes.problems() for r in routes.ROUTES for word in solution(p, r).split() + p.prompt.split()
    }
    assert words <= set(routes.VOCABULARY)


@pytest.mark.parametrize(
    ("completion", "route"),
    [
        ("35 + 21 = 56 = 68", "S5"),
        ("63 - 7 = 56 = 68", "S9"),
        ("56 + 0 = 56 = 68", "S8"),
        ("21 42 + 14 56 = 68", "D3"),
        ("56 = 68", "X"),
        ("56 = 69", None),
        ("55 = 68", None),
        ("35 + 20 = 56 = 68", None),
        ("35 + 21 = 55 = 68", None),
        ("36 + 20 = 56 = 68", None),
        ("0 + 56 = 56 = 68", None),
        ("14 27 + 28 56 = 68", None),
        ("14 28 35 56 = 68", None),
        ("35 + 21 56 = 68", None),
        ("68", None),
        ("= 68", None),
        ("", None),
        ("56 = 68 = 68", None),
        ("a 56 = 68", None),
    ],
)
def test_the_verifier_checks_every_step(completion, route):
    assert check(EXAMPLE, completion) == route


def test_the_weak_verifier_reads_the_last_number_only():
    assert answers_right(EXAMPLE, "1 2 3 = 68")
    assert check(EXAMPLE, "1 2 3 = 68") is None
    assert not answers_right(EXAMPLE, "56 = 67")
    assert routes.verify([EXAMPLE.prompt] * 2, ["56 = 68", "1 = 68"]) == [1.0, 0.0]
    assert routes.verify_answer_only([EXAMPLE.prompt] * 2, ["1 = 68", "68"]) == [1.0, 0.0]
    chat = [[{"role": "user", "content": EXAMPLE.prompt}]], [[{"role": "assistant", "content": "56 = 68"}]]
    assert routes.verify(*chat) == [1.0]
    assert routes.route_of(chat[0][0], chat[1][0]) == "X"


def test_held_out_problems_are_the_same_for_every_seed_and_never_trained_on():
    first, second = routes.split(seed=0), routes.split(seed=1)
    assert first[1] == second[1]
    assert len(first[1]) == routes.HELD_OUT
    assert not set(first[0]) & set(first[1])
    assert sorted(first[0]) == sorted(second[0])
    assert first[0] != second[0]


def test_the_recipe_is_deterministic_and_leaves_the_random_state_alone():
    recipe = routes.BaseRecipe(steps=3, batch_size=8, width=32, heads=2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    losses = []
    first = routes.pretrain(recipe, progress=lambda step, loss: losses.append(loss))
    assert torch.equal(torch.rand(1), expected)
    second = routes.pretrain(recipe)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses[0] == pytest.approx(math.log(len(routes.VOCABULARY)), rel=0.05)
    assert losses[-1] < losses[0]


def test_what_is_refused():
    with pytest.raises(DataError, match="the prompt 'what is 7' is no problem"):
        routes.read_prompt("what is 7")
    with pytest.raises(ConfigError, match="route='Y'"):
        solution(EXAMPLE, "Y")
    with pytest.raises(ConfigError, match=r"hinted=1\.5"):
        routes.BaseRecipe(hinted=1.5)


def test_grade_school_answers():
    texts = ["so 3 * 6 = 18\n#### 18", "that makes 1,018 dollars", "#### 17", "no number", "#### 18.0"]
    assert verify_gsm8k(texts[:1] + texts[2:], ["18"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert verify_gsm8k(texts[1:2], ["a\n#### 1018"]) == [1.0]
    with pytest.raises(DataError, match="holds no number"):
        verify_gsm8k(["1"], ["none"])
