"""A program that extracts features of forty conversations: killed and started again, or under torchrun, by the tests."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaModel

from align.judge.tiny_judges import tiny_tokenizer
from align.judge.tiny_official import llama_config
from telltale.align.judge import features as extraction
from telltale.align.judge.data import Conversation
from telltale.align.judge.model import JudgeConfig

ROWS, SHARD_ROWS = 40, 6


def conversations(rows: int = ROWS) -> list[Conversation]:
    """Responses of different lengths to prompts that repeat."""
    words = ["add", "two", "and", "three", "four", "five", "the", "answer", "is", "a", "b", "c", "d"]
    return [
        Conversation(
            f"row {i}",
            [
                {"role": "user", "content": " ".join(words[: 2 + i // 4 % 7])},
                {"role": "assistant", "content": " ".join(words[i % 5 : i % 5 + 1 + i % 8])},
            ],
        )
        for i in range(rows)
    ]


def backbone() -> LlamaModel:
    torch.manual_seed(3)
    return LlamaModel(llama_config()).eval()


def main(out: Path, pause: float) -> None:
    torch.set_num_threads(1)
    whole = extraction.batch_features

    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(pause)
        return whole(*arguments, **options)  # type: ignore[arg-type]

    extraction.batch_features = slowly  # type: ignore[assignment]
    extraction.extract(
        backbone(), tiny_tokenizer(), conversations(), out, JudgeConfig(), batch_size=4, shard_rows=SHARD_ROWS
    )
    print("done", os.environ.get("RANK", "0"), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
