"""A language model as the judge's backbone beside a sentence encoder: experiments A, B and C and LLMBar on the same rows.

SmolLM2-135M-Instruct (bfloat16; the state of the last token, and for the gate that of the token that closes the user's turn) and
MiniLM (the mean over prompt and response as a pair, and over the prompt for the gate) are read as ``telltale judge features``
reads any backbone. Beside them are the hashed words with MiniLM's prompts of ``judge_experiments.py``. All three see the same drawn
part of RM-Bench and AlpacaEval and the whole of LLMBar; the JSON says how much. Features are kept under ``runs/`` and a run that is
stopped goes on; ``--features-only`` stops before the fits.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import telltale
from judge_data import CACHE, Judged, alpaca_eval, encoder_folder, llmbar, rm_bench
from judge_experiments import GATE, Source, asked, one_seed, spread, words_and_minilm
from measurement import write_result
from telltale.align.judge.benchmarks import Item
from telltale.align.judge.data import Conversation
from telltale.align.judge.features import Backbone, as_backbone, extract, open_backbone

BACKBONES = ("SmolLM2-135M-Instruct", "MiniLM", "hashed words")
CONTEXT = 768
"""Tokens that the language model reads of a conversation; MiniLM has 512 positions."""
FITTED = replace(GATE, steps=800)
FITTED_SCOPES = ("raw", "within-prompt")


def drawn(folder: Path, prompts: int, asked_prompts: int, comparisons: int) -> tuple[list[Item], list[Judged]]:
    """RM-Bench's prompts, as many of each domain as its share; AlpacaEval's, with some comparisons of each."""
    chance = random.Random(0)
    items = rm_bench(folder)
    kept: list[Item] = []
    for domain in sorted({item.subset for item in items}):
        own = [item for item in items if item.subset == domain]
        kept += chance.sample(own, round(prompts * len(own) / len(items)))
    by_prompt: dict[str, list[Judged]] = {}
    for row in alpaca_eval(folder):
        by_prompt.setdefault(row.prompt, []).append(row)
    chosen = chance.sample(list(by_prompt), asked_prompts)
    return kept, [row for prompt in chosen for row in chance.sample(by_prompt[prompt], comparisons)]


def texts_of(items: Sequence[Item], judged: Sequence[Judged]) -> list[tuple[str, str]]:
    """Every (prompt, response) of the experiments once."""
    found = [(asked(item), text) for item in items for text in (*item.chosen, *item.rejected)]
    found += [(row.prompt, text) for row in judged for text in (row.first, row.second)]
    return list(dict.fromkeys(found))


def opened(name: str, checkpoint: Path) -> Backbone:
    """A backbone as the judge reads it."""
    if name == "MiniLM":
        return open_backbone(encoder_folder(), dtype="bfloat16")
    model, tokenizer = telltale.load(checkpoint)
    return as_backbone(model.model.to(torch.bfloat16), tokenizer, context_length=CONTEXT)


def features_of(name: str, checkpoint: Path, texts: list[tuple[str, str]]) -> tuple[dict[str, Any], Source | Any]:
    """What was read, and a reader of responses and prompts."""
    backbone = opened(name, checkpoint)
    rows = [
        Conversation(f"row {place}", [{"role": "user", "content": p}, {"role": "assistant", "content": r}])
        for place, (p, r) in enumerate(texts)
    ]
    began = time.process_time()
    store = extract(backbone.model, backbone.tokenizer, rows, CACHE / f"{name}-{len(texts)}", backbone, batch_size=8)
    seconds = time.process_time() - began
    found = store.load()
    told = {
        "responses": len(texts),
        "size": found.responses.shape[1],
        "prompt cut": float(found.truncated.double().mean()),
        "response cut": float(found.response_truncated.double().mean()),
        "cpu_seconds": seconds,
    }
    print(name, told, flush=True)
    places = {text: place for place, text in enumerate(texts)}
    first = {prompt: place for place, (prompt, _) in reversed(list(enumerate(texts)))}
    scale = found.responses.double().std(0).mean().float()
    # The last column is constant, as in the hashed words: these ridge regressions have no intercept.
    responses = torch.hstack([found.responses / scale, torch.ones(len(texts), 1)])

    def read(prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        return responses[[places[pair] for pair in zip(prompts, answers, strict=True)]]

    return told, (read, lambda prompts: found.prompts[[first[prompt] for prompt in prompts]])


def sources(
    folder: Path, checkpoint: Path, items: list[Item], judged: list[Judged]
) -> dict[str, tuple[dict[str, Any], Source]]:
    """The three kinds of features over the same rows."""
    outside = llmbar(folder)
    words = words_and_minilm(folder)
    common: dict[str, Any] = {"items": items, "judged": judged, "outside": outside}
    common |= {"gate": FITTED, "scopes": FITTED_SCOPES}
    found: dict[str, tuple[dict[str, Any], Source]] = {}
    for name in BACKBONES[:2]:
        told, (read, states) = features_of(name, checkpoint, texts_of([*items, *outside], judged))
        found[name] = (told, Source(reader=_always(read), states=states, **common))
    return found | {BACKBONES[2]: ({"size": 133}, replace(words, **common))}


def _always(read: Any) -> Callable[[Sequence[str], int], Any]:
    return lambda texts, seed: read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TELLTALE_JUDGE_DATA"))
    parser.add_argument("--checkpoint", type=Path, required=True, help="SmolLM2-135M-Instruct, a folder or a GGUF file")
    parser.add_argument("--prompts", type=int, default=120, help="of RM-Bench")
    parser.add_argument("--alpaca-prompts", type=int, default=100)
    parser.add_argument("--comparisons", type=int, default=4, help="of each of AlpacaEval's prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--features-only", action="store_true")
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    if arguments.data is None:
        raise SystemExit("give --data (or TELLTALE_JUDGE_DATA), the folder of the preference data.")
    torch.set_num_threads(1)
    folder = Path(arguments.data)
    items, judged = drawn(folder, arguments.prompts, arguments.alpaca_prompts, arguments.comparisons)
    every = sources(folder, arguments.checkpoint, items, judged)
    if arguments.features_only:
        return
    seeds: dict[str, list[dict[str, Any]]] = {name: [] for name in every}
    for seed in arguments.seeds:
        for name, (_, source) in every.items():
            print(name, flush=True)
            seeds[name].append(one_seed(source, seed))
        if not arguments.trial:  # after every seed: a run that is stopped leaves what it has
            write_result(
                "judge_backbones",
                rows={"RM-Bench prompts": len(items), "AlpacaEval comparisons": len(judged)},
                gate_steps=FITTED.steps,
                backbones={
                    name: {
                        "read": told,
                        "mean_and_deviation": {k: spread(seeds[name], k) for k in ("A", "B", "C", "llmbar")},
                        "gate_minus": [one["gate_minus"] for one in seeds[name]],
                        "held_out_rho": [one["held_out_rho"] for one in seeds[name]],
                        "cpu_seconds": [one["cpu_seconds"] for one in seeds[name]],
                    }
                    for name, (told, _) in every.items()
                },
            )


if __name__ == "__main__":
    main()
