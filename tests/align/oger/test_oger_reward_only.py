"""The reward function for trainers that stay as they are."""

import math

import pytest
import torch
from small_runs import arguments, policy
from trl import GRPOConfig, GRPOTrainer

from telltale.align.oger import CallableEncoder, HashedNGramEncoder, make_oger_reward
from telltale.errors import ConfigError, DataError

ENCODER = CallableEncoder(
    lambda texts: torch.tensor([[1.0, 0.0] if text.startswith("a") else [0.0, 1.0] for text in texts]),
    name="first letter",
)


def right(prompts, completions, **_):
    return [None if text == "?" else float("wrong" not in text) for text in completions]


def test_the_bonus_of_each_completion_against_its_own_teachers():
    reward = make_oger_reward(right, ENCODER, coef=0.5)
    texts = ["a one", "b one", "b wrong", "b", "?"]
    teachers = [["a"], ["a", "b"], ["a"], [], ["a"]]
    found = reward(prompts=["p"] * 5, completions=texts, teachers=teachers)
    assert found == pytest.approx([1.0, 1.25, 0.0, 1.0, None])
    damped = reward(prompts=["p"], completions=["b"], teachers=[["a"]], oger_entropy=[math.log(2)])
    assert damped == pytest.approx([1.25])


def test_conversations_and_missing_teachers():
    reward = make_oger_reward(lambda completions, **_: [1.0] * len(completions), HashedNGramEncoder())
    chat = [[{"role": "assistant", "content": "1 2 3"}]]
    assert reward(prompts=[[{"role": "user", "content": "q"}]], completions=chat, teachers=[["1 2 3"]]) == [
        pytest.approx(1.0)
    ]
    with pytest.raises(DataError, match="no column 'teachers'"):
        reward(prompts=["p"], completions=["a"])
    with pytest.raises(ConfigError, match="similarity='median'"):
        make_oger_reward(right, ENCODER, similarity="median")
    with pytest.raises(ConfigError, match="coef=-1"):
        make_oger_reward(right, ENCODER, coef=-1)


@pytest.mark.long
def test_trls_own_trainer_takes_it(tmp_path):
    from datasets import Dataset

    from telltale.tasks import routes

    rows = [
        {"prompt": p.prompt, "teachers": [routes.solution(p, route) for route in ("S5", "D2")]}
        for p in routes.split()[0][:8]
    ]
    trainer = GRPOTrainer(
        policy(),
        make_oger_reward(routes.verify, "ngrams"),
        GRPOConfig(**arguments(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=routes.build_tokenizer(),
    )
    trainer.train()
    assert trainer.reward_func_names == ["oger_reward"]
