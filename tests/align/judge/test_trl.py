"""The reward function inside TRL's own GRPOTrainer: two steps of a tiny policy, plain and conversational prompts."""

from __future__ import annotations

import math

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from align.judge.tiny_judges import OBJECTIVES, tiny_judge, tiny_tokenizer
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.templates import template_pattern

PROMPTS = ("add two and three", "add five and four please")


def trainer_of(folder, reward, *, conversational: bool, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    rows = [{"prompt": [{"role": "user", "content": text}] if conversational else text} for text in PROMPTS * 2]
    return GRPOTrainer(
        model=policy,
        reward_funcs=[reward],
        processing_class=tiny_tokenizer(),
        args=GRPOConfig(
            str(folder),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        **options,
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conversational", [False, True])
def test_two_steps_of_grpo(tmp_path, conversational):
    judge = tiny_judge()
    seen = []
    reward = judge.as_trl_reward()

    def watched(prompts, completions, completion_ids, **columns):
        scores = reward(prompts, completions, completion_ids, **columns)
        seen.append((prompts, completions, scores))
        return scores

    trainer = trainer_of(tmp_path, watched, conversational=conversational)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(seen) == 2
    for prompts, completions, scores in seen:
        assert scores == reward(prompts, completions)
        assert all(isinstance(score, float) for score in scores)
    steps = [record for record in trainer.state.log_history if "reward" in record]
    assert len(steps) == 2
    for record, (_, _, scores) in zip(steps, seen, strict=True):
        assert record["reward"] == pytest.approx(math.fsum(scores) / len(scores), abs=1e-5)
        parts = [record[f"judge/contribution/{name}"] for name in OBJECTIVES]
        assert math.fsum(parts) == pytest.approx(record["reward"], abs=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_judges_folder_is_a_reward_model_to_trl(tmp_path, monkeypatch):
    """TRL loads it by Auto class, pads, and takes ``logits[:, 0]``: the same scores as the judge gives messages."""
    judge = tiny_judge()
    judge.model.config.gating_pattern = list(template_pattern(judge.tokenizer))
    judge.save(tmp_path / "judge")
    trainer = trainer_of(tmp_path / "run", str(tmp_path / "judge"), conversational=True)
    assert type(trainer.reward_funcs[0]) is JudgeModel
    seen = []
    calculate = trainer._calculate_rewards

    def watched(inputs, prompts, completions, *rest, **more):
        rewards = calculate(inputs, prompts, completions, *rest, **more)
        seen.append((prompts, completions, rewards[:, 0].tolist()))
        return rewards

    monkeypatch.setattr(trainer, "_calculate_rewards", watched)
    trainer.train()
    assert len(seen) == 2
    for prompts, completions, rewards in seen:
        wanted = judge.score([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        assert rewards == pytest.approx(wanted, abs=1e-5)
