"""Every family of decoder-only language models, on every backend, beside Transformers' own greedy decoding.

For each family: random configurations of one tiny shape with its awkward options switched on (windows of a few tokens, soft caps,
layers that do not turn, multipliers, biases), random weights, float32. *Identical*: the tokens of ``generate`` for one prompt of
each configuration, plain and self-speculative. *Ragged*: the same for the rows of one batch of several lengths. *Boundary*: a
prompt and an answer that cross the sliding window, or the length at which rotary frequencies change, if the family has either.
``--speed`` adds tokens a second over ``generate`` for a larger model, by CPU time on one thread, rounds interleaved.

    python benchmarks/families.py
    python benchmarks/families.py --speed --rounds 3
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import torch
import transformers
from transformers.utils import logging

from measurement import RESULTS, Timing, interleave, ratio, write_result
from peers import plain
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import TelltaleError
from telltale.models import open_decoder

BACKENDS = ("native", "fused", "module")
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 7}
_MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "Llama": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "Mistral": [{}, WINDOW],
    "Qwen2": [{}, WINDOW | {"use_sliding_window": True, "max_window_layers": 2}],
    "Qwen3": [{"head_dim": 16}, {"head_dim": 8, "attention_bias": True}],
    "Gemma": [{"head_dim": 16}, {"head_dim": 8, "num_key_value_heads": 1}],
    "Phi3": [
        {"sliding_window": None},
        WINDOW | {"partial_rotary_factor": 0.5},
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 24,
            },
        },
    ],
    "GPT2": [{"num_key_value_heads": None}, {"num_key_value_heads": None, "scale_attn_by_inverse_layer_idx": True}],
    "GPTNeoX": [{"num_key_value_heads": None}, {"num_key_value_heads": None, "use_parallel_residual": False}],
    "Gemma2": [
        WINDOW | {"head_dim": 16},
        WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    ],
    "Gemma3": [WINDOW | _MIXED | {"head_dim": 16}, WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 5}],
    "Qwen3Moe": [{"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}],
    "Mixtral": [{"num_local_experts": 4}, WINDOW | {"num_local_experts": 4}],
    "Olmo2": [{}, {"attention_bias": True}],
    "Olmo3": [WINDOW | _MIXED, WINDOW],
    "Granite": [
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
        {"attention_bias": True, "mlp_bias": True},
    ],
    "SmolLM3": [{"no_rope_layers": [1, 0, 1, 0]}, {"no_rope_layer_interval": 4}],
    "StableLm": [{}, {"use_qkv_bias": True, "use_parallel_residual": True}],
    "Starcoder2": [{}, WINDOW | {"use_bias": True}],
    "Cohere": [{"logit_scale": 0.3}, {"use_qk_norm": True}],
    "Cohere2": [WINDOW | _MIXED, WINDOW | {"logit_scale": 0.3}],
    "Phi": [{}, {"qk_layernorm": True, "partial_rotary_factor": 0.5}],
    "Glm4": [{"head_dim": 8}, {"head_dim": 16, "attention_bias": True}],
    "Ministral": [WINDOW | _MIXED | {"head_dim": 8}, WINDOW | {"head_dim": 16, "layer_types": ["full_attention"] * 4}],
    "OPT": [
        {"ffn_dim": 56, "word_embed_proj_dim": 32},
        {"ffn_dim": 56, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ],
    "Falcon": [{"multi_query": True}, {"alibi": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}],
    "Nemotron": [{"head_dim": 8}, {"head_dim": 8, "attention_bias": True, "mlp_bias": True}],
    "Ernie4_5": [{"head_dim": 8}, {"head_dim": 16, "use_bias": True}],
    "SeedOss": [{"head_dim": 8}, {"head_dim": 16, "attention_bias": False}],
    "Exaone4": [WINDOW | _MIXED, {"sliding_window": None, "layer_types": ["full_attention"] * 4}],
    "GptOss": [
        WINDOW
        | {"head_dim": 8, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ],
}
_CLASSES = {"GPT2": "GPT2LMHeadModel"}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_BOUNDED = ("sliding_window", "original_max_position_embeddings")
LENGTHS = (3, 5, 9, 20)
"""Tokens of the prompts: shorter and longer than the windows, and on both sides of their end with :data:`NEW` more."""
NEW = 14


def made(name: str, options: dict[str, Any], seed: int, shape: dict[str, Any] | None = None) -> Any:
    """A seeded random model whose weights are large enough to make its predictions vary."""
    given = (SHAPE if shape is None else SHAPE | shape) | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, _CONFIGS.get(name, f"{name}Config"))(**given)
        model = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def prompts(model: Any, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.config.vocab_size, (count,), generator=generator).tolist() for count in LENGTHS]


def checked(model: Any, backend: str, seed: int, *, bounded: bool) -> dict[str, bool | str]:
    """What one model's decoding on one backend is equal in."""
    rows = prompts(model, seed)
    wanted = [plain(model, torch.tensor(row), new_tokens=NEW).tolist() for row in rows]
    exit_layer = model.config.num_hidden_layers // 2
    decoders = [
        Autoregressive(model, backend=backend),
        SelfSpeculative(model, exit_layer, 3, backend=backend),
    ]
    found: dict[str, bool | str] = {"identical": True, "ragged": True}
    for decoder in decoders:
        alone = [decoder.generate([row], max_new_tokens=NEW, eos_token_id=[]).tokens[0].tolist() for row in rows]
        found["identical"] = found["identical"] is True and alone[0] == wanted[0]
        if bounded:
            found["boundary"] = found.get("boundary", True) is True and alone == wanted
        together = decoder.generate(rows, max_new_tokens=NEW, eos_token_id=[]).tokens.tolist()
        found["ragged"] = found["ragged"] is True and together == wanted
    return found


