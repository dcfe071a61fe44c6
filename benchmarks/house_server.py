"""One greedy stream and sixteen over HTTP: CPU per token of the server, against ``Autoregressive`` and an older checkout's server.

The model is the 44M-parameter preset with random weights (:func:`server_load.small_models`). Three processes, one thread each, hold
it at once: this checkout's ``telltale serve``, the older one's, and the library's decoder. In each round they answer in turn and in
changing order; a round's figures are ratios. The clients run in this process, so their time does not count.

    python benchmarks/house_server.py OLD_CHECKOUT --rounds 9
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from house_speed import summarised
from measurement import write_result
from server_load import Workload, ask, served, small_workloads
from telltale.decode import Autoregressive
from telltale.models.loading import load

ROOT = Path(__file__).resolve().parents[1]
STOP = ["w4095 w4093 w4091"]
"""A text that does not come, so that every token is looked at and none is cut."""


async def over_http(client: Any, process: Any, name: str, workload: Workload, clients: int) -> tuple[float, list[str]]:
    """CPU seconds of the server per token for ``clients`` requests at once, and the texts."""
    cpu = sum(process.cpu_times()[:2])
    answers = await asyncio.gather(*(ask(client, name, workload, place) for place in range(clients)))
    cpu = sum(process.cpu_times()[:2]) - cpu
    return cpu / sum(answer.tokens for answer in answers), [answer.text for answer in answers]


def in_process(decoder: Autoregressive, tokenizer: Any, workload: Workload) -> tuple[float, list[str]]:
    """The same for the first prompt and the library's decoder."""
    ids = tokenizer(workload.prompts[0], return_tensors="pt")["input_ids"]
    cpu = time.process_time()
    found = decoder.generate(
        ids,
        max_new_tokens=workload.max_tokens,
        eos_token_id=[],
        stop_strings=workload.sampling.get("stop"),
        tokenizer=tokenizer,
    )
    cpu = time.process_time() - cpu
    return cpu / int(found.lengths[0]), [tokenizer.decode(found.tokens[0], clean_up_tokenization_spaces=False)]


async def measure(old: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """The rounds of every case."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        workload = replace(small_workloads(Path(folder))["small-autoregressive"], max_tokens=tokens)
        model, tokenizer = load(workload.target)
        library = Autoregressive(model)
        path = os.environ.get("PYTHONPATH")
        async with AsyncExitStack() as stack:
            servers = {}
            for name, checkout in (("new", ROOT), ("old", old)):
                os.environ["PYTHONPATH"] = str(checkout / "src")
                servers[name] = await stack.enter_async_context(served(workload, name))
            if path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = path
            for case, stop, clients in (
                ("one stream", None, 1),
                ("one stream, stop strings", STOP, 1),
                ("16 streams", None, 16),
            ):
                sampling = {"temperature": 0.0} | ({"stop": stop} if stop else {})
                asked = replace(workload, sampling=sampling)
                runs: dict[str, list[float]] = {"new": [], "old": [], "library": []}
                texts: dict[str, list[str]] = {}
                for turn in range(rounds + 1):
                    for side in list(runs)[:: 1 if turn % 2 else -1]:
                        if side == "library":
                            if clients > 1:
                                continue
                            seconds, texts[side] = in_process(library, tokenizer, asked)
                        else:
                            client, process, _ = servers[side]
                            seconds, texts[side] = await over_http(client, process, side, asked, clients)
                        if turn:
                            runs[side].append(seconds)
                if any(found != texts["new"] for found in texts.values()):
                    raise SystemExit(f"{case}: the texts differ")
                found: dict[str, Any] = {
                    "cpu_ms_per_token": {
                        side: 1e3 * statistics.median(values) for side, values in runs.items() if values
                    }
                }
                for other in ("old", "library"):
                    if runs[other]:
                        ratios = [new / one for new, one in zip(runs["new"], runs[other], strict=True)]
                        found[f"new_over_{other}"] = summarised(ratios, other == "library")
                results[case] = found
                print(case, found, flush=True)
    return results


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    cases = asyncio.run(measure(options.old.resolve(), options.rounds, options.tokens))
    write_result("house_server", rounds=options.rounds, tokens=options.tokens, cases=cases)


if __name__ == "__main__":
    sys.exit(main())
