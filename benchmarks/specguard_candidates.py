"""What candidates and grounding cost: k candidates over one shared prefix, and reading attention in the block of the step alone.

1. Drafting a step of 32 tokens behind 512: k candidates against one, and from the prompt on against Transformers'
   ``generate(num_return_sequences=k)``, whose prompt is run once for each. 2. Scoring a step of 32 tokens behind a cached prefix of
   512 and 1024: with grounding against without, against Transformers' own pass behind its cache, and against what one would do
   with Transformers alone: run the whole sequence again with eager attentions and multiply them. Groundings must be equal.
   3. The memory that keys and values of k candidates take, against k copies of the prefix.

A model of 12 layers and 384 dimensions with random weights: costs don't depend on them.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from measurement import interleave, ratio, write_result
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.model_state import Side, Work
from telltale.models import open_decoder
from telltale.signals.grounding import LAST_LAYERS, grounding_from_blocks

PREFIX, STEP, VOCABULARY = 512, 32, 4096
COUNTS = (1, 4, 8, 16)
BACKENDS = ("native", "fused")


class EndlessWords:
    """A tokenizer of numbered words, none of which ends a step."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{index}": index for index in range(VOCABULARY)}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"w{token} " for token in tokens)


def random_model(layers: int = 12) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def prompt_of(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def drafted(side: Side, count: int) -> int:
    """A step of each of ``count`` candidates behind the prompt that ``side`` holds, the head included; then forgotten."""
    tail = side.seats[0].tail
    assert tail is not None
    branches = side.branch(0, count)
    states = tail.expand(count, -1)
    for _ in range(STEP):
        tokens = side.head(states).argmax(-1).tolist()
        states = torch.stack([one.states[-1] for one in side.grow(branches, tokens, None)])
    side.free(branches)
    return STEP


def candidates(model: Any, rounds: int) -> dict[str, Any]:
    """Drafting times by count and backend, with Transformers beside the whole step from the prompt on."""
    prompt = prompt_of(PREFIX)
    contestants: dict[str, Any] = {}
    for backend in BACKENDS:
        side = Side(open_decoder(model, backend=backend))
        with torch.inference_mode():
            side.prefill(0, prompt)
        for count in COUNTS:
            contestants[f"{backend}, k={count}"] = lambda side=side, count=count: _inferred(drafted, side, count)
        config = StepVerifiedConfig(policy="draft", candidates=8, max_step_tokens=STEP)
        guard = StepVerified(model, model, EndlessWords(), config, backend=backend)
        contestants[f"{backend}, whole step, k=8"] = lambda guard=guard: _generated(guard, prompt)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)

    def transformers(count: int) -> int:
        torch.manual_seed(0)
        options = {"num_return_sequences": count, "max_new_tokens": STEP, "do_sample": True, "temperature": 1.0}
        found = model.generate(ids, attention_mask=mask, top_k=0, **options)
        assert found.shape == (count, PREFIX + STEP)
        return STEP

    for count in (1, 8):
        contestants[f"Transformers, whole step, k={count}"] = lambda count=count: transformers(count)
    timings = interleave(contestants, rounds=rounds)
    peer = timings["Transformers, whole step, k=8"]
    return {
        "milliseconds_per_tick": timings,
        "over_one_candidate": {
            f"{backend}, k={count}": ratio(timings[f"{backend}, k={count}"], timings[f"{backend}, k=1"])
            for backend in BACKENDS
            for count in COUNTS[1:]
        },
        "transformers_over_ours": {b: ratio(peer, timings[f"{b}, whole step, k=8"]) for b in BACKENDS},
    }


def _inferred(function: Any, *arguments: Any) -> int:
    with torch.inference_mode():
        return int(function(*arguments))


def _generated(guard: StepVerified, prompt: list[int]) -> int:
    generator = torch.Generator().manual_seed(0)
    result = guard.generate([prompt], max_new_tokens=STEP, temperature=1.0, generator=generator)
    assert result.stats.drafted_tokens == 8 * STEP
    return STEP


