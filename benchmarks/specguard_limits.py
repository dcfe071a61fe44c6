"""Where step verification must equal something known, and grounding its definition. Counted and tested on random models.

1. Greedy with a threshold of infinity, and the policies of the target alone, against Transformers' greedy ``generate``: sequences
   that differ, per family and fallback. 2. A draft that is the target, for thresholds from -inf to inf. 3. At temperature 1, 20,000
   draws of three tokens over a vocabulary of three against the exact law: chi-squared p-values. 4. Grounding from in-step blocks
   against the dense rollout of eager attentions: the largest difference, for all kinds of key heads, in one pass and token by token
   in branches, with left padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from measurement import write_result
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.models import open_decoder
from telltale.signals.grounding import grounding_from_blocks

NEW, PROMPTS = 48, 12
EVERY = 8
"""One word in so many ends a step."""


class Words:
    """A tokenizer of numbered words, one in eight of which ends a step."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"w{index}": index for index in range(self.size)}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"w{token}.\n\n" if token % EVERY == EVERY - 1 else f"w{token} " for token in tokens)


def random_model(family: str, seed: int, *, layers: int = 4, vocabulary: int = 96, kv_heads: int = 2) -> Any:
    """A seeded model whose weights are large enough to make its predictions vary."""
    shared = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    llama_like = shared | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
    }
    config: Any = {
        "llama": lambda: LlamaConfig(**llama_like),
        "qwen3": lambda: Qwen3Config(**llama_like, head_dim=16),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=layers, n_head=4, n_positions=256, **shared),
    }[family]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.eval()


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocabulary, (3 + 5 * i,), generator=generator).tolist() for i in range(PROMPTS)]


def greedy(model: Any, given: list[list[int]]) -> list[list[int]]:
    found = []
    for prompt in given:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        found.append(out[0, len(prompt) :].tolist())
    return found


def differing(target: Any, draft: Any, wanted: list[list[int]], **config: Any) -> int:
    size = target.config.vocab_size
    guard = StepVerified(target, draft, Words(size), StepVerifiedConfig(repetition_limit=None, **config))
    result = guard.generate(prompts(size), max_new_tokens=NEW, eos_token_id=[])
    return sum(found != row for found, row in zip(result.tokens.tolist(), wanted, strict=True))


def limits() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in ("llama", "qwen3", "gpt2"):
        target, draft = random_model(family, 1), random_model(family, 2, layers=3)
        wanted = greedy(target, prompts(96))
        rows: dict[str, int] = {}
        for fallback in ("plain", "spec", "k-sample"):
            rows[f"threshold inf, {fallback}"] = differing(target, draft, wanted, threshold=math.inf, fallback=fallback)
            rows[f"threshold inf, {fallback}, target's signals"] = differing(
                target, draft, wanted, threshold=math.inf, fallback=fallback, signal_model="target"
            )
        rows["policy target"] = differing(target, None, wanted, policy="target")
        rows["policy speculative"] = differing(target, draft, wanted, policy="speculative")
        if family != "gpt2":
            rows["one model, threshold inf"] = differing(
                target, None, wanted, threshold=math.inf, exit_layer=2, beta=1.0, fallback="plain"
            )
        for threshold in (-math.inf, 0.3, 0.6, 0.9, math.inf):
            for signal in ("draft", "target"):
                name = f"draft is target, threshold {threshold}, {signal}'s signals"
                rows[name] = differing(target, target, wanted, threshold=threshold, signal_model=signal)
        found[family] = {"sequences each": PROMPTS, "tokens each": NEW, "differing": rows}
        print(family, rows, flush=True)
    return found


def exact_law(model: Any) -> torch.Tensor:
    law: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            grown = {}
            for tokens, weight in law.items():
                logits = model(input_ids=torch.tensor([[1, *tokens]])).logits[0, -1]
                for token, share in enumerate(logits.double().softmax(-1).tolist()):
                    grown[(*tokens, token)] = weight * share
            law = grown
    return torch.tensor([law[key] for key in sorted(law)], dtype=torch.float64)


