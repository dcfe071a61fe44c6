"""Fine-tune with the LayerSkip recipe in Transformers' Trainer (pip install 'telltale[train]').

python examples/recipe_in_trainer.py path/to/checkpoint my_text_folder runs/tuned
"""

import sys

import torch
from transformers import TrainingArguments

import telltale
from telltale.tasks.code import read_tokens
from telltale.train.hf_trainer import LayerSkipTrainer
from telltale.train.layerskip import LayerSkipConfig


class Windows(torch.utils.data.Dataset):
    """The text cut into rows of equal length."""

    def __init__(self, tokens: torch.Tensor, length: int = 128) -> None:
        self.rows = tokens[: tokens.numel() // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main(checkpoint: str, text: str, output: str) -> None:
    model, tokenizer = telltale.load(checkpoint, dtype="float32")
    trainer = LayerSkipTrainer(
        model=model,
        args=TrainingArguments(output, max_steps=100, per_device_train_batch_size=8, learning_rate=1e-4, report_to=[]),
        train_dataset=Windows(read_tokens(text, tokenizer)),
        layerskip=LayerSkipConfig(p_max=0.1, e_scale=1.0),
    )
    trainer.train()
    trainer.save_model(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
