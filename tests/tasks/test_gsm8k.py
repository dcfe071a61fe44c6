"""GSM8K files: read as published, refused by line, cut into steps and put together again byte for byte."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telltale.errors import DataError
from telltale.tasks.gsm8k import (
    Problem,
    few_shot_prompt,
    final_answer,
    linewise,
    read,
    read_model_solutions,
    same_number,
    segment,
    stepwise,
)

PENS = {
    "question": "Ada buys 3 pens at $1,200 each and sells half of them. What did she pay?",
    "answer": "She pays 3*1200 = $<<3*1200=3600>>3,600.\n\nThat is all.\n#### 3,600",
}
ANSWERED = {
    "question": "Bo has 2 figs and eats 5% of 40 more. How many is that?",
    "ground_truth": "He eats 40*.05 = <<40*.05=2>>2.\nA: 2",
    "small": {"is_correct": True, "solution": "<<40*.05=2>>2\nA: 2"},
    "large": {"is_correct": False, "solution": "<<40*.5=20>>20\nA: 20"},
}


def written(path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_problems_are_read_as_published(tmp_path) -> None:
    (problem,) = read(written(tmp_path / "train.jsonl", PENS))
    assert problem == Problem(PENS["question"], PENS["answer"])
    assert problem.prompt == PENS["question"] + "\n\n"
    assert problem.messages == [{"role": "user", "content": PENS["question"]}]
    assert problem.answer == 3600
    assert problem.steps == ["She pays 3*1200 = $<<3*1200=3600>>3,600.", "", "That is all.", "#### 3,600"]
    assert linewise("\n\n".join(problem.steps)) == PENS["answer"]


def test_model_solutions_keep_their_flags(tmp_path) -> None:
    (answered,) = read_model_solutions(written(tmp_path / "solutions.jsonl", ANSWERED))
    assert answered.problem.answer == 2
    assert [(a.model, a.correct, final_answer(a.solution)) for a in answered.answers] == [
        ("small", True, 2),
        ("large", False, 20),
    ]


def test_line_separators_inside_texts_do_not_end_a_record(tmp_path) -> None:
    odd = PENS | {"question": "a\u2028b\u0085c\rd"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8", newline="")
    assert read(tmp_path / "odd.jsonl")[0].question == odd["question"]


@given(st.text(alphabet="ab \n\r\t#<=>", max_size=40))
def test_steps_give_the_text_back_byte_for_byte(text: str) -> None:
    steps = segment(stepwise(text))
    assert linewise("\n\n".join(steps)).encode() == text.encode()
    assert "\n".join(steps) == text


def test_few_shot_prompt_shows_whole_solutions_in_the_same_form() -> None:
    example, problem = Problem("One?", "<<1=1>>1\n#### 1"), Problem("Two?", "#### 2")
    assert few_shot_prompt(problem, [example]) == "One?\n\n<<1=1>>1\n\n#### 1\n\nTwo?\n\n"
    assert few_shot_prompt(problem, []) == problem.prompt


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x\n#### 42", 42),
        ("x\n\n#### $1,234.50 \n", Fraction(2469, 2)),
        ("#### -7", -7),
        ("A: .5", Fraction(1, 2)),
        ("A: $-3", -3),
        ("A: 3/4 of it", Fraction(3, 4)),
        ("A: 12%", 12),
        ("A: 9.", 9),
        ("#### 1\n#### 2", 2),
        ("#### nothing", None),
        ("####", None),
        ("the answer is 4", None),
        ("so #### 4", None),
        ("A: 1\nA: none", None),
        ("", None),
    ],
)
def test_final_answers(text: str, answer: Fraction | int | None) -> None:
    assert final_answer(text) == answer


def test_calculator_noise_is_the_same_number_and_a_thousandth_is_not() -> None:
    assert same_number(Fraction("16.830000000000002"), Fraction("16.83"))
    assert same_number(Fraction(0), Fraction(0))
    assert not same_number(Fraction("16.831"), Fraction("16.83"))
    assert not same_number(Fraction(1, 10**12), Fraction(0))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("", "line 2 is not valid JSON"),
        ("[1]", "line 2 is a JSON list; expected an object"),
        ('{"question": "q"}', "line 2: 'answer' is missing among question"),
        ("{}", "line 2: 'question' is missing among no fields"),
        ('{"question": "q", "answer": 42}', "line 2: 'answer' is '42'; expected a text"),
        ('{"question": " ", "answer": "#### 1"}', "line 2: 'question' is ' '; expected a text"),
        (
            '{"question": "q", "answer": "it is 1"}',
            "line 2: 'answer' ends in 'it is 1'; expected a last line like '#### 42'",
        ),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(PENS) + "\n" + line + "\n" + json.dumps(PENS))
    with pytest.raises(DataError) as caught:
        read(path)
    assert complaint in str(caught.value)
    assert "bad.jsonl" in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(PENS).encode() + b'\n{"question": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2 is not valid JSON"):
        read(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"small": "A: 2"}, "'small' is 'A: 2'; expected 'solution' and 'is_correct'"),
        ({"small": {"solution": "A: 2", "is_correct": 1}}, "expected 'solution' and 'is_correct'"),
        ({"small": {"is_correct": True}}, "line 1, small: 'solution' is missing"),
        ({"ground_truth": "two"}, "expected a last line like 'A: 42'"),
    ],
)
def test_bad_model_solutions_are_refused(tmp_path, change: dict, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        read_model_solutions(written(tmp_path / "bad.jsonl", ANSWERED | change))
    assert complaint in str(caught.value)


def test_files_without_problems_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        read(tmp_path / "empty.jsonl")
    bare = {name: ANSWERED[name] for name in ("question", "ground_truth")}
    with pytest.raises(DataError, match="no model solutions"):
        read_model_solutions(written(tmp_path / "bare.jsonl", bare))
    with pytest.raises(DataError, match="has no answer"):
        _ = Problem("q", "none").answer
