"""Plain decoding beside llama.cpp on the same weights: milliseconds a token, decode and prompt, and what int8 costs in perplexity.

The matrices of a GGUF file are dequantised once and written as two files, BF16 and Q8_0. llama.cpp (the ``xllamacpp`` wheel's own
server on loopback, which reports its timings itself; prompts not cached) reads each; telltale reads the BF16 file in float32 and
bfloat16, and the Q8_0 file with ``weights="int8"`` and activations in bfloat16 and in float32. llama.cpp puts activations in 8 bits
for Q8_0, and in bfloat16 for BF16. In every round all contestants run once in an order that rotates, and beside them the floor: the
bytes of the weights and of the keys and values of an average token are read by as many threads (:mod:`memory_read`). Greedy texts
are compared token by token; where two part, the gap between the two largest logits there is given, as a share of the range of the
logits: before they are rounded to bfloat16, which often makes the two equal (``tied_when_rounded``), so that the lower token wins.

Without ``--prompts`` the prompt is a chat's; with it, running text of each of these lengths. Perplexity: telltale's own native
decoding passes over a text, in windows, with weights as they are and in int8.

    python benchmarks/decode_llamacpp.py smollm2-135m-instruct-q4_1.gguf --threads 1 2
    python benchmarks/decode_llamacpp.py smollm2-135m-instruct-q4_1.gguf --only speed --prompts 512 2048 4096 --tokens 32 --rounds 3
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import telltale
from measurement import quartiles, write_result
from memory_read import read_seconds
from telltale.decode import Autoregressive
from telltale.models import open_decoder

ROOT = Path(__file__).parents[1]
QUESTION = "Explain how a lighthouse works, and why ships still need one."
TELLTALE = {
    "telltale float32": ("BF16", "float32", None),
    "telltale bfloat16": ("BF16", "bfloat16", None),
    "telltale int8": ("Q8_0", "bfloat16", "int8"),
    "telltale int8, float32": ("Q8_0", "float32", "int8"),
}
LLAMACPP = {"llama.cpp BF16": "BF16", "llama.cpp Q8_0": "Q8_0"}


def rewritten(source: Path, target: Path, kind: str) -> Path:
    """``source`` with its matrices in ``kind``, everything else as it is."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    matrices, rest = getattr(gguf.GGMLQuantizationType, kind), gguf.GGMLQuantizationType.F32
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) > 1:  # both files are made from the same numbers
            numbers = gguf.quants.dequantize(gguf.quants.quantize(numbers, bf16), bf16)
        own = matrices if len(tensor.shape) > 1 else rest
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class Ours:
    """One way to read the weights, decoding plainly and natively."""

    def __init__(self, file: Path, dtype: str, weights: str | None, threads: int) -> None:
        self.model, self.tokenizer = telltale.load(file, dtype=dtype, weights=weights)
        self.decoder = open_decoder(self.model, backend="native", threads=threads)
        self._plain = Autoregressive(self.decoder)

    def run(self, ids: list[int], tokens: int) -> tuple[float, float, list[int]]:
        """Prompt and decode milliseconds a token, and the greedy tokens."""
        found = self._plain.generate(torch.tensor([ids]), max_new_tokens=tokens + 1, eos_token_id=[])
        stats = found.stats
        prompt, decode = 1e3 * stats.prefill_seconds / len(ids), 1e3 * stats.decode_seconds / tokens
        return prompt, decode, found.tokens[0].tolist()


class Theirs:
    """llama.cpp's server in this process."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_parallel, settings.n_ctx, settings.warmup, settings.port = 1, context, True, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(settings)

    def run(self, ids: list[int], tokens: int) -> tuple[float, float, list[int]]:
        """See :meth:`Ours.run`; the times are the server's own."""
        body = {"prompt": ids, "n_predict": tokens + 1, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        body |= {"return_tokens": True, "samplers": ["top_k"], "top_k": 1}
        asked = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=600) as answer:
            found = json.load(answer)
        timings = found["timings"]
        return timings["prompt_per_token_ms"], timings["predicted_per_token_ms"], found["tokens"]


