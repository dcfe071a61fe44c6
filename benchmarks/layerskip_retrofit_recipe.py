"""The full LayerSkip recipe beside a retrofit at equal CPU time: what each makes of the exits, and of the model.

The retrofit comes first, texts and all. Then the recipe fine-tunes the whole checkpoint, on the texts that the retrofit's run
wrote, for as many CPU seconds. Each model writes behind the same held-out prompts; acceptance is the share of tokens of its own
text that an exit's draft has right. Perplexity is the last layer's on text that people wrote. The predicted speed-up is that of the
best exit and draft length at this machine's pass costs.

Both arms are resumable: Ctrl-C, and the same command again goes on.

    python benchmarks/layerskip_retrofit_recipe.py CHECKPOINT TEXT... --human pages.txt --run-dir runs/equal-time
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import telltale
from measurement import write_result
from telltale.config import from_mapping, parse_overrides
from telltale.decode.costs_report import best_draft
from telltale.decode.pass_costs import costs_of
from telltale.models import open_decoder
from telltale.models.decoder import Decoder
from telltale.models.draft_exits import attached
from telltale.models.exits import exit_quality
from telltale.runs.files import JsonLines
from telltale.runs.run_dir import RunDir
from telltale.train import TrainConfig, train
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.loop import Callback, StepState
from telltale.train.own_text import Prompt, Prompts, collect, write
from telltale.train.retrofit import RetrofitConfig, RetrofitResult, retrofit, untrained

LENGTH, BATCH = 192, 4
"""Tokens of a row, and rows of a step, of the recipe; and of the text that perplexity is measured on."""
HUMAN_ROWS = 24
AT_ONCE = 64
"""States that a head reads at a time."""


@dataclass
class Texts:
    """The retrofit's texts, one behind another."""

    train: Tensor
    held_out: Tensor


