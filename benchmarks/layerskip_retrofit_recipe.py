"""The full LayerSkip recipe beside a retrofit, for the same CPU time on the same texts: what it does to exits and to the model.

The recipe fine-tunes the whole checkpoint on the texts that the retrofit's run wrote and kept, until the CPU time is used up.
Before and after: how often each exit's token is the last layer's on held-out texts of the untouched model, and the last layer's
perplexity on text that people wrote.

    python benchmarks/layerskip_retrofit_recipe.py CHECKPOINT --run-dir runs/retrofit --human pages.txt --cpu-seconds 400
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import telltale
from measurement import write_result
from telltale.models.exits import exit_quality
from telltale.train import TrainConfig, train
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.loop import Callback, StepState

LENGTH = 192


@dataclass
class Texts:
    """The retrofit's texts, one behind another."""

    train: Tensor
    held_out: Tensor


class Until(Callback):
    """Stops the run, as Ctrl-C does, when it has used so many seconds of CPU time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.process_time() + seconds
        self.steps = 0

    def on_step_end(self, state: StepState) -> None:
        """See :class:`Callback`."""
        self.steps = state.step
        print(f"step {state.step}: loss {state.loss:.3f}", flush=True)
        if time.process_time() >= self._end:
            os.kill(os.getpid(), signal.SIGINT)


def tokens_of(file: Path) -> Tensor:
    """All texts of a run's file."""
    lines = [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
    return torch.tensor([token for line in lines for token in line])


def measured(model: Any, own: Tensor, human: Tensor) -> dict[str, Any]:
    """Agreement of each exit on the model's own text, and the last layer's perplexity on people's."""
    own_rows = own[: len(own) // LENGTH * LENGTH].view(-1, LENGTH)
    human_rows = human[: len(human) // LENGTH * LENGTH].view(-1, LENGTH)
    agreement = exit_quality(model, own_rows.split(8)).agreement
    loss = exit_quality(model, human_rows.split(8)).losses[-1]
    return {
        "agreement_by_exit": agreement,
        "perplexity": math.exp(loss),
        "tokens": [own_rows.numel(), human_rows.numel()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True, help="the retrofit's")
    parser.add_argument("--human", type=Path, required=True, help="text that people wrote")
    parser.add_argument("--cpu-seconds", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = telltale.load(given.checkpoint, dtype="float32")
    texts = Texts(tokens_of(given.run_dir / "texts.jsonl"), tokens_of(given.run_dir / "held_out.jsonl"))
    human = torch.tensor(tokenizer(given.human.read_text())["input_ids"][: 24 * LENGTH])
    before = measured(model, texts.held_out, human)
    print(f"before: {before}", flush=True)
    config = TrainConfig(
        steps=10_000,
        batch_size=4,
        sequence_length=LENGTH,
        learning_rate=given.learning_rate,
        schedule="constant",
        warmup_steps=5,
        evaluate_every=10_000,
        checkpoint_every=10_000,
        precision="bfloat16",
    )
    stop = Until(given.cpu_seconds)
    with tempfile.TemporaryDirectory() as folder:
        train(model, texts, config, run_dir=Path(folder) / "run", layerskip=LayerSkipConfig(), callbacks=[stop])
    after = measured(model.eval(), texts.held_out, human)
    print(f"after {stop.steps} steps: {after}", flush=True)
    write_result(
        "layerskip_retrofit_recipe",
        cpu_seconds=given.cpu_seconds,
        learning_rate=given.learning_rate,
        steps=stop.steps,
        tokens_trained=stop.steps * config.batch_size * LENGTH,
        before=before,
        after=after,
    )


if __name__ == "__main__":
    main()
