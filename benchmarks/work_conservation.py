"""How often each layer runs per decoded text: ours equal for all layers, Transformers' early exit twice for the early ones.

Counted, not timed: forward hooks on Transformers' layers, the cache's own counts for ours.
"""

from __future__ import annotations

import torch
from transformers import logging

import peers
from checkpoints import corpus, tiny
from measurement import write_result
from telltale.decode import SelfSpeculative
from telltale.models import load_model

EXIT_LAYER, DRAFT_LENGTH, PROMPT_LENGTH, NEW_TOKENS = 4, 3, 64, 96


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model = load_model(tiny("both"))
    prompt = corpus(1024).prompts(1, length=PROMPT_LENGTH, seed=5)[0]
    counts = [0] * model.config.num_hidden_layers

    def counter(index: int):
        def count(module, args, kwargs) -> None:
            counts[index] += (args[0] if args else kwargs["hidden_states"]).shape[1]

        return count

    handles = [
        layer.register_forward_pre_hook(counter(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    same = {"exit_layer": EXIT_LAYER, "draft_length": DRAFT_LENGTH}
    theirs = peers.early_exit(model, prompt, new_tokens=NEW_TOKENS, **same)
    for handle in handles:
        handle.remove()
    result = SelfSpeculative(model, **same).generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[])
    ours = result.stats.layer_executions
    expected = PROMPT_LENGTH + result.stats.drafted + result.stats.rounds + result.stats.plain_steps
    print("transformers", counts)
    print("telltale    ", ours, "expected", expected)
    assert len(set(ours)) == 1
    assert ours[0] == expected
    write_result(
        "work_conservation",
        settings=same | {"prompt_length": PROMPT_LENGTH, "new_tokens": NEW_TOKENS},
        transformers_layer_tokens=counts,
        telltale_layer_tokens=ours,
        expected_prompt_plus_sum_of_drafts_plus_one=expected,
        rounds=result.stats.rounds,
        drafted=result.stats.drafted,
        same_tokens=torch.equal(theirs, result.tokens[0]),
    )


if __name__ == "__main__":
    main()