def correctness(name: str, seeds: int) -> dict[str, Any]:
    """For each backend: whether all configurations are equal, or why it refuses one."""
    result: dict[str, Any] = {backend: {"configurations": 0} for backend in BACKENDS}
    for options in FAMILIES[name]:
        bounded = any(options.get(field) for field in _BOUNDED)
        for seed in range(seeds):
            model = made(name, options, seed)
            for backend in BACKENDS:
                own = result[backend]
                try:
                    open_decoder(model, backend=backend)
                except TelltaleError as error:
                    own.setdefault("refused", str(error))
                    continue
                own["configurations"] += 1
                for column, equal in checked(model, backend, seed, bounded=bounded).items():
                    own[column] = own.get(column, True) and equal
    return result


def speed(name: str, rounds: int, tokens: int) -> dict[str, float]:
    """Tokens a second over ``generate``: the backend that ``auto`` takes, on a model of some ten million parameters."""
    shape = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
    }
    options = {key: value for key, value in FAMILIES[name][0].items() if key not in ("layer_types", "no_rope_layers")}
    options |= {"ffn_dim": 704, "word_embed_proj_dim": 256} if name == "OPT" else {}
    model = made(name, options | ({"head_dim": 32} if "head_dim" in options else {}), 0, shape)
    decoder, prompt = Autoregressive(model), torch.tensor(prompts(model, 0)[-1])

    def ours() -> int:
        return int(decoder.generate(prompt.view(1, -1), max_new_tokens=tokens, eos_token_id=[]).lengths[0])

    def theirs() -> int:
        return len(plain(model, prompt, new_tokens=tokens))

    timings: dict[str, Timing] = interleave({"theirs": theirs, "ours": ours}, rounds=rounds)
    return {"backend": decoder.decoder.backend, **ratio(timings["theirs"], timings["ours"])}  # type: ignore[dict-item]


def known() -> dict[str, Any]:
    target = RESULTS / "families.json"
    return json.loads(target.read_text())["families"] if target.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = known()
    for name in options.names or FAMILIES:
        if options.speed:
            try:
                found.setdefault(name, {})["speed"] = speed(name, options.rounds, options.tokens)
            except TelltaleError as error:
                print(name, error, flush=True)
                continue
        else:
            found[name] = {**found.get(name, {}), **correctness(name, options.seeds)}
        print(name, json.dumps(found[name]), flush=True)
        write_result("families", families=found)


if __name__ == "__main__":
    main()
