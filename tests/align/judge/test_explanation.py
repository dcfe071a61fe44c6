"""Explanations add up bit for bit, whatever the numbers; comparisons do too; drawings show what is there."""

from __future__ import annotations

import io
import json
import math
import random
import struct
from dataclasses import replace

import pytest
from rich.console import Console

from telltale.align.judge.explanation import Comparison, Explanation, Term, bar
from telltale.align.judge.head import Head
from telltale.align.judge.judge import UnknownObjective, check_factors
from telltale.errors import ConfigError, DataError, NumericalError

NAMES = ("helpful", "safe", "verbosity")


def explanation(rewards=(0.5, 0.25, 0.75), coefficients=(0.6, 0.4, -0.2), weights=(0.6, 0.4, 0.0), **options):
    return Explanation.of(NAMES, rewards, weights, coefficients, **options)


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def printed(renderable, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def test_the_score_is_the_exact_sum_also_where_plain_addition_is_not():
    rewards, coefficients = (1e16, 1.0, -1e16), (1.0, 1.0, 1.0)
    found = Explanation.of(NAMES, rewards, (1.0, 1.0, 1.0), coefficients)
    assert found.score == 1.0 == math.fsum(found.contributions.values())
    assert sum(found.contributions.values()) != found.score, "the case has to tell fsum from sum"


def test_sum_and_products_are_exact_for_random_float32_values():
    generator = random.Random(0)
    for _ in range(200):
        rewards = [as_float32(generator.gauss(0, 1) * 10 ** generator.randint(-6, 6)) for _ in range(19)]
        weights = [as_float32(generator.random()) for _ in range(19)]
        found = Explanation.of([f"o{i}" for i in range(19)], rewards, weights, weights)
        assert found.score == math.fsum(term.contribution for term in found.terms)
        for term in found.terms:
            numerator, denominator = term.coefficient.as_integer_ratio()
            top, bottom = term.reward.as_integer_ratio()
            exact = term.contribution.as_integer_ratio()
            assert exact[0] * denominator * bottom == exact[1] * numerator * top


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(NumericalError, match="'safe'"):
        explanation(rewards=(0.5, bad, 0.5))


def test_a_json_round_trip_keeps_every_bit():
    found = explanation(rewards=(0.1, 1 / 3, 2 / 3))
    document = json.loads(json.dumps(found.to_dict()))
    assert document["score"] == found.score == math.fsum(term["contribution"] for term in document["terms"])
    assert [Term(**term) for term in document["terms"]] == list(found.terms)


def test_a_comparison_adds_up_and_changes_sign_with_its_sides():
    first, second = explanation(), explanation(rewards=(0.1, 0.9, 1.5))
    found = first.minus(second)
    assert found.difference == math.fsum(delta.contribution for delta in found.deltas)
    assert found.difference == pytest.approx(first.score - second.score, abs=1e-15)
    assert second.minus(first).difference == -found.difference
    assert found.same_gate
    assert first.minus(first).difference == 0.0
    assert json.loads(json.dumps(found.to_dict()))["difference"] == found.difference


def test_an_offset_of_an_objective_cancels_in_a_comparison():
    first, second = explanation(), explanation(rewards=(0.1, 0.9, 1.5))
    moved = [explanation(rewards=[r + 4.0 for r in side.rewards.values()]) for side in (first, second)]
    before, after = first.minus(second), moved[0].minus(moved[1])
    assert [d.contribution for d in after.deltas] == pytest.approx([d.contribution for d in before.deltas], abs=1e-12)
    assert moved[0].score != pytest.approx(first.score)


def test_judges_of_different_objectives_are_not_compared():
    other = Explanation.of(("a", "b", "c"), (1.0,) * 3, (1.0,) * 3, (1.0,) * 3)
    with pytest.raises(DataError, match=r"helpful, safe, verbosity and a, b, c"):
        Comparison(explanation(), other)


def test_the_table_lists_every_term_by_size_and_the_sum():
    found = explanation(truncated=True)
    text = printed(found)
    assert "truncated" in text
    assert [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in NAMES] == [
        "helpful",
        "verbosity",
        "safe",
    ]
    for term in found.terms:
        assert f"{term.contribution:+.4f}" in text
    assert f"{found.score:+.4f}" in text
    assert found.to_markdown().count("\n") == 5


def test_no_number_is_cut_off_in_a_terminal_of_80_columns():
    found = explanation()
    for line in printed(found, width=80).splitlines() + printed(found.minus(found), width=80).splitlines():
        assert "…" not in line
        assert len(line) <= 80


def test_a_comparison_says_when_the_prompts_differ():
    other = explanation(coefficients=(0.3, 0.7, -0.1))
    text = printed(explanation().minus(other))
    assert "different prompts" in text
    assert "different prompts" not in printed(explanation().minus(explanation()))


def test_bars_grow_from_the_middle():
    assert bar(1.0, 1.0, half=4).plain == "    │████"
    assert bar(-0.5, 1.0, half=4).plain == "  ██│    "
    assert bar(0.0, 0.0, half=4).plain == "    │    "


def test_pages_hold_the_numbers_and_a_figure(tmp_path):
    found = explanation()
    page = found.to_html(tmp_path / "one.html").read_text()
    for term in found.terms:
        assert term.objective in page
        assert f"{term.contribution:+.4f}" in page
    assert "plotly" in page
    pair = found.minus(explanation(rewards=(0.1, 0.9, 1.5))).to_html(tmp_path / "two.html").read_text()
    assert "better with probability" not in pair
    sure = replace(found.minus(found), probability=0.75, answered=True)
    assert sure.verdict == "the first is better with probability 0.75"
    unsure = replace(sure, answered=False).to_html(tmp_path / "three.html").read_text()
    assert "The first is better with probability 0.75 (don&#x27;t know: too close" in unsure
    assert "first minus second" in pair


def test_factors_are_checked_against_names_values_and_what_they_can_change():
    import torch

    transform = torch.eye(3)
    transform[2] -= torch.tensor([0.3, 0.1, 1.0])
    check_factors({"safe": 2.0, "helpful": 0.0}, NAMES, transform)
    with pytest.raises(UnknownObjective, match="Did you mean 'safe'") as caught:
        check_factors({"safty": 2.0}, NAMES, transform)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("objective 'safty' is unknown")
    for bad in (-1.0, math.nan, math.inf, "2", True):
        with pytest.raises(ConfigError, match="safe"):
            check_factors({"safe": bad}, NAMES, transform)
    with pytest.raises(ConfigError, match="nuisance"):
        check_factors({"verbosity": 2.0}, NAMES, transform)
    head = Head(NAMES, 4)
    head.set_transform(transform)
    assert head.scaled_transform({"safe": 2.0}).equal(transform * torch.tensor([1.0, 2.0, 1.0]))
