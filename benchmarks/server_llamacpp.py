"""Beside llama.cpp's server on the same weights: time to the first token and tokens per second at 1, 4, 16 and 64 streams.

Both read the same GGUF file, on as many threads as each other, and get the same prompts through the same HTTP client; every second
request repeats a prompt, as chats and few-shot prompts do. llama.cpp (through ``xllamacpp``) computes on the quantised weights;
telltale reads them into ``--dtype`` first, so it moves more bytes for each token. The order of the two alternates. Answers have a
fixed length: the end token is forbidden on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from measurement import write_result
from server_process import serving

SENTENCE = "the river ran past a small house where two old friends sat and spoke of rain bread trains and towns"


def prompts(count: int, words: int) -> list[str]:
    """Every second one is the one before it again."""
    draw = random.Random(0)
    found: list[str] = []
    for place in range(count):
        found.append(found[-1] if place % 2 else " ".join(draw.choices(SENTENCE.split(), k=words)))
    return found


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int, eos: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and the tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "logit_bias": {str(eos): -100}}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if not first and chunk.get("choices") and chunk["choices"][0].get("text"):
                first = time.perf_counter() - began
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return first, time.perf_counter() - began, count


async def load(url: str, model: str, texts: list[str], streams: int, tokens: int, eos: int) -> dict[str, float]:
    limits = httpx.Limits(max_connections=streams)
    waiting = list(texts)
    found: list[tuple[float, float, int]] = []

    async def one(client: httpx.AsyncClient) -> None:
        while waiting:
            found.append(await ask(client, model, waiting.pop(0), tokens, eos))

    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(streams)))
    seconds = time.perf_counter() - began
    firsts = sorted(first for first, _, _ in found)
    return {
        "requests": len(found),
        "tokens": sum(count for _, _, count in found),
        "tokens_per_second": sum(count for _, _, count in found) / seconds,
        "first_token_ms_median": 1e3 * statistics.median(firsts),
        "first_token_ms_largest": 1e3 * firsts[-1],
    }


def llamacpp(path: Path, *, threads: int, streams: int, context: int) -> Any:
    """llama.cpp's server in this process, on a free port."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel = streams
    parameters.n_ctx = context * streams
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.warmup = True
    parameters.port = 0
    return xllamacpp.Server(parameters)


def main() -> None:
    """Run both at every number of streams and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument(
        "--requests", type=int, default=8, help="requests at a time with one stream; as many as streams at least"
    )
    parser.add_argument("--words", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eos", type=int, default=2, help="the end token's id (SmolLM2: 2)")
    asked = parser.parse_args()
    options = ["--threads", str(asked.threads), "--dtype", asked.dtype, "--queue", "128"]
    found: dict[str, Any] = {"telltale": {}, "llama.cpp": {}}
    with serving(asked.model, *options, "--max-rows", "64") as (url, _, told):
        for place, streams in enumerate(asked.streams):
            texts = prompts(max(asked.requests, streams), asked.words)
            other = llamacpp(asked.model, threads=asked.threads, streams=streams, context=512)
            try:
                sides = [("telltale", url, "m"), ("llama.cpp", other.listening_address, "m")]
                for name, address, model in sides[:: 1 if place % 2 else -1]:
                    asyncio.run(load(address, model, ["warm up"], 1, 2, asked.eos))
                    found[name][streams] = asyncio.run(load(address, model, texts, streams, asked.tokens, asked.eos))
                    print(streams, name, found[name][streams], flush=True)
            finally:
                del other
    write_result(
        "server_llamacpp",
        file=asked.model.name,
        threads=asked.threads,
        dtype=asked.dtype,
        backend=told["backend"],
        words=asked.words,
        new_tokens=asked.tokens,
        servers=found,
    )


if __name__ == "__main__":
    main()
