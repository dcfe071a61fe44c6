"""Arithmetic as people write it: exact, against Python's own on random expressions, and nothing else is read."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telltale.errors import DataError
from telltale.tasks.arithmetic import DEEPEST, LONGEST, evaluate, number, numbers, places


def test_by_hand(subtests: pytest.Subtests) -> None:
    for expression, value in [
        ("0.1+0.2", Fraction(3, 10)),
        ("2+3*4", 14),
        ("10-4-3", 3),
        ("48/2/4", 6),
        ("560//100", 5),
        ("-7//2", -4),
        ("2*-3", -6),
        ("--3", 3),
        ("+.5", Fraction(1, 2)),
        ("72.", 72),
        ("1,200*.5", 600),
        ("10,440,000/2", 5220000),
        ("$3.50*2", 7),
        ("5%", Fraction(1, 20)),
        ("(10+10)%*5", 1),
        ("2(3+4)", 14),
        ("(1+2)(3)", 9),
        ("6/2(3)", 1),
        ("-2(3)", -6),
        ("¾*4", 3),
        ("2½", Fraction(5, 2)),
        ("⅓+⅔", 1),
        ("3×4÷2−1", 5),
        (" ( 1 + 1 ) ", 2),
    ]:
        with subtests.test(expression=expression):
            assert evaluate(expression) == value


def test_what_is_not_arithmetic(subtests: pytest.Subtests) -> None:
    for expression in [
        "",
        " ",
        "1 2",
        "150 000",
        "1.2.3",
        "2**3",
        "2^3",
        "1,2",
        "12,5000",
        "1,000,00",
        "(1",
        "1)",
        "()",
        "x+1",
        "2x",
        "5-",
        "*5",
        "100%.01",
        "3%2",
        "%",
        "1=1",
        "2:15",
        "1e3",
        "0x10",
        "__import__('os')",
        "½½",
        "5½3",
    ]:
        with subtests.test(expression=expression), pytest.raises(DataError, match="is not arithmetic"):
            evaluate(expression)


def test_limits() -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate("1/(2-2)")
    with pytest.raises(ZeroDivisionError):
        evaluate("1//0")
    assert evaluate("9" * LONGEST) == int("9" * LONGEST)
    with pytest.raises(DataError, match="longer than"):
        evaluate("9" * (LONGEST + 1))
    assert evaluate("(" * DEEPEST + "1" + ")" * DEEPEST) == 1
    with pytest.raises(DataError, match="nests deeper"):
        evaluate("(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1))
    assert evaluate("-" * (LONGEST - 2) + "1") == 1


sums = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(sums)
def test_against_python_with_fractions(expression: str) -> None:
    import re

    same = re.sub(r"\d+", lambda digits: f"Fraction({int(digits[0])})", expression)
    try:
        expected = eval(same, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
        return
    assert evaluate(expression) == expected


@given(st.text(alphabet="0123456789.,+-*/()%$ ½x=", max_size=30))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    with contextlib.suppress(DataError, ZeroDivisionError):
        assert isinstance(evaluate(text), Fraction)
    assert number(text) is None or isinstance(number(text), Fraction)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,080 in all", 1080),
        ("-5 apples", -5),
        ("-$5", -5),
        ("−7", -7),
        ("about 2.50", Fraction(5, 2)),
        ("3/4", Fraction(3, 4)),
        ("3/0", 3),
        ("on 3/4/2025", 3),
        ("none", None),
        ("", None),
        ("9" * (LONGEST + 1), None),
    ],
)
def test_the_first_number(text: str, value: Fraction | int | None) -> None:
    assert number(text) == value


def test_numbers_as_they_are_written() -> None:
    assert numbers("$1,200 and .5 of 3/4, then 72.") == ["1,200", ".5", "3", "4", "72."]
    assert [places(written) for written in ("3", "3.", ".25", "1,200.5", "1.5*2")] == [0, 0, 2, 1, 0]
