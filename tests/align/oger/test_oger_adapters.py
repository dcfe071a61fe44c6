"""The reward alone, called as verl and verifiers call a reward function (their calls are written out here)."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from telltale.align.oger import CallableEncoder, verifiers_reward, verl_reward
from telltale.errors import ConfigError, DataError

ENCODER = CallableEncoder(
    lambda texts: torch.tensor([[1.0, 0.0] if text.startswith("a") else [0.0, 1.0] for text in texts]),
    name="first letter",
)


def ends_right(completions, answer, **_):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [None if text == "b ?" else float(text.endswith(true)) for text, true in zip(texts, answer, strict=True)]


def call_of_verl(compute_score, rows, **reward_kwargs):
    """``BatchRewardManager.verify`` of volcengine/verl, once texts are decoded: columns are object arrays."""
    extras = np.empty(len(rows), dtype=object)
    extras[:] = [row["extra_info"] for row in rows]
    return compute_score(
        data_sources=np.array(["routes"] * len(rows), dtype=object),
        solution_strs=[row["text"] for row in rows],
        ground_truths=[row["answer"] for row in rows],
        extra_infos=extras,
        **reward_kwargs,
    )


def call_of_verifiers(func, states):
    """``Rubric._call_group_reward_func`` of PrimeIntellect-ai/verifiers: arguments by name, only those that are asked for."""
    names = inspect.signature(func).parameters
    assert set(names) & {"states", "prompts", "completions", "answers", "tasks", "infos"}, (
        "a group function by its names"
    )
    merged = {
        "prompts": [state["prompt"] for state in states],
        "completions": [state["completion"] for state in states],
        "answers": [state.get("answer", "") for state in states],
        "states": states,
        "tasks": [None for _ in states],
        "infos": [state.get("info", {}) for state in states],
        "parser": object(),
    }
    return func(**{name: value for name, value in merged.items() if name in names})


ROWS = [("a 1", ["a"], 1.0), ("b 1", ["a", "b"], 1.25), ("b 2", ["a"], 0.0), ("b 1", [], 1.0), ("b ?", ["a"], 0.0)]


def test_verl_gets_the_bonus_of_each_row():
    score = verl_reward(ends_right, ENCODER, coef=0.5)
    rows = [
        {"text": text, "answer": "1", "extra_info": {"prompt": "p", "teachers": np.array(own, dtype=object)}}
        for text, own, _ in ROWS
    ]
    assert call_of_verl(score, rows, unknown_option=1) == pytest.approx([expected for *_, expected in ROWS])
    rows[1]["extra_info"] = {"prompt": "p"}
    with pytest.raises(DataError, match=r"extra_info of row 1 has no 'teachers' \(but prompt\)"):
        call_of_verl(score, rows)
    rows[0]["extra_info"] = None
    with pytest.raises(DataError, match=r"extra_info of row 0 has no 'prompt' \(but None\)"):
        call_of_verl(score, rows)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_verifiers_gets_the_bonus_of_each_rollout(kind):
    func = verifiers_reward(ends_right, ENCODER, coef=0.5)
    states = [
        {
            "prompt": [kind(role="user", content="p")],
            "completion": [kind(role="assistant", content=text)],
            "answer": "1",
            "info": {"teachers": own},
        }
        for text, own, _ in ROWS
    ]
    assert call_of_verifiers(func, states) == pytest.approx([expected for *_, expected in ROWS])
    assert func.__name__ == "oger_reward"
    with pytest.raises(DataError, match="info of row 0 has no 'teachers'"):
        call_of_verifiers(func, [states[0] | {"info": {}}])


def test_options_are_those_of_the_reward():
    for adapter in (verl_reward, verifiers_reward):
        with pytest.raises(ConfigError, match="similarity='median'"):
            adapter(ends_right, ENCODER, similarity="median")
