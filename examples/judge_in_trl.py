"""Use a judge as the reward of TRL's GRPOTrainer (pip install 'telltale[align]').

python examples/judge_in_trl.py path/to/judge path/to/policy prompts.txt runs/policy
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from telltale.align.judge import Judge


def main(judge_path: str, policy: str, prompts: str, output: str) -> None:
    questions = Path(prompts).read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions if question]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[Judge.load(judge_path).as_trl_reward()],
        args=GRPOConfig(
            output,
            max_steps=100,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=128,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            logging_steps=1,  # judge/reward/NAME and judge/contribution/NAME are among the metrics
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:5])
