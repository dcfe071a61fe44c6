"""Draft exits made by ``telltale layerskip retrofit``, on a real checkpoint: do they pay, alone and beside n-gram drafts?

Three kinds of prompts that were not trained on: chats (a JSONL file of ``question`` or ``prompt``), code (beginnings of modules of
Python's standard library, named with ``--modules``) and text with repetition (a paragraph that is to be rewritten). For each kind a
short sweep on prompts of its own finds the best fixed exit and draft length; then plain decoding, the exit alone at that point,
``auto`` with exits, n-grams alone and n-grams with exits take turns. Every contestant's tokens must be those of plain decoding.
The bound is what drafting costs on this machine before anything is trained, and the acceptance it asks for.

    python benchmarks/layerskip_retrofit.py CHECKPOINT --chats test.jsonl --paragraphs paragraphs.json --report report.json
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import telltale
from measurement import interleave, ratio, write_result
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.costs_report import draft_bound
from telltale.decode.pass_costs import costs_of
from telltale.models import open_decoder

MODULES = ("copy", "os", "pprint", "selectors", "locale", "secrets")
LENGTHS = (1, 2, 3)


def chat_prompts(tokenizer: Any, file: Path, count: int) -> list[list[int]]:
    """Questions that the retrofit has not seen, through the checkpoint's template."""
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    chosen = random.Random(1).sample(lines, count)
    return [templated(tokenizer, one.get("question") or one["prompt"]) for one in chosen]