def bytes_read(ours: Ours, length: int) -> int:
    """Bytes of the weights that a token needs, and of keys and values at ``length`` positions."""
    decoder = ours.decoder
    matrices = {
        id(module.weight): module.weight
        for module in ours.model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight.ndim == 2
    }
    whole = sum(weight.numel() for weight in matrices.values())
    size = whole * 34 // 32 if decoder.weight_format == "int8" else whole * decoder.dtype.itemsize
    return size + 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * length * decoder.dtype.itemsize


def parted(ours: list[int], theirs: list[int], judge: Ours, ids: list[int]) -> dict[str, Any]:
    """Where two texts part, and how close the choice was there for ``judge``."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        return {"equal": True, "tokens": min(len(ours), len(theirs))}
    text = torch.tensor([ids + ours[:place]])
    decoder = judge.decoder
    hidden = decoder.forward(text, decoder.new_cache(1, text.shape[1]), [0], prefill=True)[:, -1:]
    rounded = decoder.logits(hidden).flatten().topk(2).values
    head = decoder.parts.head
    bias = None if head.bias is None else head.bias.float()
    logits = torch.nn.functional.linear(decoder.parts.norm(hidden).float(), head.weight.float(), bias).flatten()
    top = logits.topk(2).values
    return {
        "equal": False,
        "first_difference": place,
        "top_2_gap_of_range": float((top[0] - top[1]) / (logits.max() - logits.min())),
        "tied_when_rounded": bool(rounded[0] == rounded[1]),
    }


def prompt_ids(tokenizer: Any, length: int | None, texts: list[Path]) -> list[int]:
    """The question as a chat, or ``length`` tokens of running text."""
    if length is None:
        chat = [{"role": "user", "content": QUESTION}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = tokenizer("\n\n".join(path.read_text(encoding="utf-8") for path in texts))["input_ids"]
    if len(found) < length:
        raise SystemExit(f"the texts have {len(found)} tokens; {length} were asked for")
    return found[:length]


def measured(
    files: dict[str, Path], threads: int, asked: argparse.Namespace, length: int | None = None
) -> dict[str, Any]:
    """All contestants on ``threads`` threads, interleaved."""
    torch.set_num_threads(threads)
    ours = {name: Ours(files[kind], dtype, weights, threads) for name, (kind, dtype, weights) in TELLTALE.items()}
    ids = prompt_ids(ours["telltale int8"].tokenizer, length, asked.text)
    contestants: dict[str, Any] = dict(ours)
    if not asked.alone:
        contestants |= {
            name: Theirs(files[kind], threads, len(ids) + asked.tokens + 64) for name, kind in LLAMACPP.items()
        }
    sizes = {name: bytes_read(one, len(ids) + asked.tokens // 2) for name, one in ours.items()}
    buffer = torch.from_numpy(np.ones(max(sizes.values()) // 4, dtype=np.float32))
    names = list(contestants)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    floors: dict[str, list[float]] = {name: [] for name in sizes}
    texts: dict[str, list[int]] = {}
    for one in contestants.values():
        one.run(ids, 2)
    for place in range(asked.rounds):
        for name in names[place % len(names) :] + names[: place % len(names)]:
            prompt, decode, texts[name] = contestants[name].run(ids, asked.tokens)
            times[name].append((prompt, decode))
        for name, size in sizes.items():
            floors[name].append(1e3 * read_seconds(buffer, size, threads=threads))
    found: dict[str, Any] = {"prompt_tokens": len(ids), "new_tokens": asked.tokens, "contestants": {}}
    for name in names:
        prompt, decode = (quartiles(column) for column in zip(*times[name], strict=True))
        found["contestants"][name] = {
            "decode_ms_per_token": decode,
            "prompt_ms_per_token": prompt,
            "rounds": times[name],
        }
    for name, own in floors.items():
        found["contestants"][name] |= {
            "bytes_per_token": sizes[name],
            "floor_ms": quartiles(own),
            "decode_over_floor": statistics.median(t[1] / f for t, f in zip(times[name], own, strict=True)),
        }
    found["speed_against"] = {
        f"{one} / {other}": quartiles([b[1] / a[1] for a, b in zip(times[one], times[other], strict=True)])
        for one in ours
        for other in names
        if other != one
    }
    judge = ours["telltale bfloat16"]
    same = {
        "telltale int8": ("llama.cpp Q8_0",),
        "telltale bfloat16": ("llama.cpp BF16", "telltale float32", "telltale int8"),
    }
    found["prompt_speed_against"] = {
        f"{one} / {other}": quartiles([b[0] / a[0] for a, b in zip(times[one], times[other], strict=True)])
        for one in ours
        for other in LLAMACPP
        if other in times
    }
    found["texts"] = {
        f"{one} / {other}": parted(texts[one], texts[other], ours.get(one, judge), ids)
        for one, others in same.items()
        for other in others
        if other in texts
    }
    began = time.perf_counter()
    ours["telltale int8"].decoder.look_at_weights()
    found["comparing_both_forms_ms"] = 1e3 * (time.perf_counter() - began)
    return found


def perplexity(ours: Ours, ids: list[int], window: int) -> float:
    """exp of the mean loss of every token but the first of each window."""
    decoder, total, count = ours.decoder, 0.0, 0
    for first in range(0, len(ids) - 1, window):
        text = torch.tensor([ids[first : first + window]])
        if text.shape[1] < 2:
            break
        cache = decoder.new_cache(1, text.shape[1])
        for start in range(0, text.shape[1] - 1, 16):
            part = text[:, start : min(start + 16, text.shape[1] - 1)]
            logits = decoder.logits(decoder.forward(part, cache, [start]))[0]
            wanted = text[0, start + 1 : start + 1 + part.shape[1]]
            total += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
            count += part.shape[1]
    return math.exp(total / count)


def perplexities(files: dict[str, Path], asked: argparse.Namespace) -> dict[str, Any]:
    """Of all three ways to read the weights, on the same text."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in asked.text)
    found: dict[str, Any] = {"texts": [path.name for path in asked.text], "window": asked.window}
    for name, (kind, dtype, weights) in TELLTALE.items():
        ours = Ours(files[kind], dtype, weights, 1)
        ids = ours.tokenizer(text)["input_ids"][: asked.text_tokens]
        found["sha256"], found["tokens"] = hashlib.sha256(text.encode()).hexdigest(), len(ids)
        found[name] = perplexity(ours, ids, asked.window)
        print(name, "perplexity", found[name], flush=True)
    found["int8_over_bfloat16"] = found["telltale int8"] / found["telltale bfloat16"]
    return found


