"""Beside llama.cpp's server on the same weights: tokens per second and time to the first token, chats at one and sixteen streams.

The matrices of a GGUF file are written as BF16 and as Q8_0 (:mod:`decode_llamacpp`), and both servers read the same file on as many
threads: BF16 with telltale in bfloat16, Q8_0 with telltale's ``--weights int8`` and activations in bfloat16 or float32. Every
question is asked once, of both, through one HTTP client that streams; the order of the two alternates. llama.cpp (the
``xllamacpp`` wheel) serves in the client's process.
Telltale's texts are compared with offline decoding, which is timed as well.

    python benchmarks/server_llamacpp.py smollm2-135m-instruct-q4_1.gguf --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch

import telltale
from decode_llamacpp import rewritten
from measurement import quartiles, write_result
from server_process import serving
from telltale.decode import Autoregressive
from telltale.models import open_decoder

PAIRS = {
    "bfloat16": ("BF16", None, "bfloat16"),
    "int8": ("Q8_0", "int8", "bfloat16"),
    "int8, float32": ("Q8_0", "int8", "float32"),
}
"""The file that both read, telltale's ``--weights`` and its ``--dtype``."""
THINGS = (
    "a lighthouse",
    "a bicycle pump",
    "a sundial",
    "a windmill",
    "a steam engine",
    "a compass",
    "a printing press",
    "a water clock",
    "a pendulum",
    "a telescope",
    "a kite",
    "a sewing machine",
    "a barometer",
    "a lock on a canal",
    "a camera",
    "a loom",
)
PEOPLE = (
    "ships",
    "farmers",
    "schools",
    "cities",
    "travellers",
    "museums",
    "families",
    "engineers",
    "villages",
    "poets",
)
CHECKED = 8
"""Questions of each load that are answered offline as well."""


def questions() -> Iterator[str]:
    """Each of them once."""
    for people, thing in itertools.product(PEOPLE, THINGS):
        yield f"Explain how {thing} works, and why {people} still need one."


async def ask(client: httpx.AsyncClient, question: str, tokens: int) -> dict[str, Any]:
    """Seconds to the first text, the answer's text, and the tokens of both."""
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, text, usage = time.perf_counter(), 0.0, "", {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            new = chunk["choices"][0]["delta"].get("content") if chunk.get("choices") else None
            if new and not first:
                first = time.perf_counter() - began
            text += new or ""
            usage = chunk.get("usage") or usage
    return {"question": question, "first": first, "text": text, **usage}


async def load(url: str, asked: list[str], streams: int, tokens: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What a load of questions took, and the answers."""
    waiting = list(asked)
    found: list[dict[str, Any]] = []

    async def one(client: httpx.AsyncClient) -> None:
        while waiting:
            found.append(await ask(client, waiting.pop(0), tokens))

    # llama.cpp's server may close a connection once it has streamed an answer: every question has one of its own.
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(streams)))
        seconds = time.perf_counter() - began
    count = sum(one["completion_tokens"] for one in found)
    return {
        "tokens": count,
        "prompt_tokens": statistics.mean(one["prompt_tokens"] for one in found),
        "tokens_per_second": count / seconds,
        "first_token_ms": 1e3 * statistics.median(one["first"] for one in found),
    }, found


def llamacpp(path: Path, *, threads: int, streams: int, context: int) -> Any:
    """llama.cpp's server in this process, on a free port."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel = streams
    parameters.n_ctx = context * streams
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup = True
    parameters.port = 0
    return xllamacpp.Server(parameters)


def offline(
    file: Path, weights: str | None, dtype: str, answers: list[dict[str, Any]], asked: argparse.Namespace
) -> dict[str, Any]:
    """The same chats decoded in this process, one by one: how many texts are equal, and tokens per second."""
    torch.set_num_threads(asked.threads)
    model, tokenizer = telltale.load(file, dtype=dtype, weights=weights)
    plain = Autoregressive(open_decoder(model, backend="native", threads=asked.threads))
    equal, tokens, seconds = 0, 0, 0.0
    for answer in answers:
        chat = [{"role": "user", "content": answer["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        began = time.perf_counter()
        found = plain.generate(torch.tensor([ids]), max_new_tokens=asked.tokens)
        seconds += time.perf_counter() - began
        own = found.tokens[0, : int(found.lengths[0])].tolist()
        tokens += len(own)
        equal += tokenizer.decode(own, skip_special_tokens=True) == answer["text"]
    return {"texts": len(answers), "texts_equal": equal, "tokens_per_second": tokens / seconds}


def measured(
    file: Path, weights: str | None, dtype: str, asked: argparse.Namespace, unasked: Iterator[str]
) -> dict[str, Any]:
    """Both servers on one file at every number of streams."""
    options = ["--threads", str(asked.threads), "--dtype", dtype, "--max-rows", str(max(asked.streams))]
    options += [] if weights is None else ["--weights", weights]
    found: dict[str, Any] = {"streams": {}}
    answers: list[dict[str, Any]] = []
    with serving(file, *options) as (url, _, told):
        found["weights"] = told["weights"]
        for streams in asked.streams:
            other = llamacpp(file, threads=asked.threads, streams=streams, context=512)
            sides = {"telltale": url, "llama.cpp": other.listening_address}
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for address in sides.values():
                asyncio.run(load(address, ["Hello."], 1, 2))
            for place in range(asked.rounds):
                texts = list(itertools.islice(unasked, max(asked.requests, streams)))
                for name in list(sides)[:: 1 if place % 2 else -1]:
                    figures, given = asyncio.run(load(sides[name], texts, streams, asked.tokens))
                    rounds[name].append(figures)
                    print(weights, streams, name, figures, flush=True)
                    if name == "telltale" and not place:
                        answers += given[:CHECKED]
            del other
            pairs = zip(rounds["telltale"], rounds["llama.cpp"], strict=True)
            found["streams"][streams] = {
                "ratio": quartiles([one["tokens_per_second"] / two["tokens_per_second"] for one, two in pairs]),
                "rounds": rounds,
            }
    found["offline"] = offline(file, weights, dtype, answers, asked)
    print(weights, found["offline"], flush=True)
    return found


def main() -> None:
    """Run both at every number of streams and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--requests", type=int, default=3, help="questions of a load with fewer streams")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=tuple(PAIRS), nargs="*", default=list(PAIRS))
    parser.add_argument("--name", default="server_llamacpp_chats", help="the JSON's name")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    unasked = questions()
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.weights:
            kind, weights, dtype = PAIRS[name]
            file = rewritten(asked.model, Path(folder) / f"model-{kind}.gguf", kind)
            found[name] = measured(file, weights, dtype, asked, unasked)
            write_result(
                asked.name,
                file=asked.model.name,
                xllamacpp=version("xllamacpp"),
                server_threads=asked.threads,
                new_tokens=asked.tokens,
                servers=found,
            )


if __name__ == "__main__":
    main()
