"""The recipe against plain training at equal steps: none, layer dropout only, exit loss only, both; three seeds each.

Per arm: held-out loss of every exit, agreement with the last layer, acceptance of drafts by exit layer while decoding, and
what the last layer pays. Model and data: the tour's (1.7M parameters, Python's standard library).
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from checkpoints import ARMS, SEEDS, TINY, corpus, recipe, tiny
from measurement import write_result
from telltale.decode import SelfSpeculative
from telltale.models import load_model
from telltale.models.exits import exit_quality
from telltale.train.loop import held_out_batches

DRAFT_LENGTH = 3
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 8, 64, 96


def measure(arm: str, seed: int) -> dict[str, Any]:
    data = corpus(1024)
    model = load_model(tiny(arm, seed=seed))
    quality = exit_quality(model, held_out_batches(data.held_out[65536:], TINY))
    prompts = data.prompts(PROMPTS, length=PROMPT_LENGTH, seed=seed)
    acceptance = []
    for exit_layer in range(1, model.config.num_hidden_layers):
        decoder = SelfSpeculative(model, exit_layer=exit_layer, draft_length=DRAFT_LENGTH)
        stats = [decoder.generate(p, max_new_tokens=NEW_TOKENS, eos_token_id=[]).stats for p in prompts]
        acceptance.append(sum(s.accepted for s in stats) / sum(s.drafted for s in stats))
    return {"losses": quality.losses, "agreement": quality.agreement, "acceptance": acceptance}


def main() -> None:
    torch.set_num_threads(1)
    arms: dict[str, Any] = {}
    for arm in ARMS:
        runs = [measure(arm, seed) for seed in SEEDS]
        arms[arm] = {
            key: {
                "mean": [statistics.mean(values) for values in zip(*(run[key] for run in runs), strict=True)],
                "deviation": [statistics.stdev(values) for values in zip(*(run[key] for run in runs), strict=True)],
            }
            for key in runs[0]
        }
        settings = recipe(arm)
        arms[arm]["recipe"] = None if settings is None else settings.to_dict()
        print(f"{arm:8s} loss {[round(x, 3) for x in arms[arm]['losses']['mean']]}")
        print(f"{'':8s} acceptance {[round(x, 3) for x in arms[arm]['acceptance']['mean']]}")
    pays = {
        arm: statistics.mean([arms[arm]["losses"]["mean"][-1] - arms["none"]["losses"]["mean"][-1]]) for arm in ARMS
    }
    write_result(
        "layerskip_recipe",
        settings=TINY.to_dict(),
        seeds=list(SEEDS),
        draft_length=DRAFT_LENGTH,
        prompts=PROMPTS,
        new_tokens=NEW_TOKENS,
        arms=arms,
        last_layer_pays_nats=pays,
    )


if __name__ == "__main__":
    main()