def scoring(model: Any, prefix: int, rounds: int) -> dict[str, Any]:
    """A step scored behind a prefix in the cache, with and without its grounding, and by Transformers."""
    prompt = prompt_of(prefix + STEP)
    step = prompt[prefix:]
    contestants: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}

    def score(side: Side, since: int | None, name: str) -> int:
        tail = side.seats[0].tail
        passed = side.feed([Work(0, step, since)])[0]
        side.head(passed.states)
        if since is not None:
            assert passed.blocks is not None
            found[name] = grounding_from_blocks(list(passed.blocks))
        side.rewind(0, prefix, tail)
        return STEP

    for backend in BACKENDS:
        side = Side(open_decoder(model, backend=backend), attention_layers=LAST_LAYERS)
        with torch.inference_mode():
            side.prefill(0, prompt[:prefix])
        for name, since in ((f"{backend}, plain", None), (f"{backend}, with grounding", prefix)):
            contestants[name] = lambda side=side, since=since, name=name: _inferred(score, side, since, name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    whole, cache = torch.tensor([prompt]), DynamicCache()
    with torch.inference_mode():
        model(input_ids=whole[:, :prefix], past_key_values=cache)

    def behind_its_cache() -> int:
        model(input_ids=whole[:, prefix:], past_key_values=cache)
        cache.crop(-STEP)
        return STEP

    def run_again() -> int:
        out = eager(input_ids=whole, output_attentions=True)
        product = torch.eye(prefix + STEP)
        for layer in out.attentions[-LAST_LAYERS:]:
            product = layer[0].mean(0) @ product
        found["dense"] = product[prefix:, :prefix].sum(-1)
        return STEP

    contestants["Transformers, behind its cache, plain"] = lambda: _inferred(behind_its_cache)
    contestants["Transformers, run again with eager attentions"] = lambda: _inferred(run_again)
    timings = interleave(contestants, rounds=rounds)
    again = timings["Transformers, run again with eager attentions"]
    return {
        "prefix": prefix,
        "milliseconds_per_token": timings,
        "grounding_over_plain": {b: ratio(timings[f"{b}, with grounding"], timings[f"{b}, plain"]) for b in BACKENDS},
        "run_again_over_grounding": {b: ratio(again, timings[f"{b}, with grounding"]) for b in BACKENDS},
        "largest_difference": {
            b: (found[f"{b}, with grounding"] - found["dense"]).abs().max().item() for b in BACKENDS
        },
    }


def memory(model: Any) -> dict[str, Any]:
    """Bytes of keys and values of 8 candidates of 32 tokens behind 512, and of 8 whole copies."""
    decoder = open_decoder(model)
    side = Side(decoder)
    with torch.inference_mode():
        side.prefill(0, prompt_of(PREFIX))
        drafted(side, 8)
    config = model.config
    token = 2 * config.num_hidden_layers * config.hidden_size * 4
    return {"shared_bytes": side.cache_bytes, "copied_bytes": 8 * (PREFIX + STEP) * token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    model = random_model()
    found = {
        "candidates": candidates(model, arguments.rounds),
        "scoring": [scoring(model, prefix, arguments.rounds) for prefix in (PREFIX, 2 * PREFIX)],
        "memory": memory(model),
    }
    for name, one in found["candidates"]["over_one_candidate"].items():
        print(f"{name}: {one['cpu']:.2f}x the time of one candidate")
    print("Transformers over ours, k=8", found["candidates"]["transformers_over_ours"])
    for one in found["scoring"]:
        print(one["prefix"], one["grounding_over_plain"], one["run_again_over_grounding"], one["largest_difference"])
    write_result(
        "specguard_candidates",
        protocol={"prefix": PREFIX, "step": STEP, "rounds": arguments.rounds, "dtype": "float32", "layers": 12},
        targets={"k8_over_k1": 1.5, "transformers_over_ours": 2.0, "grounding_over_plain": 1.10, "run_again": 15.0},
        **found,
        cpu_seconds=time.process_time() - started,
    )


if __name__ == "__main__":
    main()