def laws(draws: int = 20_000) -> dict[str, float]:
    target = random_model("llama", 4, vocabulary=3)
    draft = random_model("llama", 5, layers=3, vocabulary=3)

    class Letters(Words):
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(("a", "b", ".\n\n")[token] for token in tokens)

    expected = exact_law(target)
    found = {}
    for name, model, config in (
        ("policy target", None, {"policy": "target"}),
        ("fallback plain", draft, {"threshold": math.inf, "fallback": "plain", "candidates": 3}),
        ("fallback spec", draft, {"threshold": math.inf, "fallback": "spec", "candidates": 2, "draft_length": 2}),
        ("policy speculative", draft, {"policy": "speculative", "draft_length": 3}),
        ("one model, speculative", None, {"policy": "speculative", "exit_layer": 1}),
    ):
        settings = StepVerifiedConfig(beta=1.0, selector="first", repetition_limit=None, **config)
        guard = StepVerified(target, model, Letters(3), settings)
        counts = torch.zeros(27, dtype=torch.float64)
        generator = torch.Generator().manual_seed(11)
        for _ in range(draws // 500):
            result = guard.generate(
                [[1]] * 500, max_new_tokens=3, eos_token_id=[], temperature=1.0, generator=generator
            )
            counts += torch.bincount(result.tokens @ torch.tensor([9, 3, 1]), minlength=27)
        found[name] = float(chisquare(counts.numpy(), (expected * counts.sum()).numpy()).pvalue)
        print(name, "p =", round(found[name], 4), flush=True)
    return found


def grounding() -> dict[str, float]:
    """Largest difference from the dense rollout over the last three layers, float32."""
    prefix, step, rows = 70, 24, 3
    found = {}
    for name, kv_heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
        model = random_model("llama", 6, kv_heads=kv_heads)
        generator = torch.Generator().manual_seed(8)
        ids = torch.randint(96, (rows, prefix + step), generator=generator)
        padding = torch.tensor([0, 11, 30])
        mask = (torch.arange(prefix + step) >= padding.view(-1, 1)).long()
        with torch.no_grad():
            position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
            out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, output_attentions=True)
        product = torch.eye(prefix + step).expand(rows, -1, -1)
        for layer in out.attentions[-3:]:
            product = layer.mean(1) @ product
        dense = torch.stack([product[row, prefix:, padding[row] : prefix].sum(-1) for row in range(rows)])
        for backend in ("native", "fused", "module"):
            decoder = open_decoder(model, backend=backend)
            lengths = [prefix - int(gone) for gone in padding]
            cache = decoder.new_cache(rows, 16)
            for row, length in enumerate(lengths):
                decoder.forward(ids[row : row + 1, prefix - length : prefix], cache.select([row]), [0], prefill=True)
            cache.truncate(lengths)
            embedded = decoder.embed(ids[:, prefix:])
            _, blocks = decoder.run_with_blocks(
                embedded, 0, decoder.layers, cache, lengths, since=lengths, first_layer=decoder.layers - 3
            )
            whole = (grounding_from_blocks(list(blocks)) - dense).abs().max().item()
            branches = cache.branches(rows * 2)
            chosen = [1, 3, 4]
            branches.point(chosen, [0, 1, 2])
            square = torch.zeros(3, rows, step, step)
            for index in range(step):
                view = branches.select(chosen)
                _, row_blocks = decoder.run_with_blocks(
                    embedded[:, index : index + 1],
                    0,
                    decoder.layers,
                    view,
                    [length + index for length in lengths],
                    since=lengths,
                    first_layer=decoder.layers - 3,
                )
                square[:, :, index, : index + 1] = row_blocks[:, :, 0, : index + 1]
            ticked = (grounding_from_blocks(list(square)) - dense).abs().max().item()
            found[f"{name} {backend}, one pass behind a cache"] = whole
            found[f"{name} {backend}, token by token in branches"] = ticked
    print({name: f"{value:.1e}" for name, value in found.items()}, flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    write_result(
        "specguard_limits",
        greedy=limits(),
        law_p_values=laws(),
        grounding_largest_difference=grounding(),
    )


if __name__ == "__main__":
    main()
