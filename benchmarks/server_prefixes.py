"""What is not read twice: choices of one prompt, turns of a chat, repeated prompts; and that no output depends on it.

Counted, not timed: tokens of prompts that went through the model, by the server's own ``/metrics``. Every request is sent to a
server with the cache of prefixes and to one without, with the same seeds; the texts are compared byte by byte. Where ``--fairness``
is given, a stream's largest gap between two tokens is also measured while prompts of 4,096 tokens are read (44M preset).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tokenizers import pre_tokenizers

from measurement import write_result
from server_process import checkpoint, metrics, serving

DECODES = {
    "autoregressive": ["--decode", "autoregressive"],
    "self-speculative": ["--decode", "self-speculative", "--exit-layer", "3", "--draft-length", "3"],
    "n-gram": ["--decode", "self-speculative", "--drafter", "ngram"],
    "step-verified": [
        *("--decode", "step-verified", "--exit-layer", "3", "--set", "beta=1.0", "--set", "threshold=0.2"),
        *("--set", "delimiter=e", "--set", "max_step_tokens=24", "--set", "candidates=2"),
    ],
}


def ask(url: str, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, "max_tokens": 24, "seed": 7, "temperature": 0.8} | options
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()


def read_by(url: str, work: Any) -> tuple[Any, int]:
    """What ``work`` gives, and how many tokens of prompts the server read for it."""

    def read() -> float:
        found = metrics(url)
        return found["telltale_prompt_tokens_total"] - found["telltale_prompt_tokens_reused_total"]

    before = read()
    found = work()
    return found, int(read() - before)


def conversation(url: str) -> dict[str, Any]:
    """Choices, turns and repetitions; the texts, and what each of them cost."""
    said = " ".join(random.Random(0).choices(["sum", "of", "two", "and", "three", "is", "five"], k=120))
    system = {"role": "system", "content": said}
    found: dict[str, Any] = {"texts": [], "read": {}}

    def note(name: str, messages: list[dict[str, str]], **options: Any) -> str:
        answer, read = read_by(url, lambda: ask(url, messages, **options))
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        found["texts"] += texts
        found["read"][name] = {"prompt": answer["usage"]["prompt_tokens"], "read": read}
        return texts[0]

    first = [system, {"role": "user", "content": "one and two?"}]
    alone = [system | {"content": said[1:]}, {"role": "user", "content": "eight choices?"}]
    note("one choice", [*alone[:1], {"role": "user", "content": "one choice?"}])
    note("eight choices", [{"role": "user", "content": said[7:]}], n=8)
    answer = note("first turn", first)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "and three?"}]
    note("second turn", second)
    note("the second turn again", second)
    note("another user of the same system prompt", [system, {"role": "user", "content": "four?"}])
    return found


def compared(folder: Path, options: list[str]) -> dict[str, Any]:
    runs = {}
    for name, cache in (("on", "512M"), ("off", "off")):
        with serving(folder, *options, "--prefix-cache", cache) as (url, _, told):
            runs[name] = conversation(url) | {
                "backend": told["backend"],
                "cached": metrics(url)["telltale_prompt_tokens_cached_total"],
                "bytes": metrics(url)["telltale_prefix_cache_bytes"],
            }
    same = sum(a == b for a, b in zip(runs["on"]["texts"], runs["off"]["texts"], strict=True))
    return {
        "texts": len(runs["on"]["texts"]),
        "texts_equal_with_and_without": same,
        "prompt_tokens_and_those_read": {name: run["read"] for name, run in runs.items()},
        "eight_choices_over_their_prompt": runs["on"]["read"]["eight choices"]["read"]
        / runs["on"]["read"]["eight choices"]["prompt"],
        "tokens_from_the_cache": runs["on"]["cached"],
        "bytes": runs["on"]["bytes"],
        "backend": runs["on"]["backend"],
    }


def gaps_while_reading(folder: Path, *, prompts: int) -> dict[str, Any]:
    """The gaps of a stream, alone and while prompts of 4,096 tokens are read behind it, in milliseconds."""
    with serving(folder, "--prefix-cache", "off") as (url, _, told):
        reading = threading.Event()
        done = threading.Event()
        gaps: dict[str, list[float]] = {"alone": [], "while_reading": []}

        def follow() -> None:
            # Letters alone: of bytes that are no character yet a stream shows nothing, whatever the engine has done.
            barred = {str(place): -100 for place, letter in enumerate(["<e>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
                      if not (len(letter) == 1 and letter.isascii())}  # fmt: skip
            body = {"model": "m", "prompt": "go", "max_tokens": 1500, "stream": True, "logit_bias": barred}
            with httpx.stream("POST", f"{url}/v1/completions", json=body | {"seed": 1}, timeout=600) as stream:
                last = None
                for line in stream.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        gaps["while_reading" if reading.is_set() else "alone"].append(now - last)
                    last = now
                    if done.is_set():
                        return

        thread = threading.Thread(target=follow)
        thread.start()
        time.sleep(3)
        for place in range(prompts):
            text = "".join(random.Random(place).choices("abcdefgh ", k=4096))
            reading.set()
            body = {"model": "m", "prompt": text, "max_tokens": 1}
            httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()
            reading.clear()
        done.set()
        thread.join()
    found = {"prompt_tokens": 4096, "prompts": prompts, "backend": told["backend"]}
    for name, own in gaps.items():
        ordered = sorted(1e3 * gap for gap in own)
        found[name] = {
            "tokens": len(ordered),
            "median_ms": statistics.median(ordered),
            "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
            "largest_ms": ordered[-1],
        }
    return found


def main() -> None:
    """Run what is asked for and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fairness", type=int, default=0, metavar="PROMPTS", help="long prompts to be read beside a stream"
    )
    parser.add_argument("--decodes", nargs="*", choices=list(DECODES), help="default: all of them")
    asked = parser.parse_args()
    prompts, decodes = asked.fairness, asked.decodes
    with tempfile.TemporaryDirectory() as name:
        if prompts:
            folder = checkpoint(Path(name) / "small", preset="small", max_positions=6144)
            found = gaps_while_reading(folder, prompts=prompts)
            print(json.dumps(found, indent=2))
            write_result("server_fairness", **found)
            return
        folder = checkpoint(Path(name) / "tiny")
        found = {}
        for decode in decodes or DECODES:
            found[decode] = compared(folder, DECODES[decode])
            print(decode, json.dumps(found[decode]), flush=True)
            write_result("server_prefixes", decodes=found)


if __name__ == "__main__":
    main()
