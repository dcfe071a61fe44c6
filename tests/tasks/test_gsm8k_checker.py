"""The marked-step checker: every verdict by hand, what it leaves open, and planted errors found in generated solutions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from telltale.errors import ConfigError
from telltale.tasks.gsm8k import Problem, stepwise
from telltale.tasks.gsm8k_checker import ERRORS, Gsm8kLabeler, check_solution, check_step, is_answer

SHOP = Problem(
    "Ada buys 3 pens at $1,200 each and twenty-five caps. She pays half now. How much is left after 15% off?",
    "The pens cost 3*1200 = $<<3*1200=3600>>3,600.\nHalf is 3600/2 = $<<3600/2=1800>>1800.\n#### 1,800",
)


def test_each_step_has_its_verdict(subtests: pytest.Subtests) -> None:
    for step, right, error in [
        ("3*1200 = $<<3*1200=3600>>3,600 for pens.", True, None),
        ("<<3*1,200=3,600.0>>3600", True, None),
        ("<<3*1200=3600>>", True, None),
        ("<<.15*1200=180>>180", True, None),
        ("<<1200*15%=180>>180", True, None),
        ("<<10/3=3.33>>3.3", True, None),
        ("<<20/3=6.66>>6.67", True, None),
        ("<<1.87*9=16.830000000000002>>16.83", True, None),
        ("<<20/3=6.6666666666666666>>6 boxes", True, None),
        ("<<19/3=6.3333333333333333>>7 trips", True, None),
        ("<<3/12=0.25>>25%", True, None),
        ("<<3-25=-22>>22 fewer", True, None),
        ("<<3/4=3/4>>3/4", True, None),
        ("<<3*50=150=150.0>>150", True, None),
        ("<<350000+17500=367500>>367 500.", True, None),
        ("<<3*4=12>>12 200-page books", True, None),
        ("<<½*12=6>>6", True, None),
        ("<<3*1200=3601>>3601", False, "arithmetic"),
        ("<<7/2=3>>3", False, "arithmetic"),
        ("<<10/3=3.3>>3.3, <<10/3=3.4>>3.4", False, "arithmetic"),
        ("<<20-11=9.20>>9.20", False, "arithmetic"),
        ("<<3*4=3+9=13>>13", False, "arithmetic"),
        ("<<3/0=0>>0", False, "arithmetic"),
        ("<<3*1200=3600>>36,000", False, "transcription"),
        ("<<7=7>>9", False, "transcription"),
        ("<<3*1200>>3600", False, "form"),
        ("<<>>", False, "form"),
        ("<<3*=3>>3", False, "form"),
        ("<<=3>>3", False, "form"),
        ("<<400-250=150 000>>150 000", False, "form"),
        ("it is <<3*1200=36", False, "form"),
        ("it is 3600>>", False, "form"),
        ("<<3*<<1200=3600>>3600", False, "form"),
        ("<<x+3=6>>6", None, None),
        ("<<2:15+2:38=4:53>>4:53", None, None),
        ("<<12/1.3333...=9>>9", None, None),
        ("<<x+3=6>>6 and <<3+3=7>>7", False, "arithmetic"),
        ("3*1200 = 3600", None, None),
        ("Then she goes home.", None, None),
        ("", None, None),
    ]:
        with subtests.test(step=step):
            verdict = check_step(SHOP, [], step)
            assert (verdict.right, verdict.error) == (right, error)
            assert check_step(SHOP, [], step + "\n\n").right == right
            assert check_step(SHOP, [], step + "\n\n<eos>").error == error


def test_a_step_is_marked_unmarked_or_an_answer() -> None:
    assert check_step(SHOP, [], "<<1+1=2>>2").kind == "marked"
    assert check_step(SHOP, [], "<<1+1").kind == "marked"
    assert check_step(SHOP, [], "1+1").kind == "unmarked"
    assert check_step(SHOP, [], "#### 2").kind == "answer"
    assert [is_answer(text) for text in ("A: 2", "x\n#### 2", "so A: 2", "")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("accepted", "step", "right", "error"),
    [
        ([], "#### 1,800", True, None),
        (["<<3*3=9>>9"], "A: 9", True, None),
        (["<<3*3=9>>9", "<<9+2=11>>11"], "#### 9", None, None),
        (["<<3*3=9>>9"], "#### 1200", None, None),
        (["<<3*3=9>>9"], "#### 10", False, "grounding"),
        (["That makes 9 and then 10."], "#### 10", True, None),
        (["<<3-12=-9>>9"], "#### -9", True, None),
        ([], "#### 10", None, None),
        (["<<3*3=9>>9"], "#### nine", False, "form"),
        ([], "<<3*3=9>>9\n#### 9", True, None),
        ([], "<<3*3=10>>10\n#### 10", False, "arithmetic"),
    ],
)
def test_an_answer_is_judged_by_what_stands_before_it(
    accepted: list[str], step: str, right: bool | None, error: str | None
) -> None:
    verdict = check_step(SHOP, accepted, step)
    assert (verdict.right, verdict.error) == (right, error)


@pytest.mark.parametrize(
    ("accepted", "step", "untraced"),
    [
        ([], "<<3*1200=3600>>", ()),
        ([], "<<25*3=75>>", ()),
        ([], "<<1200/2=600>>", ()),
        ([], "<<1200*.15=180>> <<180*.85=153>> <<1.15*100=115>>", ()),
        ([], "<<77*3=231>>", ("77",)),
        ([], "<<77*3=231>> <<231+1=232>>", ("77",)),
        (["She has 77 pens."], "<<77*3=231>>", ()),
        (["<<10/3=3.333333>>"], "<<3.33*2=6.66>>", ()),
        (["<<x+1=78>>"], "<<78+1=79>>", ()),
    ],
)
def test_operands_are_traced_to_question_and_accepted_steps(
    accepted: list[str], step: str, untraced: tuple[str, ...]
) -> None:
    verdict = check_step(SHOP, accepted, step)
    assert verdict.right is True
    assert verdict.untraced == untraced


def test_the_labeler_can_count_untraced_operands() -> None:
    labels = {
        name: Gsm8kLabeler(untraced=name, unconfirmed="right").label(SHOP, [], "<<77*3=231>>231")
        for name in ("right", "unknown", "wrong")
    }
    assert {name: (label.right, label.error) for name, label in labels.items()} == {
        "right": (True, None),
        "unknown": (None, None),
        "wrong": (False, "grounding"),
    }
    assert Gsm8kLabeler(untraced="wrong").label(SHOP, [], "<<77*3=232>>232").error == "arithmetic"
    assert Gsm8kLabeler(untraced="wrong").label(SHOP, [], "she has 77").right is None
    with pytest.raises(ConfigError, match="untraced='no'"):
        Gsm8kLabeler(untraced="no")


def test_a_solution_is_judged_to_its_first_answer() -> None:
    verdict = check_solution(SHOP, stepwise(SHOP.solution))
    assert ([v.kind for v in verdict.steps], verdict.wrong, verdict.untraced) == (["marked", "marked", "answer"], 0, 0)
    assert (verdict.answer, verdict.correct) == (1800, True)
    wrong = check_solution(SHOP, "<<3*1200=36>>36\n\n\n\n#### 36\n\n#### 1800")
    assert ([v.right for v in wrong.steps], wrong.wrong, wrong.answer, wrong.correct) == ([False, True], 1, 36, False)
    assert check_solution(SHOP, "<<3*3=9>>9").answer is None
    assert check_solution(SHOP, "").correct is False
    labeler = Gsm8kLabeler()
    assert labeler.answer_right(SHOP, "\n\n#### $1,800.00")
    assert not labeler.answer_right(SHOP, "it is 1800")


@pytest.mark.parametrize("error", ["arithmetic", "transcription", "form"])
def test_planted_errors_are_found_and_nothing_else(error: str) -> None:
    chance = random.Random(error)
    for _ in range(200):
        a, b = chance.randrange(2, 400), Fraction(chance.randrange(1, 4000), 100)
        sign = chance.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        expression, stated = f"{a}{sign}{float(b)}", f"{float(value)}"
        good = f"It is {a} {sign} {float(b)} = $<<{expression}={stated}>>{stated} now."
        assert check_step(SHOP, [], good).right is True
        off = f"{float(value) + chance.choice([-50, 7, 1200])}"
        bad = {
            "arithmetic": f"$<<{expression}={off}>>{off}",
            "transcription": f"$<<{expression}={stated}>>{float(off) + 7777}",
            "form": good[: chance.randrange(good.index("<<") + 2, good.index(">>") + 1)],
        }[error]
        assert check_step(SHOP, [], bad).error == error
    assert error in ERRORS


def test_long_and_hostile_marks_end_quickly() -> None:
    for inside in ("9" * 5000 + "=1", "(" * 3000 + "=1", "1" + "+1" * 3000 + "=3001", "=" * 3000):
        assert check_step(SHOP, [], f"<<{inside}>>1").error == "form"
    assert check_step(SHOP, [], "<<1/3=0.333>>0." + "3" * 5000).right is True
    assert check_step(SHOP, [], "<" * 20_000).error == "form"
