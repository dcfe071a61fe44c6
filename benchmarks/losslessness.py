"""Is greedy self-speculation token-identical to plain decoding? Divergences counted, per backend, dtype and mode.

On a recipe-trained model, over exit layers and draft lengths. ``exact`` must never diverge. Where ``fast`` does, the gap between
the two best logits of plain decoding at that place is recorded: it must be within rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from checkpoints import corpus, tiny
from measurement import write_result
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.models import load_model, open_decoder

PROMPT_LENGTHS, NEW_TOKENS = (1, 7, 64), 48
DRAFT_LENGTHS = (1, 2, 3, 5, 8, 12)


def gap_at(model: Any, tokens: torch.Tensor) -> float:
    """Gap of the two best next-token logits after ``tokens``, relative to the best one's size."""
    with torch.inference_mode():
        top = model(input_ids=tokens.view(1, -1)).logits[0, -1].float().topk(2).values
    return ((top[0] - top[1]) / top[0].abs()).item()


def count(path: Any, backend: str, dtype: str, exactness: str, seeds: range) -> dict[str, Any]:
    model = load_model(path, dtype=dtype)
    decoder = open_decoder(model, backend=backend, exact=exactness == "exact")
    plain = Autoregressive(decoder)
    data = corpus(1024)
    compared, gaps = 0, []
    for seed in seeds:
        for length in PROMPT_LENGTHS:
            prompt = data.prompts(1, length=length, seed=seed)[0]
            wanted = plain.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens[0]
            for exit_layer in range(1, decoder.layers):
                for draft_length in DRAFT_LENGTHS:
                    method = SelfSpeculative(decoder, exit_layer=exit_layer, draft_length=draft_length)
                    given = method.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens[0]
                    compared += 1
                    if not torch.equal(wanted, given):
                        place = int((wanted != given).nonzero()[0])
                        gaps.append(gap_at(model, torch.cat([prompt, wanted[:place]])))
    result = {"sequences": compared, "diverged": len(gaps), "relative_top2_gaps": gaps}
    print(
        backend,
        dtype,
        exactness,
        compared,
        "sequences,",
        len(gaps),
        "diverged; largest gap",
        max(gaps, default=0.0),
        flush=True,
    )
    return result


def main() -> None:
    torch.set_num_threads(1)
    path = tiny("both")
    runs = {}
    for backend, exactness, seeds in (
        ("native", "exact", range(6)),
        ("fused", "fast", range(3)),
        ("fused", "exact", range(1)),
        ("module", "fast", range(1)),
    ):
        for dtype in ("float32", "bfloat16"):
            runs[f"{backend} {dtype} {exactness}"] = count(path, backend, dtype, exactness, seeds)
    write_result(
        "losslessness", prompt_lengths=PROMPT_LENGTHS, new_tokens=NEW_TOKENS, draft_lengths=DRAFT_LENGTHS, runs=runs
    )


if __name__ == "__main__":
    main()
