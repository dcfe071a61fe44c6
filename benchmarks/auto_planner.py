"""``auto`` against the best fixed exit layer and draft length, plain decoding and n-gram drafts: live, and on recordings.

Claim: within 5% of the best fixed point on every checkpoint, plain decoding being one. ``auto`` is one decoder that has seen
other prompts before, since what it learns persists; ``auto_fresh`` is made anew in every round and learns inside the
measurement. The fixed points that are run are the best three exits on the very texts that are measured, each at its best draft
length: which drafts would stand is known once a text is there.

``--record`` writes recordings; ``--replay`` plays plans on them only. Each recording has two halves: the planner's constants were
tuned on first halves, so the claim is judged on second ones; a plan that persists has decoded the other half before.
``--checkpoint NAME=PATH`` adds a folder or ``.gguf`` file, in bfloat16, with its draft exits if it has some.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints import corpus, small, tiny
from measurement import Timing, interleave, ratio, write_result
from planner_recordings import FOLDER, chat_prompts, code_prompts, listed, record, recorded
from telltale import load
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.drafting import FixedPlan, Plan
from telltale.decode.pass_costs import costs_of
from telltale.decode.planner import LONGEST, OnlinePlan
from telltale.decode.replay import MeasuredRounds, Recording, replay
from telltale.models import load_model, open_decoder
from telltale.models.decoder import Decoder

PROMPT_LENGTH, NEW_TOKENS, PROMPTS = 64, 128, 6
LENGTHS = (1, 2, 3, 4, 6, 8, 12)
"""Draft lengths of fixed points."""
CONFIGURATIONS: dict[str, tuple[Callable[[], Path], str, int, int]] = {
    "tiny recipe float32": (lambda: tiny("both"), "float32", 1024, 5),
    "tiny recipe bfloat16": (lambda: tiny("both"), "bfloat16", 1024, 5),
    "tiny plain float32": (lambda: tiny("none"), "float32", 1024, 5),
    "tiny plain bfloat16": (lambda: tiny("none"), "bfloat16", 1024, 5),
    "small recipe bfloat16": (small, "bfloat16", 4096, 3),
}
"""Checkpoint, dtype, vocabulary and rounds."""


Prompts = Callable[[int, int], dict[str, list[list[int]]]]
"""So many prompts by kind of text, from a seed; other seeds give others."""


def opened(name: str, extra: dict[str, str]) -> tuple[Decoder, Prompts]:
    """The decoder of a checkpoint, and its prompts."""
    if name not in extra:
        path, dtype, vocabulary, _ = CONFIGURATIONS[name]
        texts = corpus(vocabulary)

        def drawn(count: int, seed: int) -> dict[str, list[list[int]]]:
            return {name: listed(texts.prompts(count, length=PROMPT_LENGTH, seed=seed))}

        return open_decoder(load_model(path(), dtype=dtype)), drawn
    model, tokenizer = load(extra[name], dtype="bfloat16")

    def written(count: int, seed: int) -> dict[str, list[list[int]]]:
        kinds = {"code": code_prompts(tokenizer, 2 * count, length=PROMPT_LENGTH)}
        if tokenizer.chat_template:
            kinds["chat"] = chat_prompts(tokenizer, 2 * count)
        half = slice(seed % 2, None, 2)
        return {f"{name}, {kind}": own if len(own) <= count else own[half][:count] for kind, own in kinds.items()}

    return open_decoder(model), written


def online(recording: Recording, drafter: str = "exit") -> OnlinePlan:
    """A plan that knows nothing yet."""
    exits = recording.exits if drafter != "ngram" else []
    return OnlinePlan(recording.costs, exits=exits, lengths=range(1, LONGEST + 1), ngrams=drafter != "exit")


def fixed_rates(recording: Recording, drafter: str = "exit") -> dict[tuple[int, int], float]:
    """Tokens per second of plain decoding, (0, 0), and of every exit and draft length (exit 0: n-grams)."""
    plans: dict[tuple[int, int], Plan] = {(0, 0): FixedPlan(1, 0, "exit")}
    for layer in recording.exits if drafter == "exit" else (0,):
        plans |= {(layer, length): FixedPlan(layer, length, drafter) for length in LENGTHS}
    return {point: replay(recording, plan).rate for point, plan in plans.items()}


def played(recording: Recording, half: int) -> dict[str, Any]:
    """Plans on one half of a recording; those that persist have decoded the other one before."""
    before, own = recording.half(1 - half), recording.half(half)
    fixed = fixed_rates(own)
    best = max(fixed, key=lambda point: fixed[point])
    copies = max(fixed_rates(own, "ngram").values())
    found: dict[str, Any] = {"best_fixed_point": {"exit_layer": best[0], "draft_length": best[1]}}
    plain = fixed[0, 0]
    found |= {"best_fixed / plain": fixed[best] / plain, "best_fixed_ngram / plain": copies / plain}
    for name, drafter in (("auto", "exit"), ("ngram_auto", "ngram"), ("both_auto", "both")):
        plan = online(recording, drafter)
        replay(before, plan)
        found[f"{name} / plain"] = replay(own, plan).rate / plain
        if drafter == "exit":
            found["table"] = plan.describe()
    found["auto_fresh / plain"] = replay(own, online(recording)).rate / plain
    for name in ("auto", "auto_fresh"):
        found[f"{name} / best_fixed"] = found[f"{name} / plain"] / found["best_fixed / plain"]
    return found


def replays() -> dict[str, Any]:
    """Every recording that there is, by half."""
    found: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.json.gz")):
        recording = Recording.load(path)
        found[recording.about] = {}
        for half, name in enumerate(("tuned", "judged")):
            own = found[recording.about][name] = played(recording, half)
            ratios = "  ".join(f"{key} {value:.3f}" for key, value in own.items() if "/" in key)
            best = tuple(own["best_fixed_point"].values())
            print(f"{recording.about}, {name} half: best {best}  {ratios}", flush=True)
    return found


def points(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The best length of each exit on these texts, the best three exits of them, by predicted costs."""
    costs = costs_of(decoder, 1)
    exits = {
        layer: {length: costs.round(layer, length) for length in range(1, LONGEST + 1)}
        for layer in decoder.drafting_exits
    }
    copies = {length: costs.score(length + 1) for length in range(1, LONGEST + 1)}
    texts = [recorded(decoder, prompt, new_tokens=NEW_TOKENS) for prompt in prompts]
    measured = MeasuredRounds(costs.plain, exits, copies)
    rates = fixed_rates(Recording("", decoder.drafting_exits, costs, measured, texts))
    best = [max((rates[layer, length], layer, length) for length in LENGTHS) for layer in exits]
    return [(layer, length) for _, layer, length in sorted(best, reverse=True)[:3]]