class Spent:
    """CPU seconds of one arm, those of earlier processes included."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = JsonLines(path)
        self._before = max((line["seconds"] for line in self._log), default=0.0)
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.process_time() - self._began

    def note(self) -> None:
        """Keep it for the next process."""
        self._log.append({"seconds": self.seconds})


class Until(Callback):
    """Stops the run, as Ctrl-C does, when its time is used up."""

    def __init__(self, spent: Spent, seconds: float) -> None:
        self._spent, self._seconds = spent, seconds

    def on_step_end(self, state: StepState) -> None:
        """See :class:`Callback`."""
        self._spent.note()
        print(f"step {state.step}: loss {state.loss:.3f}, {self._spent.seconds:.0f} CPU seconds", flush=True)
        if self._spent.seconds >= self._seconds:
            os.kill(os.getpid(), signal.SIGINT)


def tokens_of(file: Path) -> Tensor:
    """All texts of a run's file."""
    lines = [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
    return torch.tensor([token for line in lines for token in line])


def accepted(
    decoder: Decoder, prompts: Sequence[Prompt], config: RetrofitConfig, ends: list[int], path: Path
) -> list[float]:
    """Of each exit, 1..L-1, how often its token is the last layer's on what the model writes behind ``prompts``; ``path`` is for
    the states."""
    texts = write(
        decoder,
        prompts,
        new_tokens=config.new_tokens,
        temperatures=[0.0] * len(prompts),
        end_tokens=ends,
        generator=torch.Generator(),
    )
    assert texts is not None
    layers = list(range(1, decoder.layers))
    with collect(decoder, texts, exits=layers, late_layers=(), path=path, report=lambda *_: True) as states:
        rows = states.written.nonzero().view(-1)
        last = _read(decoder, states.last(rows))
        return [float((_read(decoder, states.exit(layer, rows)) == last).float().mean()) for layer in layers]


def _read(decoder: Decoder, states: Tensor) -> Tensor:
    return torch.cat([decoder.greedy(part) for part in states.split(AT_ONCE)])


def perplexity(model: Any, human: Tensor) -> float:
    """The last layer's."""
    rows = human[: len(human) // LENGTH * LENGTH].view(-1, LENGTH)
    return math.exp(exit_quality(model, rows.split(BATCH)).losses[-1])


def best(decoder: Decoder, acceptance: dict[int, list[float]]) -> dict[str, Any]:
    """The exit and draft length that should be the fastest, and how fast."""
    costs = costs_of(decoder, 1)
    (speedup, length), layer = max((best_draft(costs, layer, own), layer) for layer, own in acceptance.items())
    return {"exit_layer": layer, "draft_length": length, "predicted_speedup": speedup}


def judged(
    model: Any, prompts: Sequence[Prompt], config: RetrofitConfig, human: Tensor, ends: list[int], folder: Path
) -> dict[str, Any]:
    """A model whose exits are read by final norm and head."""
    folder.mkdir(parents=True, exist_ok=True)
    found = accepted(open_decoder(model, backend="fused"), prompts, config, ends, folder / "states.bin")
    return {
        "acceptance_by_exit": found,
        "perplexity": perplexity(model, human),
        "best": best(open_decoder(model), {layer: [share] for layer, share in enumerate(found, 1)}),
    }


def retrofitted(
    checkpoint: Path, model: Any, tokenizer: Any, prompts: Prompts, config: RetrofitConfig, folder: Path
) -> tuple[RetrofitResult, float]:
    """The first arm, and its CPU seconds."""
    spent = Spent(folder / "retrofit-seconds.jsonl")
    trunk = open_decoder(model, backend="fused")
    try:
        result = retrofit(
            trunk, tokenizer, prompts, config, checkpoint=checkpoint, run_dir=folder / "retrofit", resume=True
        )
    finally:
        spent.note()
    if not result.finished:
        raise SystemExit("The retrofit was interrupted; run the command again to go on.")
    return result, spent.seconds


def fine_tuned(
    checkpoint: Path, texts: Texts, folder: Path, seconds: float, given: argparse.Namespace
) -> dict[str, Any]:
    """The second arm, for so many CPU seconds: its last checkpoint and what it took."""
    config = TrainConfig(
        steps=100_000,
        batch_size=BATCH,
        sequence_length=LENGTH,
        learning_rate=given.learning_rate,
        schedule="constant",
        warmup_steps=5,
        evaluate_every=100_000,
        checkpoint_every=20,
        precision=given.precision,
    )
    spent, place = Spent(folder / "recipe-seconds.jsonl"), folder / "recipe"
    if spent.seconds < seconds:
        model, tokenizer = telltale.load(checkpoint, dtype="float32")
        train(
            model,
            texts,
            config,
            run_dir=place,
            layerskip=LayerSkipConfig(),
            tokenizer=tokenizer,
            resume=True,
            callbacks=[Until(spent, seconds)],
        )
    if spent.seconds < seconds:
        raise SystemExit("The recipe was interrupted; run the command again to go on.")
    last = RunDir.open(place).latest_checkpoint()
    assert last is not None
    return {
        "folder": last[1],
        "steps": last[0],
        "cpu_seconds": spent.seconds,
        "tokens_trained": last[0] * BATCH * LENGTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="prompts, as `telltale layerskip retrofit` takes them")
    parser.add_argument("--human", type=Path, required=True, help="text that people wrote")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--about", help="the checkpoint in words; its name if left out")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of RetrofitConfig")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the recipe; the paper's for fine-tuning")
    parser.add_argument("--precision", default="float32", help="of the recipe")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = from_mapping(RetrofitConfig, parse_overrides(given.set))
    model, tokenizer = telltale.load(given.checkpoint, dtype="float32")
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    prompts = Prompts(given.texts, tokenizer, longest=config.new_tokens, seed=config.seed)
    held_out = prompts.draw(max(1, config.texts // 8), held_out=True)
    human = torch.tensor(tokenizer(given.human.read_text())["input_ids"][: HUMAN_ROWS * LENGTH])
    untouched = judged(model, held_out, config, human, ends, given.run_dir)
    print(f"untouched: {untouched}", flush=True)

    made, seconds = retrofitted(given.checkpoint, model, tokenizer, prompts, config, given.run_dir)
    acceptance = {one.exit_layer: one.acceptance for one in made.reports}
    decoder = open_decoder(model)
    with attached(model, untrained(decoder, config)):
        decoder.open_draft_exits()
    first = {
        "cpu_seconds": seconds,
        "acceptance_by_draft": acceptance,
        "perplexity": untouched["perplexity"],
        "best": best(decoder, acceptance),
    }
    print(f"retrofit: {first}", flush=True)

    run = given.run_dir / "retrofit"
    texts = Texts(tokens_of(run / "texts.jsonl"), tokens_of(run / "held_out.jsonl"))
    second = fine_tuned(given.checkpoint, texts, given.run_dir, seconds, given)
    tuned, _ = telltale.load(second.pop("folder"), dtype="float32")
    second |= judged(tuned, held_out, config, human, ends, given.run_dir)
    print(f"recipe: {second}", flush=True)
    write_result(
        "layerskip_retrofit_recipe",
        about=given.about or given.checkpoint.name,
        layers=decoder.layers,
        learning_rate=given.learning_rate,
        texts=config.texts,
        held_out_prompts=len(held_out),
        untouched=untouched,
        retrofit=first,
        recipe=second,
    )


if __name__ == "__main__":
    main()