def code_prompts(tokenizer: Any, modules: list[str], count: int) -> list[list[int]]:
    """Beginnings of functions in modules that were held out."""
    draw, found = random.Random(2), []
    for place in range(count):
        text = (Path(sysconfig.get_paths()["stdlib"]) / f"{modules[place % len(modules)]}.py").read_text()
        starts = [
            index
            for index in range(len(text))
            if text.startswith("\ndef ", index) or text.startswith("\nclass ", index)
        ]
        start = draw.choice(starts[: max(1, len(starts) // 2)])
        found.append(tokenizer(text[start : start + 1500])["input_ids"][:96])
    return found


def repeating_prompts(tokenizer: Any, file: Path, count: int) -> list[list[int]]:
    """Requests to rewrite a paragraph."""
    return [templated(tokenizer, one) for one in random.Random(3).sample(json.loads(file.read_text()), count)]


def templated(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a chat with one question."""
    asked = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


class Contestant:
    """One way to decode the prompts of a kind; keeps what it drafted."""

    def __init__(self, method: Any, prompts: list[list[int]], new_tokens: int, end: list[int]) -> None:
        self._run = lambda prompt: method.generate(prompt, max_new_tokens=new_tokens, eos_token_id=end)
        self._prompts = prompts
        self.tokens: list[list[int]] = []
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.by_exit: Counter[str] = Counter()
        self.by_position: list[list[int]] = []

    def __call__(self) -> int:
        results = [self._run(prompt) for prompt in self._prompts]
        self.tokens = [result.tokens[0].tolist() for result in results]
        self.drafted, self.accepted, self.by_exit = Counter(), Counter(), Counter()
        positions: list[list[int]] = [[], []]
        for result in results:
            stats = result.stats
            self.drafted.update(getattr(stats, "drafted_by_source", {}))
            self.accepted.update(getattr(stats, "accepted_by_source", {}))
            self.by_exit.update({str(layer): count for layer, count in getattr(stats, "rounds_by_exit", {}).items()})
            for total, own in zip(positions, ("drafted_by_position", "accepted_by_position"), strict=True):
                for place, number in enumerate(getattr(stats, own, [])):
                    total.extend([0] * (place + 1 - len(total)))
                    total[place] += number
        self.by_position = positions
        return sum(map(len, self.tokens))

    def about(self) -> dict[str, Any]:
        """What it drafted in its last run, by source, exit and position."""
        return {
            "drafted": dict(self.drafted),
            "accepted": dict(self.accepted),
            "rounds_by_exit": dict(self.by_exit),
            "drafted_by_position": self.by_position[0],
            "accepted_by_position": self.by_position[1],
        }


def swept(
    decoder: Any, prompts: list[list[int]], new_tokens: int, end: list[int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every draft exit with every draft length against plain decoding, on prompts for this alone; and the best of them."""
    plain = Contestant(Autoregressive(decoder), prompts, new_tokens, end)
    points = []
    for layer in decoder.drafting_exits:
        for length in LENGTHS:
            one = Contestant(SelfSpeculative(decoder, layer, length), prompts, new_tokens, end)
            timings = interleave({"plain": plain, "exit": one}, rounds=2)
            drafted = max(1, one.drafted["exit"])
            points.append(
                {
                    "exit_layer": layer,
                    "draft_length": length,
                    "acceptance": one.accepted["exit"] / drafted,
                    "speedup": ratio(timings["plain"], timings["exit"])["cpu"],
                }
            )
    return points, max(points, key=lambda point: point["speedup"])


def measure(
    decoder: Any, prompts: list[list[int]], *, new_tokens: int, rounds: int, tuning: int, end: list[int]
) -> dict[str, Any]:
    """All contestants on the prompts of one kind, the first ``tuning`` of which find the fixed point."""
    points, best = swept(decoder, prompts[:tuning], new_tokens // 2, end)
    measured = prompts[tuning:]
    made: dict[str, Callable[[], Any]] = {
        "plain": lambda: Autoregressive(decoder),
        "exit_fixed": lambda: SelfSpeculative(decoder, best["exit_layer"], best["draft_length"]),
        "exit_auto": lambda: SelfSpeculative(decoder),
        "ngram": lambda: SelfSpeculative(decoder, drafter="ngram"),
        "ngram_and_exit": lambda: SelfSpeculative(decoder, drafter="both"),
    }
    contestants = {name: Contestant(make(), measured, new_tokens, end) for name, make in made.items()}
    timings = interleave(contestants, rounds=rounds)
    wrong = [name for name, one in contestants.items() if one.tokens != contestants["plain"].tokens]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)} did not decode what plain decoding does")
    plain, ngram = timings["plain"], timings["ngram"]
    return {
        "prompts": len(measured),
        "tokens": plain.tokens[-1],
        "sweep": points,
        "best_fixed": best,
        "over_plain": {name: ratio(plain, timing) for name, timing in timings.items() if name != "plain"},
        "ngram_and_exit / ngram": ratio(ngram, timings["ngram_and_exit"]),
        "drafts": {name: one.about() for name, one in contestants.items() if name != "plain"},
        "equal_to_plain": True,
        "timings": timings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--chats", type=Path, required=True, help="JSONL of question or prompt")
    parser.add_argument("--paragraphs", type=Path, required=True, help="JSON list of requests to rewrite a paragraph")
    parser.add_argument(
        "--modules", nargs="+", default=list(MODULES), help="modules of the standard library held out of training"
    )
    parser.add_argument("--report", type=Path, help="report.json of the retrofit's run, copied into the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tuning", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    began = time.perf_counter()
    model, tokenizer = telltale.load(given.checkpoint, dtype=given.dtype)
    decoder = open_decoder(model)
    decoder.open_draft_exits()
    if decoder.draft_heads is None:
        raise SystemExit(f"{given.checkpoint} has no draft exits; run `telltale layerskip retrofit` first")
    costs, third = costs_of(decoder, 1), max(1, decoder.layers // 3)
    bounds = [asdict(draft_bound(costs, layer)) for layer in sorted({*decoder.drafting_exits, third})]
    print(f"bound: {bounds}", flush=True)
    count = given.prompts + given.tuning
    kinds = {
        "chat": chat_prompts(tokenizer, given.chats, count),
        "code": code_prompts(tokenizer, given.modules, count),
        "repetition": repeating_prompts(tokenizer, given.paragraphs, count),
    }
    end = [tokenizer.eos_token_id]
    runs = {}
    for name, prompts in kinds.items():
        runs[name] = measure(
            decoder, prompts, new_tokens=given.new_tokens, rounds=given.rounds, tuning=given.tuning, end=end
        )
        over = {kind: round(one["cpu"], 3) for kind, one in runs[name]["over_plain"].items()}
        both = runs[name]["ngram_and_exit / ngram"]["cpu"]
        print(f"{name}: over plain {over}, n-gram and exit over n-gram {both:.3f}", flush=True)
    write_result(
        "layerskip_retrofit",
        dtype=given.dtype,
        layers=decoder.layers,
        bounds=bounds,
        relative_cost_of_width={str(width): costs.relative(width) for width in (1, 2, 3, 4, 6, 8)},
        training=None if given.report is None else json.loads(given.report.read_text()),
        new_tokens=given.new_tokens,
        seconds=time.perf_counter() - began,
        runs=runs,
    )


if __name__ == "__main__":
    main()
