"""``auto`` against the best fixed exit layer and draft length of a sweep, and against plain decoding where drafting cannot
pay.

Claims: within 5% of the best fixed point on a recipe-trained checkpoint, and at most 5% slower than plain decoding on one
that was trained plainly. ``auto`` is one decoder that has seen other prompts before, since what it learns persists;
``auto_fresh`` is made anew in every round and learns inside the measurement.
"""

from __future__ import annotations

from typing import Any

import torch

from checkpoints import corpus, small, tiny
from measurement import interleave, ratio, write_result
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.costs_report import sweep
from telltale.models import load_model, open_decoder

PROMPT_LENGTH, NEW_TOKENS, PROMPTS = 64, 128, 6
DRAFT_LENGTHS = (1, 2, 4, 6)


def measure(path: Any, dtype: str, vocabulary: int, *, rounds: int, exits: list[int] | None = None) -> dict[str, Any]:
    decoder = open_decoder(load_model(path, dtype=dtype))
    prompts = corpus(vocabulary).prompts(PROMPTS, length=PROMPT_LENGTH, seed=11)
    swept = sweep(decoder, prompts[:3], exit_layers=exits, draft_lengths=DRAFT_LENGTHS, new_tokens=64, rounds=3)
    best = swept.best

    kept = SelfSpeculative(decoder)
    for prompt in corpus(vocabulary).prompts(PROMPTS, length=PROMPT_LENGTH, seed=12):
        kept.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[])

    def run(make: Any) -> Any:
        def work() -> int:
            method = make()
            return sum(method.generate(p, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens.numel() for p in prompts)

        return work

    timings = interleave(
        {
            "plain": run(lambda: Autoregressive(decoder)),
            "best_fixed": run(
                lambda: SelfSpeculative(decoder, exit_layer=best.exit_layer, draft_length=best.draft_length)
            ),
            "auto": run(lambda: kept),
            "auto_fresh": run(lambda: SelfSpeculative(decoder)),
        },
        rounds=rounds,
    )
    result = {
        "best_fixed_point": best,
        "auto / plain": ratio(timings["plain"], timings["auto"]),
        "auto_fresh / plain": ratio(timings["plain"], timings["auto_fresh"]),
        "best_fixed / plain": ratio(timings["plain"], timings["best_fixed"]),
        "auto / best_fixed": ratio(timings["best_fixed"], timings["auto"]),
        "timings": timings,
    }
    print(
        f"  best fixed exit {best.exit_layer} draft {best.draft_length} (sweep {best.speedup:.2f}x): "
        + "  ".join(
            f"{k} {result[k]['cpu']:.3f}"
            for k in ("auto / plain", "auto_fresh / plain", "best_fixed / plain", "auto / best_fixed")
        ),
        flush=True,
    )
    return result


def main() -> None:
    torch.set_num_threads(1)
    runs = {}
    for name, path, dtype, vocabulary, rounds, exits in (
        ("tiny recipe float32", tiny("both"), "float32", 1024, 7, None),
        ("tiny recipe bfloat16", tiny("both"), "bfloat16", 1024, 7, None),
        ("tiny plain float32", tiny("none"), "float32", 1024, 7, None),
        ("tiny plain bfloat16", tiny("none"), "bfloat16", 1024, 7, None),
        ("small recipe bfloat16", small(), "bfloat16", 4096, 3, [4, 8, 12]),
    ):
        print(name, flush=True)
        runs[name] = measure(path, dtype, vocabulary, rounds=rounds, exits=exits)
    write_result("auto_planner", prompt_length=PROMPT_LENGTH, new_tokens=NEW_TOKENS, prompts=PROMPTS, runs=runs)


if __name__ == "__main__":
    main()
