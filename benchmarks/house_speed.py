"""CPU time per token of the decoders against an older checkout, and of served rows against ``Autoregressive``.

Two processes, one for each checkout, hold the same small models of random weights (speed does not depend on the text). In each
round of a case both run it in turn, a few times, and the shortest run of each counts: other work on the machine only adds time. A
round's figure is the ratio new / old; the summary gives the median over rounds and the upper end of a 95% t-interval of the mean
log ratio. "engine" cases compare, within the new checkout, rows admitted to an engine as a server does with the library's decoder.

In bfloat16 the native step rounds as the processor's units do, which may change between checkouts: there tokens may differ, and
it is told where they do.

    python benchmarks/house_speed.py OLD_CHECKOUT --rounds 9 --out benchmarks/results/house_speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"small": (8, 128, 1024), "middle": (8, 384, 4096)}
"""Layers, hidden size, vocabulary."""
NEW_TOKENS = {"small": 96, "middle": 32}
T_975 = {8: 2.306, 10: 2.228, 11: 2.201, 12: 2.179, 14: 2.145, 16: 2.120, 19: 2.093, 24: 2.064, 29: 2.045}
LIMIT_OLD = 1.03
LIMIT_ENGINE = 1.1


def cases() -> dict[str, dict[str, Any]]:
    """Name -> settings of everything that is timed."""
    found: dict[str, dict[str, Any]] = {}
    for size in SIZES:
        for backend in ("native", "fused"):
            common = {"size": size, "backend": backend}
            found |= {
                f"{size} {backend}: plain": common | {"method": "plain"},
                f"{size} {backend}: exit 4, draft 3": common | {"method": "exit"},
                f"{size} {backend}: engine, plain": common | {"method": "engine"},
                f"{size} {backend}: engine, speculative": common | {"method": "engine-exit"},
            }
    small = {"size": "small", "backend": "native"}
    found |= {
        "small native: n-grams": small | {"method": "ngram"},
        "small native: both": small | {"method": "both"},
        "small native: auto": small | {"method": "auto"},
        "small native: plain, sampled": small | {"method": "plain", "temperature": 0.8},
        "small native: exit 4, draft 3, sampled": small | {"method": "exit", "temperature": 0.8},
        "small native: plain, 8 rows": small | {"method": "plain", "rows": 8},
        "small native: exit 4, draft 3, 8 rows": small | {"method": "exit", "rows": 8},
        "small fused: plain, 8 rows": small | {"backend": "fused", "method": "plain", "rows": 8},
        "small native: plain, stop strings": small | {"method": "plain", "stop": True},
        "small native: exit 4, draft 3, stop strings": small | {"method": "exit", "stop": True},
        "small native: engine, plain, stop strings": small | {"method": "engine", "stop": True},
        "small native: engine, speculative, stop strings": small | {"method": "engine-exit", "stop": True},
    }
    for size in SIZES:
        half = {"size": size, "backend": "native", "dtype": "bfloat16"}
        found |= {
            f"{size} native, bfloat16: plain": half | {"method": "plain"},
            f"{size} native, bfloat16: exit 4, draft 3": half | {"method": "exit"},
            f"{size} native, bfloat16: plain, 8 rows": half | {"method": "plain", "rows": 8},
        }
    return found


def main() -> None:
    """Run the rounds, or with ``--worker`` answer them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--swaps", type=int, default=6, help="turns of each side in a round")
    parser.add_argument("--seconds", type=float, default=0.03, help="CPU time of one turn, about")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        answer(options.seconds)
        return
    if options.old is None:
        parser.error("expected the path of an older checkout")
    chosen = {name: case for name, case in cases().items() if options.only in name}
    workers = {"old": started(options.old, options.seconds), "new": started(ROOT, options.seconds)}
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    for name, case in chosen.items():
        for turn in range(options.rounds + 1):
            sides = [("new", case)]
            if case["method"].startswith("engine"):
                plain = case | {"method": "plain" if case["method"] == "engine" else "exit"}
                sides = [("new", plain), ("new", case)]
            else:
                sides = [("old", case), ("new", case)]
            best = [math.inf, math.inf]
            found: list[Any] = [None, None]
            for swap in range(options.swaps if case["size"] == "small" else max(2, options.swaps // 2)):
                for place in (0, 1) if (turn + swap) % 2 else (1, 0):
                    checkout, asked_for = sides[place]
                    found[place] = asked(workers[checkout], asked_for)
                    best[place] = min(best[place], found[place]["seconds"])
            equal = "temperature" in case or found[0]["tokens"] == found[1]["tokens"]
            if not equal and "dtype" not in case:
                raise SystemExit(f"{name}: the tokens differ")
            # The first round warms up.
            if turn:
                ratios[name].append(best[1] / best[0])
        one = summarised(ratios[name], "engine" in name)
        verdict = ("" if one["holds"] else "TOO SLOW") + ("" if equal else "  (other tokens)")
        print(f"{name:50s} {one['median']:.3f}  upper {one['upper_95']:.3f}  {verdict}", flush=True)
        if options.out is not None:
            summary = {name: summarised(values, "engine" in name) for name, values in ratios.items() if values}
            head = {"rounds": options.rounds, "threads": 1, "machine": platform.machine(), "new_tokens": NEW_TOKENS}
            options.out.write_text(json.dumps(head | {"cases": summary}, indent=1) + "\n")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def summarised(ratios: list[float], engine: bool) -> dict[str, Any]:
    """Median, upper end of the interval of the geometric mean, and whether that is within the limit."""
    logs = [math.log(ratio) for ratio in ratios]
    count = len(logs)
    t = next((value for degrees, value in sorted(T_975.items()) if degrees >= count - 1), 2.0)
    if count - 1 < min(T_975):
        t = 4.303
    upper = math.exp(statistics.mean(logs) + t * statistics.stdev(logs) / count**0.5)
    limit = LIMIT_ENGINE if engine else LIMIT_OLD
    return {
        "median": round(statistics.median(ratios), 4),
        "upper_95": round(upper, 4),
        "limit": limit,
        "holds": upper <= limit,
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def started(checkout: Path, seconds: float) -> subprocess.Popen[str]:
    """A worker that imports telltale from ``checkout``."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--seconds", str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def asked(worker: subprocess.Popen[str], case: dict[str, Any]) -> dict[str, Any]:
    """The worker's measurement of a case."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(case) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def answer(seconds: float) -> None:
    """Measure what is asked for on standard input, one line of JSON each."""
    import torch

    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        if line not in known:
            known[line] = prepared(case)
            known[line]()
        run = known[line]
        tokens, times = [], []
        while sum(times) < seconds or not times:
            began = time.process_time()
            tokens = run()
            times.append(time.process_time() - began)
        # Other work on the machine only ever adds time.
        spent = min(times) / len(tokens)
        print(json.dumps({"seconds": spent, "tokens": tokens}), flush=True)


class Letters:
    """A tokenizer whose token i is a letter; it never writes what the stop strings are made of."""

    chat_template = None

    def decode(self, ids: Any, **_: Any) -> str:
        """See the class."""
        return "".join(chr(97 + i % 26) for i in ids)

    def get_vocab(self) -> dict[str, int]:
        """See the class."""
        return {str(i): i for i in range(1024)}


DECODERS: dict[tuple[str, str, str], Any] = {}


def opened(size: str, backend: str, dtype: str) -> Any:
    """A decoder whose late layers change little, so that drafts of the early ones are often accepted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from telltale.models import open_decoder

    if (size, backend, dtype) not in DECODERS:
        layers, hidden, vocabulary = SIZES[size]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for layer in model.model.layers[layers // 2 :]:
                layer.self_attn.o_proj.weight.mul_(0.3)
                layer.mlp.down_proj.weight.mul_(0.3)
        DECODERS[size, backend, dtype] = open_decoder(model.to(getattr(torch, dtype)), backend=backend)
    return DECODERS[size, backend, dtype]


def prepared(case: dict[str, Any]) -> Any:
    """A function without arguments that decodes and returns the new tokens of all rows in one list."""
    import torch

    from telltale.decode import Autoregressive, SelfSpeculative, StepVerified, StepVerifiedConfig

    decoder = opened(case["size"], case["backend"], case.get("dtype", "float32"))
    rows, method = case.get("rows", 1), case["method"]
    ids = torch.randint(0, 1024, (rows, 32), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS[case["size"]], "eos_token_id": []}
    if case.get("stop"):
        options |= {"stop_strings": ["\n\nQ:", "12"], "tokenizer": Letters()}
    if method.startswith("engine"):
        exits = {"exit_layer": 4, "draft_length": 3} if method == "engine-exit" else {}
        config = StepVerifiedConfig(policy="speculative" if exits else "target", **exits)
        served = StepVerified(decoder, None, Letters(), config)
        engine = served.engine()

        def run() -> list[int]:
            request = served.request(ids, **options)
            found: list[int] = []
            for row in served.rows(request):
                engine.admit(row)
            while engine.rows:
                for one in engine.advance():
                    found += one.tokens
            return found

        return run
    if method == "plain":
        one: Any = Autoregressive(decoder)
    elif method in ("exit", "both"):
        one = SelfSpeculative(decoder, 4, 3, drafter=method)
    elif method == "ngram":
        one = SelfSpeculative(decoder, draft_length=3, drafter="ngram")
    else:
        one = SelfSpeculative(decoder)
    sampled = {"temperature": case["temperature"]} if "temperature" in case else {}

    def generate() -> list[int]:
        generator = {"generator": torch.Generator().manual_seed(2)} if sampled else {}
        return one.generate(ids, **options, **sampled, **generator).tokens.flatten().tolist()

    return generate


if __name__ == "__main__":
    main()
