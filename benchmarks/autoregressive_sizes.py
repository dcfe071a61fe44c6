"""Our plain loop against Transformers' plain ``generate`` at sizes up to 200M parameters, float32 and bfloat16.

Random weights serve here: plain decoding costs the same whatever the weights say. One thread, interleaved. The floor is reading
all weights once per token at the bandwidth measured beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

import peers
from measurement import interleave, ratio, write_result
from memory_read import read_seconds
from telltale.decode import Autoregressive

SHAPES = {
    "0.2M": (4, 64, 176, 4, 256),
    "1.7M": (8, 128, 352, 4, 1024),
    "12M": (12, 256, 704, 8, 4096),
    "44M": (24, 384, 1024, 6, 4096),
    "102M": (12, 768, 2048, 12, 16384),
    "203M": (16, 1024, 2816, 16, 4096),
}
PROMPT_LENGTH = 32


def bandwidth() -> float:
    """Bytes per second of one thread reading 256 MB, the best of a few."""
    block = torch.ones(64 << 20)
    return block.nbytes / read_seconds(block, block.nbytes, threads=1)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    runs: dict[str, Any] = {}
    for name, (layers, hidden, feed_forward, heads, vocabulary) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=feed_forward,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
            model = LlamaForCausalLM(config).to(dtype).eval()
            size = sum(p.numel() for p in model.parameters())
            tokens = 64 if size < 2e7 else 16
            prompt = torch.randint(vocabulary, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(1))
            decoder = Autoregressive(model)
            timings = interleave(
                {
                    "transformers_plain": lambda m=model, p=prompt, n=tokens: peers.plain(m, p, new_tokens=n).numel(),
                    "autoregressive": lambda d=decoder, p=prompt, n=tokens: d.generate(
                        p, max_new_tokens=n, eos_token_id=[]
                    ).tokens.numel(),
                },
                rounds=7,
            )
            gain = ratio(timings["transformers_plain"], timings["autoregressive"])
            floor = size * model.dtype.itemsize / bandwidth() * 1e3
            runs[f"{name} {str(dtype)[6:]}"] = {
                "parameters": size,
                "timings": timings,
                "ratio": gain,
                "read_once_floor_ms": floor,
                "new_tokens": tokens,
            }
            ms = {k: round(v.summary()["cpu_ms_per_token"], 3) for k, v in timings.items()}
            print(f"{name:6s} {str(dtype)[6:]:9s} {ms} {gain['cpu']:.2f}x  floor {floor:.3f} ms", flush=True)
    write_result("autoregressive_sizes", prompt_length=PROMPT_LENGTH, runs=runs)


if __name__ == "__main__":
    main()