def main() -> None:
    """Write the two files, measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, nargs="*", help="lengths of running text; without it, a chat")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[ROOT / "docs/layerskip/tutorial.md", ROOT / "docs/log.md"]
    )
    parser.add_argument("--text-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--only", choices=("speed", "perplexity"), help="leave the other out; the JSON's name says so")
    parser.add_argument("--name", help="the JSON's name")
    asked = parser.parse_args()
    steps: dict[str, Callable[[dict[str, Path]], Any]] = {}
    if asked.only != "perplexity":
        for threads, length in itertools.product(asked.threads, asked.prompts or [None]):
            step = f"threads_{threads}" if length is None else f"threads_{threads}_prompt_{length}"
            steps[step] = functools.partial(measured, threads=threads, asked=asked, length=length)
    if asked.only != "speed":
        steps["perplexity"] = lambda files: perplexities(files, asked)
    found: dict[str, Any] = {"xllamacpp": None if asked.alone else version("xllamacpp"), "gguf": version("gguf")}
    name = asked.name or ("decode_llamacpp" if asked.only is None else f"decode_llamacpp_{asked.only}")
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: rewritten(asked.model, Path(folder) / f"model-{kind}.gguf", kind) for kind in ("BF16", "Q8_0")}
        for step, run in steps.items():
            found[step] = run(files)
            write_result(name, model=asked.model.name, **found)


if __name__ == "__main__":
    main()
