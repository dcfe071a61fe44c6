"""The checkers of arguments: what they let through they give back, what they refuse they name."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from telltale.config import LARGEST_SEED, check_choice, check_integer, check_range, check_seed, read_yaml
from telltale.errors import ConfigError


def test_values_in_range_are_given_back():
    assert check_integer("count", 3, low=1, high=3) == 3
    assert check_seed(LARGEST_SEED) == LARGEST_SEED
    found = check_range("rate", 2, low=2, high=2)
    assert (found, type(found)) == (2.0, float)
    assert check_range("limit", math.inf, low=0.0) == math.inf
    assert check_range("share", 1e-9, above=0.0, below=1.0) == 1e-9


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (True, {"low": 0}, "x=True is not a number; expected a number >= 0"),
        ("1", {"low": 0}, "x='1' is not a number"),
        (math.nan, {}, "x=nan is out of range; expected a number."),
        (0.0, {"above": 0.0, "below": 1.0}, "x=0.0 is out of range; expected a number > 0.0 and < 1.0."),
        (1.0, {"above": 0.0, "below": 1.0}, "x=1.0 is out of range"),
        (-1, {"low": 0, "high": 2}, "x=-1 is out of range; expected a number >= 0 and <= 2."),
        (math.inf, {"low": 0, "finite": True}, "x=inf is out of range; expected a finite number >= 0."),
    ],
)
def test_a_number_outside_of_its_range_is_named(value, bounds, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_range("x", value, **bounds)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, 0, 9])
def test_what_is_no_integer_of_the_range_is_refused(value):
    with pytest.raises(ConfigError, match="expected an integer from 1 to 8"):
        check_integer("count", value, low=1, high=8)


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ConfigError, match="mode='c' is unknown; expected one of 'a', 'b'"):
        check_choice("mode", "c", ("a", "b"))
    with pytest.raises(ConfigError, match="seed=-1"):
        check_seed(-1)


@pytest.mark.parametrize("content", [b"\xff\x00", b"a: [1\nb: }", b"[" * 5000])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid YAML") as caught:
        read_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
