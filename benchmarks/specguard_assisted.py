"""Token-level speculative sampling as a policy of the step-verified loop, beside Transformers' assisted generation.

Three questions on a pair of chain models: are greedy outputs those of the target's own ``generate``; is the law of sampled outputs
the target's (chi-squared against the exact law of the first two tokens); how many tokens a second at batch 8, where assisted
generation takes one prompt at a time. The step-verified policy with one candidate stands beside them: it may differ in output.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare

from measurement import interleave, ratio, write_result
from specguard_pairs import Pair, open_pair, prompts
from telltale.decode.calibration.calibrate import rejudged, thresholds_at_acceptance
from telltale.decode.calibration.trials import with_config

TARGET = 1.2
"""Tokens per second over assisted generation at batch 8."""
NEW_TOKENS = 80


def settings(pair: Pair, **changes: Any) -> Any:
    """The pair under a configuration."""
    return with_config(pair.guard, replace(pair.guard.config, **changes))


def theirs(pair: Pair, prompt: list[int], *, assisted: bool, **options: Any) -> list[int]:
    """Transformers' new tokens for one prompt."""
    ids = torch.tensor([prompt])
    model = pair.guard.target.model
    more = {"assistant_model": pair.guard.draft.model} if assisted and pair.guard.draft is not None else {}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **({"do_sample": False} | more | options))
    return found[0, len(prompt) :].tolist()


def equality(pair: Pair, count: int) -> dict[str, Any]:
    """Greedy tokens of all three, prompt by prompt."""
    asked = prompts(pair, count)
    found = settings(pair, policy="speculative").generate(asked, max_new_tokens=NEW_TOKENS)
    ours = [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
    alone = [theirs(pair, prompt, assisted=False, max_new_tokens=NEW_TOKENS) for prompt in asked]
    assisted = [theirs(pair, prompt, assisted=True, max_new_tokens=NEW_TOKENS) for prompt in asked]
    return {
        "prompts": count,
        "tokens": sum(map(len, alone)),
        "ours_equal_target": sum(a == b for a, b in zip(ours, alone, strict=True)),
        "assisted_equal_target": sum(a == b for a, b in zip(assisted, alone, strict=True)),
    }


def law(pair: Pair, *, draws: int, temperature: float) -> dict[str, Any]:
    """Two sampled tokens against their exact law under the target; rare pairs are put together."""
    prompt = prompts(pair, 1)[0]
    exact = _exact_law(pair, prompt, temperature)
    expected = {pair_: p for pair_, p in exact.items() if p * draws >= 10}
    found = {}
    for name, policy in (("speculative", "speculative"), ("target", "target")):
        result = settings(pair, policy=policy).generate(
            [prompt] * draws,
            max_new_tokens=2,
            temperature=temperature,
            eos_token_id=[],
            generator=torch.Generator().manual_seed(1),
        )
        counts = Counter(tuple(row) for row in result.tokens.tolist())
        observed = [counts[one] for one in expected]
        observed.append(draws - sum(observed))
        share = [*(p * draws for p in expected.values()), draws * (1 - sum(expected.values()))]
        found[name] = {"p_value": float(chisquare(observed, share).pvalue), "cells": len(share)}
    return {"draws": draws, "temperature": temperature} | found


@torch.no_grad()
def _exact_law(pair: Pair, prompt: list[int], temperature: float) -> dict[tuple[int, int], float]:
    model, words = pair.guard.target.model, pair.guard.vocabulary
    first = model(torch.tensor([prompt])).logits[0, -1, :words].double().div(temperature).softmax(-1)
    rows = torch.tensor([[*prompt, token] for token in range(words)])
    second = model(rows).logits[:, -1, :words].double().div(temperature).softmax(-1)
    joint = first.unsqueeze(1) * second
    return {(a, b): float(joint[a, b]) for a in range(words) for b in range(words)}


def theirs_together(pair: Pair, asked: list[list[int]]) -> int:
    """Transformers' greedy decoding of all prompts as one left-padded batch; how many new tokens, padding left out."""
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    found = pair.guard.target.model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return int((found[:, width:] != 0).sum())


def speed(pair: Pair, *, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second, greedy, everybody on the same prompts, taking turns."""
    asked = prompts(pair, batch)
    speculative, alone = settings(pair, policy="speculative"), settings(pair, policy="target")
    scored = {"score": "log-probability", "signal_model": "target", "candidates": 1}
    recorded = pair.runs(
        "record", [0], problems=pair.calibration, policy="random", accept_rate=0.5, record_signals=True
    )
    config = settings(pair, **scored).config
    threshold = thresholds_at_acceptance(rejudged(recorded.runs[0].trials, config), [0.75])[0]
    verified = settings(pair, **scored, threshold=threshold)
    constant = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}

    def ours(guard: Any) -> Any:
        return lambda: int(guard.generate(asked, max_new_tokens=NEW_TOKENS).lengths.sum())

    def loop(**options: Any) -> Any:
        return lambda: sum(len(theirs(pair, prompt, max_new_tokens=NEW_TOKENS, **options)) for prompt in asked)

    pair.guard.draft.model.generation_config.update(**constant)  # type: ignore[union-attr]
    timings = interleave(
        {
            "ours, token-level speculative": ours(speculative),
            "ours, target alone": ours(alone),
            "ours, target-scored steps": ours(verified),
            "Transformers, assisted, one by one": loop(assisted=True),
            "Transformers, target alone, one by one": loop(assisted=False),
            "Transformers, target alone, one batch": lambda: theirs_together(pair, asked),
        },
        rounds=rounds,
    )
    base = timings["Transformers, assisted, one by one"]
    return {
        "batch": batch,
        "rounds": rounds,
        "timings": timings,
        "over_assisted": {name: ratio(base, own) for name, own in timings.items() if own is not base},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmarks/specguard_models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/specguard_policies"))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--name", default="specguard_assisted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for model_seed in (0, 1):
        pair = open_pair(arguments.models, model_seed, test=250, calibration=200, store=arguments.runs)
        found.append(
            {
                "model_seed": model_seed,
                "equality": equality(pair, arguments.prompts),
                "law": law(pair, draws=arguments.draws, temperature=8.0),
                "speed": speed(pair, batch=arguments.batch, rounds=arguments.rounds),
            }
        )
    ratios = [one["speed"]["over_assisted"]["ours, token-level speculative"]["cpu"] for one in found]
    verdicts = {
        "greedy_equal": all(one["equality"]["ours_equal_target"] == one["equality"]["prompts"] for one in found),
        "law_kept": all(one["law"]["speculative"]["p_value"] > 1e-3 for one in found),
        "speed_over_assisted": float(np.median(ratios)),
        "speed_reached": float(np.median(ratios)) >= TARGET,
    }
    write_result(arguments.name, verdicts=verdicts, models=found)


if __name__ == "__main__":
    main()
