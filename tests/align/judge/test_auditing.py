"""Audits of scorers whose bias is known, because it was built in."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from telltale.align.judge.auditing import MARKDOWN, REFUSALS, audit
from telltale.align.judge.data import Conversation, Pair
from telltale.errors import ConfigError, DataError


class Scorer:
    """``rule`` of the response's text."""

    def __init__(self, rule) -> None:
        self.rule = rule

    def score(self, messages):
        return [self.rule(conversation[-1]["content"]) for conversation in messages]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def responses(prompts: int = 40) -> list[Conversation]:
    """Four to a prompt, of seeded lengths; odd ones have markdown."""
    chance = random.Random(0)
    found = []
    for prompt in range(prompts):
        for index in range(4):
            text = "word " * chance.randrange(3, 40) + ("\n- **point**" if index % 2 else "")
            found.append(
                Conversation(f"{prompt}.{index}", [user(f"prompt {prompt}"), {"role": "assistant", "content": text}])
            )
    return found


def quality(text: str) -> float:
    return random.Random(text).random()


def pairs(count: int = 60) -> list[Pair]:
    """The better response is the longer one four times out of five."""
    chance = random.Random(1)
    found = []
    for index in range(count):
        long, short = "good " * chance.randrange(8, 20), "bad " * chance.randrange(2, 7)
        chosen, rejected = (long, short) if index % 5 else (short, long)
        found.append(Pair(str(index), [user(f"prompt {index}")], chosen + f"#{index}", rejected + f"#{index}"))
    return found


def test_a_judge_of_length_is_found_out() -> None:
    found = audit(Scorer(lambda text: float(len(text.split()))), responses(), preferences=pairs(), resamples=100)
    length = next(row for row in found.properties if row.name == "length")
    assert length.within.value == pytest.approx(1.0)
    assert length.within.low > 0.99
    assert found.pairs.judge == found.pairs.length_only
    assert found.pairs.length_only.value == pytest.approx(0.8)
    assert (found.pairs.chosen_shorter.value, found.pairs.chosen_shorter.count) == (0.0, 12)
    assert found.position == 0.0
    assert "follows length" in found.findings[0]
    assert "about length" in found.findings[-2]
    assert "below chance" in found.findings[-1]


def test_a_judge_of_something_else_is_cleared() -> None:
    found = audit(Scorer(quality), responses(200), resamples=200)
    assert found.findings == ()
    for row in found.properties:
        if not math.isnan(row.within.value):
            assert max(row.within.low, -row.within.high) < 0.1
    assert found.pairs is None
    assert found.position is None
    assert (found.responses, found.prompts) == (800, 200)


def test_what_differs_between_prompts_alone_is_not_within_them() -> None:
    """Long prompts get long answers and high scores, but among answers to one prompt length does not matter."""
    rows = [
        Conversation(
            f"{p}.{i}", [user(f"prompt {p}"), {"role": "assistant", "content": "word " * (5 * p + i) + f"{p} {i}"}]
        )
        for p in range(30)
        for i in range(4)
    ]
    base = {row.messages[1]["content"]: p + 0.4 * quality(row.id) for row in rows for p in [int(row.id.split(".")[0])]}
    found = audit(Scorer(lambda text: base[text]), rows, resamples=200)
    length = next(row for row in found.properties if row.name == "length")
    assert length.pooled.value > 0.95
    assert abs(length.within.value) < 0.35
    assert not found.findings


def test_markdown_and_refusals_are_counted() -> None:
    assert len(MARKDOWN.findall("# Title\n- one\n- **two**\n1. three\n`code` and\n```\nx\n```")) == 8
    for text in ("I'm sorry, but no", "I cannot help", "Sorry, I can't", "As an AI model", "  I can't do that"):
        assert REFUSALS.match(text), text
    for text in ("Sure: I can", "The sorry state", "You cannot lose"):
        assert not REFUSALS.match(text), text
    found = audit(Scorer(lambda text: float("**" in text) + 0.01 * quality(text)), responses(), resamples=100)
    markdown = next(row for row in found.properties if row.name == "markdown")
    assert markdown.within.value > 0.8
    assert any("follows markdown" in finding for finding in found.findings)


def test_a_judge_that_sees_the_order_is_found_out() -> None:
    class First:
        def score(self, messages):
            return [1.0 - 0.5 * (index % 2) for index in range(len(messages))]

    found = audit(First(), preferences=pairs(10), resamples=10)
    assert found.position == pytest.approx(0.5)
    assert any("order of a pair" in finding for finding in found.findings)


def test_tokens_can_be_counted_by_the_judges_own_tokenizer() -> None:
    found = audit(Scorer(lambda text: float(len(text))), responses(), tokens=len, resamples=20)
    assert next(row for row in found.properties if row.name == "length").within.value == pytest.approx(1.0)


def test_it_prints_saves_and_repeats(tmp_path: Path) -> None:
    first, second = (
        audit(Scorer(quality), responses(20), preferences=pairs(20), resamples=50, seed=3) for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()
    json.dumps(first.to_dict(), allow_nan=False)
    console = Console(record=True, width=120)
    console.print(first)
    shown = console.export_text()
    assert "length alone" in shown
    assert "within prompts" in shown
    page = first.to_html(tmp_path / "audit.html").read_text()
    assert "chosen is shorter" in page
    assert "<script src=" not in page


def test_a_page_has_no_axis_without_data_and_no_figure_of_no_pairs(tmp_path: Path) -> None:
    """Responses that differ in nothing that is counted, and a better response that is always the shorter one."""
    same = [
        Conversation(f"{p} {r}", [user(f"{p}"), {"role": "assistant", "content": f"word{r} w"}])
        for p in range(5)
        for r in range(2)
    ]
    shorter = [Pair(f"{p}", [user(f"{p}")], "short", "a longer text") for p in range(5)]
    assert "plotly-graph-div" not in audit(Scorer(quality), same, resamples=20).to_html(tmp_path / "a.html").read_text()
    found = audit(Scorer(quality), preferences=shorter, resamples=20)
    page = found.to_html(tmp_path / "b.html").read_text()
    assert "plotly-graph-div" in page
    assert ">nan" not in page
    console = Console(width=120)
    with console.capture() as captured:
        console.print(found)
    assert "nan" not in captured.get()


def test_bad_input() -> None:
    with pytest.raises(DataError, match="nothing to audit on"):
        audit(Scorer(quality))
    with pytest.raises(ConfigError, match="level=1"):
        audit(Scorer(quality), responses(2), level=1.0)
    with pytest.raises(ConfigError, match="resamples=0"):
        audit(Scorer(quality), responses(2), resamples=0)