def measure(decoder: Decoder, prompts: list[list[int]], others: list[list[int]], *, rounds: int) -> dict[str, Any]:
    """All contestants on ``prompts``; those that persist have decoded ``others`` before."""
    decoder.open_draft_exits()
    kept = {
        "auto": SelfSpeculative(decoder),
        "ngram_auto": SelfSpeculative(decoder, drafter="ngram"),
        "both_auto": SelfSpeculative(decoder, drafter="both"),
    }
    fixed = {
        f"exit {layer} draft {length}": SelfSpeculative(decoder, layer, length)
        for layer, length in points(decoder, prompts)
    }
    contestants = {"plain": Autoregressive(decoder)} | kept | fixed
    for method in kept.values():
        for prompt in others:
            method.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[])

    def run(make: Callable[[], Any]) -> Callable[[], int]:
        def work() -> int:
            method = make()
            return sum(method.generate(p, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens.numel() for p in prompts)

        return work

    runners = {name: run(lambda method=method: method) for name, method in contestants.items()}
    runners["auto_fresh"] = run(lambda: SelfSpeculative(decoder))
    timings = interleave(runners, rounds=rounds, warm_up=0)

    def speed(timing: Timing) -> float:
        return timing.summary()["cpu_ms_per_token"]

    drafted = min(fixed, key=lambda name: speed(timings[name]))
    best = min((drafted, "plain"), key=lambda name: speed(timings[name]))
    result: dict[str, Any] = {"best_drafting_point": drafted, "best_fixed_point": best}
    for name in ("auto", "auto_fresh", "ngram_auto", "both_auto"):
        result[f"{name} / plain"] = ratio(timings["plain"], timings[name])
    result["best_fixed / plain"] = ratio(timings["plain"], timings[best])
    result["auto / best_fixed"] = ratio(timings[best], timings["auto"])
    result["auto_fresh / best_fixed"] = ratio(timings[best], timings["auto_fresh"])
    print("  best", best, *(f"{name} {value['cpu']:.3f}" for name, value in result.items() if "/" in name), flush=True)
    table = next(iter(kept["auto"].plans.known.values())).describe()
    return result | {"table": table, "timings": timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write recordings and stop")
    parser.add_argument("--replay", action="store_true", help="play plans on the recordings and stop")
    parser.add_argument("--only", nargs="*", default=None, help="names of checkpoints; all if left out")
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=PATH of another one")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    extra = dict(one.split("=", 1) for one in arguments.checkpoint)
    names = [*CONFIGURATIONS, *extra] if arguments.only is None else arguments.only
    if arguments.record:
        for name in names:
            decoder, prompts_of = opened(name, extra)
            for recording in record(decoder, prompts_of(2 * arguments.prompts, 11), new_tokens=NEW_TOKENS):
                path = FOLDER / f"{recording.about.replace(', ', '-').replace(' ', '-').lower()}.json.gz"
                recording.save(path)
                print(f"wrote {path.name}: {path.stat().st_size} bytes", flush=True)
        return
    played = replays()
    if arguments.replay:
        return
    runs = {}
    for name in names:
        decoder, prompts_of = opened(name, extra)
        others = prompts_of(arguments.prompts, 12)
        for about, prompts in prompts_of(arguments.prompts, 11).items():
            print(about, flush=True)
            rounds = arguments.rounds or (3 if name in extra else CONFIGURATIONS[name][3])
            runs[about] = measure(decoder, prompts, others[about], rounds=rounds)
    lengths = {"prompt_length": PROMPT_LENGTH, "new_tokens": NEW_TOKENS, "prompts": arguments.prompts}
    write_result("auto_planner", **lengths, runs=runs, replays=played)


if __name__ == "__main__":
    main()
