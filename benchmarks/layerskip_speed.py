"""Tokens per second on a recipe-trained model of 1.7M parameters: Transformers' four greedy ways beside ours.

Claims: self-speculation >= 2.5x Transformers' ``assistant_early_exit`` at equal exit layer and draft length; our plain loop
>= 1.9x plain ``generate``; our best >= 3x plain ``generate`` and ahead of prompt lookup. Also n-gram drafts, exit drafts and both.
One thread, interleaved, greedy, identical prompts; outputs are compared token by token. Our planning decoders live through all
rounds, as they would in a program: a first pass over the prompts, not timed, is where they learn. ``--model small`` and ``narrow``
measure the 44M-parameter model in bfloat16 (claim: self-speculation >= 1.3x our own plain loop).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import logging

import peers
from checkpoints import corpus, narrow_corpus, small, small_narrow, tiny
from measurement import interleave, ratio, write_result
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.models import load_model, load_tokenizer

PROMPT_LENGTH, NEW_TOKENS = 64, 128
SLOW = (
    "autoregressive_pytorch_only",
    "self_speculative_fixed_pytorch_only",
    "transformers_prompt_lookup_3",
    "transformers_prompt_lookup_10",
)
"""Left out on the larger model, where each takes seconds per prompt."""


def contestants(model: Any, exit_layer: int, draft_length: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def ours(decoder: Any) -> Callable[[Tensor], Tensor]:
        return lambda prompt: decoder.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens[0]

    same = {"exit_layer": exit_layer, "draft_length": draft_length}
    return {
        "transformers_plain": lambda p: peers.plain(model, p, new_tokens=NEW_TOKENS),
        "transformers_early_exit": lambda p: peers.early_exit(model, p, new_tokens=NEW_TOKENS, **same),
        "transformers_prompt_lookup_3": lambda p: peers.prompt_lookup(model, p, new_tokens=NEW_TOKENS, draft_length=3),
        "transformers_prompt_lookup_6": lambda p: peers.prompt_lookup(model, p, new_tokens=NEW_TOKENS, draft_length=6),
        "transformers_prompt_lookup_10": lambda p: peers.prompt_lookup(
            model, p, new_tokens=NEW_TOKENS, draft_length=10
        ),
        "autoregressive": ours(Autoregressive(model)),
        "autoregressive_pytorch_only": ours(Autoregressive(model, backend="fused")),
        "self_speculative_fixed": ours(SelfSpeculative(model, **same)),
        "self_speculative_fixed_pytorch_only": ours(SelfSpeculative(model, **same, backend="fused")),
        "self_speculative_auto": ours(SelfSpeculative(model)),
        "ngram_auto": ours(SelfSpeculative(model, drafter="ngram")),
        "ngram_and_exit_auto": ours(SelfSpeculative(model, drafter="both")),
    }


def measure(
    model: Any, prompts: list[Tensor], *, exit_layer: int, draft_length: int, rounds: int, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    runners = {name: run for name, run in contestants(model, exit_layer, draft_length).items() if name not in skip}
    outputs = {name: [run(prompt) for prompt in prompts] for name, run in runners.items()}
    plain = outputs["transformers_plain"]
    identical = {
        name: sum(torch.equal(a, b) for a, b in zip(tokens, plain, strict=True)) for name, tokens in outputs.items()
    }

    def timed(run: Callable[[Tensor], Tensor]) -> Callable[[], int]:
        return lambda: sum(run(prompt).numel() for prompt in prompts)

    timings = interleave({name: timed(run) for name, run in runners.items()}, rounds=rounds)
    ours = [name for name in timings if not name.startswith("transformers")]
    best = max(ours, key=lambda name: timings[name].summary()["tokens_per_second"])
    lookups = [name for name in timings if "prompt_lookup" in name]
    best_lookup = max(lookups, key=lambda name: timings[name].summary()["tokens_per_second"])
    ratios = {
        "autoregressive / transformers_plain": ratio(timings["transformers_plain"], timings["autoregressive"]),
        "self_speculative_fixed / transformers_early_exit": ratio(
            timings["transformers_early_exit"], timings["self_speculative_fixed"]
        ),
        "self_speculative_fixed / autoregressive": ratio(timings["autoregressive"], timings["self_speculative_fixed"]),
        "self_speculative_auto / autoregressive": ratio(timings["autoregressive"], timings["self_speculative_auto"]),
        "best / transformers_plain": ratio(timings["transformers_plain"], timings[best]),
        "best / best prompt lookup": ratio(timings[best_lookup], timings[best]),
        "ngram_and_exit_auto / ngram_auto": ratio(timings["ngram_auto"], timings["ngram_and_exit_auto"]),
        "ngram_and_exit_auto / self_speculative_auto": ratio(
            timings["self_speculative_auto"], timings["ngram_and_exit_auto"]
        ),
    }
    if "autoregressive_pytorch_only" in timings:
        ratios |= {
            "autoregressive_pytorch_only / transformers_plain": ratio(
                timings["transformers_plain"], timings["autoregressive_pytorch_only"]
            ),
            "self_speculative_fixed_pytorch_only / transformers_early_exit": ratio(
                timings["transformers_early_exit"], timings["self_speculative_fixed_pytorch_only"]
            ),
        }
    for name, timing in timings.items():
        print(
            f"  {name:38s} {timing.summary()['cpu_ms_per_token']:.4f} ms/token  identical {identical[name]}/{len(prompts)}"
        )
    for name, value in ratios.items():
        print(f"  {name:62s} {value['cpu']:.2f}x cpu  {value['wall']:.2f}x wall")
    return {
        "exit_layer": exit_layer,
        "draft_length": draft_length,
        "best": best,
        "best_prompt_lookup": best_lookup,
        "timings": timings,
        "ratios": ratios,
        "identical_to_plain_generate": identical,
        "prompts": len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "small", "narrow"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    large = arguments.model != "tiny"
    path = {"tiny": lambda: tiny("both"), "small": small, "narrow": small_narrow}[arguments.model]()
    text = narrow_corpus(load_tokenizer(path)) if arguments.model == "narrow" else corpus(4096 if large else 1024)
    prompts = text.prompts(arguments.prompts, length=PROMPT_LENGTH, seed=3)
    runs = {}
    for dtype in ("bfloat16",) if large else ("float32", "bfloat16"):
        model = load_model(path, dtype=dtype)
        for exit_layer, draft_length in ((10, 4),) if large else ((2, 3), (4, 3)):
            print(dtype, "exit", exit_layer, "draft", draft_length, flush=True)
            runs[f"{dtype} exit {exit_layer} draft {draft_length}"] = measure(
                model,
                prompts,
                exit_layer=exit_layer,
                draft_length=draft_length,
                rounds=arguments.rounds,
                skip=SLOW if large else (),
            )
    write_result(f"layerskip_speed_{arguments.model}", prompt_length=PROMPT_LENGTH, new_tokens=NEW_TOKENS, runs=runs)


if __name__ == "__main__":
    main()
