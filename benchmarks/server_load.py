"""The server under load: sixteen streaming clients at once, the same requests one after the other, and clients that are killed.

Claims: every text is that of offline decoding, however many clients there are; together they are served faster than in turn; a
hundred clients killed in mid-stream leave memory, cache slots and branches where they were. Each decode has a server process of
its own (``telltale serve``, one thread) and OpenAI's client talks to it. Time to first step is from the request to the first text.
Without ``--chains`` (a folder with the trained ``target`` and ``draft`` of the chains task) only the 44M-parameter preset is
measured: random weights whose late layers add little, so that its early layers and a draft made of them are often right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from measurement import quartiles, write_result
from telltale.models.loading import without_progress_bars
from telltale.models.presets import build
from telltale.serve.open_model import open_served
from telltale.tasks import chains

CLIENTS = 16
KILLS = 100
SETTLED = 60
"""Seconds in which the server has to notice that nobody is left."""
DRAFTING_LAYERS = 4
VOCABULARY = 4096


@dataclass
class Workload:
    """What one server decodes: a model, how, and the requests."""

    target: Path
    prompts: list[str]
    max_tokens: int
    long_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What one client got."""

    text: str
    tokens: int
    first: float
    """Seconds from the request to the first text."""
    gaps: list[float]
    """Seconds from each text to the next."""


def command_line(options: dict[str, Any]) -> list[str]:
    found = []
    for name, value in options.items():
        if name == "settings":
            for key, one in value.items():
                found += ["--set", f"{key}={json.dumps(one)}"]
        else:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


@asynccontextmanager
async def served(workload: Workload, name: str):
    """The server's process, and a client."""
    command = [sys.executable, "-m", "telltale", "serve", str(workload.target), "--name", name, "--port", "0", "--json"]
    command += ["--threads", "1", "--max-rows", str(CLIENTS), *command_line(workload.options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            line = await asyncio.to_thread(process.stdout.readline)
            if not line:
                raise SystemExit(f"the server of {name} did not start: {command}")
            lines.append(line)
        told = json.loads("".join(lines))
        client = openai.AsyncOpenAI(base_url=f"{told['url']}/v1", api_key="none", max_retries=0, timeout=600)
        yield client, psutil.Process(process.pid), told
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: openai.AsyncOpenAI, model: str, workload: Workload, place: int) -> Answer:
    started = last = time.perf_counter()
    first, gaps, text, tokens = 0.0, [], "", 0
    stream = await client.completions.create(
        model=model,
        prompt=workload.prompts[place],
        max_tokens=workload.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        seed=place,
        **workload.sampling,
    )
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if not chunk.choices or not chunk.choices[0].text:
            continue
        now = time.perf_counter()
        if text:
            gaps.append(now - last)
        else:
            first = now - started
        last = now
        text += chunk.choices[0].text
    return Answer(text, tokens, first, gaps)


def offline(workload: Workload) -> list[str]:
    """The text of each prompt decoded alone, without a server."""
    found = open_served(workload.target, **workload.options)
    decoder, texts = found.decoder, []
    for place, prompt in enumerate(workload.prompts):
        ids = decoder.tokenizer(prompt)["input_ids"]
        result = decoder.generate(
            [ids],
            max_new_tokens=workload.max_tokens,
            generator=torch.Generator().manual_seed(place),
            eos_token_id=found.eos,
            **workload.sampling,
        )
        tokens = result.tokens[0, : int(result.lengths[0])].tolist()
        texts.append(decoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


async def loaded(
    client: openai.AsyncOpenAI, server: psutil.Process, model: str, workload: Workload, rounds: int
) -> Any:
    """Rounds of the same requests in turn and at once, interleaved."""
    places = range(len(workload.prompts))
    runs: dict[str, list[dict[str, Any]]] = {"in_turn": [], "at_once": []}
    answers: list[Answer] = []
    for turn in range(rounds):
        for kind in list(runs)[:: 1 if turn % 2 else -1]:
            cpu, wall = sum(server.cpu_times()[:2]), time.perf_counter()
            if kind == "in_turn":
                found = [await ask(client, model, workload, place) for place in places]
            else:
                found = list(await asyncio.gather(*(ask(client, model, workload, place) for place in places)))
            wall, cpu = time.perf_counter() - wall, sum(server.cpu_times()[:2]) - cpu
            answers += found
            runs[kind].append({"wall": wall, "cpu": cpu, "answers": found})
    return runs, answers


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    firsts = [answer.first for run in runs for answer in run["answers"]]
    gaps = [gap for run in runs for answer in run["answers"] for gap in answer.gaps]
    tokens = [sum(answer.tokens for answer in run["answers"]) for run in runs]
    speeds = [count / run["wall"] for count, run in zip(tokens, runs, strict=True)]
    low, middle, high = quartiles(speeds)
    return {
        "tokens": tokens[0],
        "tokens_per_second": middle,
        "tokens_per_second_q1": low,
        "tokens_per_second_q3": high,
        "server_cpu_ms_per_token": 1e3 * statistics.median(run["cpu"] / n for run, n in zip(runs, tokens, strict=True)),
        "first_step_ms": percentiles(firsts),
        "next_step_ms": percentiles(gaps),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"p50": 1e3 * sum(seconds), "p95": 1e3 * sum(seconds)}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50": 1e3 * cuts[9], "p95": 1e3 * cuts[18]}


async def held(client: openai.AsyncOpenAI, server: psutil.Process) -> dict[str, float]:
    """What the server holds once nothing is decoded any more."""
    url = str(client.base_url).removesuffix("/v1/")
    deadline = time.monotonic() + SETTLED
    async with httpx.AsyncClient(timeout=60) as asking:
        while True:
            lines = (await asking.get(f"{url}/metrics")).text.splitlines()
            values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
            if values["telltale_rows_live"] == values["telltale_queue_depth"] == 0:
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"rows are still decoded {SETTLED} seconds after the last client went away.")
            await asyncio.sleep(0.02)
    return {
        "rss_mb": server.memory_info().rss / 2**20,
        "slots_in_use": values['telltale_cache_slots{state="in_use"}'],
        "branches_in_use": values["telltale_cache_branches_in_use"],
        "cache_bytes": values["telltale_cache_bytes"],
        "clients_gone": values.get('telltale_requests_total{endpoint="/v1/completions",status="499"}', 0.0),
        "outputs_dropped": values.get('telltale_outputs_total{reason="dropped"}', 0.0),
    }


async def killed(client: openai.AsyncOpenAI, server: psutil.Process, model: str, workload: Workload) -> Any:
    """Clients one after the other that close the connection after some pieces of a long answer."""
    draw = random.Random(0)
    samples = [await held(client, server) | {"kills": 0}]
    for kill in range(KILLS):
        stream = await client.completions.create(
            model=model,
            prompt=workload.prompts[kill % len(workload.prompts)],
            max_tokens=workload.long_tokens,
            stream=True,
            seed=kill,
            temperature=1.0,
        )
        pieces = draw.randint(1, 3)
        async for _ in stream:
            pieces -= 1
            if not pieces:
                break
        await stream.close()
        if (kill + 1) % 10 == 0:
            samples.append(await held(client, server) | {"kills": kill + 1})
    return {
        "samples": samples,
        "rss_growth_mb": samples[-1]["rss_mb"] - samples[0]["rss_mb"],
        "rss_growth_after_the_first_tenth_mb": samples[-1]["rss_mb"] - samples[1]["rss_mb"],
        # The allocator keeps what the first clients made it take; a leak would go on.
        "rss_growth_over_the_second_half_mb": samples[-1]["rss_mb"] - samples[len(samples) // 2]["rss_mb"],
        "slots_in_use": samples[-1]["slots_in_use"],
        "branches_in_use": samples[-1]["branches_in_use"],
        "cache_bytes_as_before": samples[-1]["cache_bytes"] == samples[0]["cache_bytes"],
    }


async def measure(name: str, workload: Workload, rounds: int) -> dict[str, Any]:
    expected = await asyncio.to_thread(offline, workload)
    async with served(workload, name) as (client, server, told):
        await ask(client, name, workload, 0)
        runs, answers = await loaded(client, server, name, workload, rounds)
        same = sum(answer.text == expected[place % len(expected)] for place, answer in enumerate(answers))
        kills = await killed(client, server, name, workload)
    turn, once = summary(runs["in_turn"]), summary(runs["at_once"])
    gains = [one["wall"] / other["wall"] for one, other in zip(runs["in_turn"], runs["at_once"], strict=True)]
    found = {
        "served": {key: value for key, value in told.items() if key != "url"},
        "clients": len(workload.prompts),
        "max_tokens": workload.max_tokens,
        "sampling": workload.sampling or {"temperature": 1.0},
        "texts_as_offline": same,
        "texts": len(answers),
        "in_turn": turn,
        "at_once": once,
        "throughput_at_once_over_in_turn": statistics.median(gains),
        "kills": kills,
    }
    print(
        f"{name}: {same}/{len(answers)} texts as offline; {turn['tokens_per_second']:.0f} tokens/s in turn, "
        f"{once['tokens_per_second']:.0f} at once ({found['throughput_at_once_over_in_turn']:.2f}x); first step p50 "
        f"{once['first_step_ms']['p50']:.0f} ms, p95 {once['first_step_ms']['p95']:.0f} ms; {KILLS} kills: RSS "
        f"{kills['rss_growth_mb']:+.1f} MB, {kills['slots_in_use']:.0f} slots in use"
    )
    return found


def small_models(folder: Path) -> tuple[Path, Path]:
    """The preset "small" with late layers that add little, and its first layers as a model of their own."""
    target = build("small", vocabulary_size=VOCABULARY, seed=0, max_positions=1024)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else 0
            if layer >= DRAFTING_LAYERS and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(0.01)
    draft = build("small", vocabulary_size=VOCABULARY, seed=0, max_positions=1024, num_hidden_layers=DRAFTING_LAYERS)
    draft.load_state_dict(target.state_dict(), strict=False)
    # Every eighth word ends a sentence, and with it a step.
    words = {f"w{index}{'.' if index % 8 == 0 else ''}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, model in (("target", target), ("draft", draft)):
        with without_progress_bars():
            model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)
    return folder / "target", folder / "draft"


def small_workloads(folder: Path) -> dict[str, Workload]:
    target, draft = small_models(folder)
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(1, VOCABULARY, 2)}" for _ in range(24 + 2 * i)) for i in range(CLIENTS)]
    common = {"prompts": prompts, "max_tokens": 24, "long_tokens": 900}
    greedy, sampled = {"temperature": 0.0}, {"temperature": 0.7}
    steps = {"delimiter": ".", "max_step_tokens": 32, "score": "log-probability", "threshold": -7.5, "candidates": 2}
    drafts = {"decode": "self-speculative", "exit_layer": DRAFTING_LAYERS, "draft_length": 3}
    return {
        "small-autoregressive": Workload(target, sampling=greedy, **common),
        "small-self-speculative": Workload(target, options=drafts, sampling=greedy, **common),
        "small-step-verified": Workload(
            target, options={"draft": draft, "settings": steps}, sampling=sampled, **common
        ),
    }


def chain_workloads(folder: Path) -> dict[str, Workload]:
    target, draft = folder / "target", folder / "draft"
    prompts = [problem.prompt for problem in chains.generate(CLIENTS, seed=123)]
    common = {"prompts": prompts, "max_tokens": 96, "long_tokens": 400}
    steps = {"signal_model": "target", "beta": 1.0, "candidates": 4, "fallback": "plain", "threshold": 0.8}
    return {
        "chains-autoregressive": Workload(target, sampling={"temperature": 0.0}, **common),
        "chains-step-verified": Workload(
            target, options={"draft": draft, "settings": steps}, sampling={"temperature": 0.7, "top_p": 0.8}, **common
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=Path, help="folder with the trained target and draft of the chains task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="the workloads whose names hold this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        workloads = small_workloads(Path(folder))
        if arguments.chains is not None:
            workloads |= chain_workloads(arguments.chains)
        chosen = {name: one for name, one in workloads.items() if not arguments.only or arguments.only in name}
        results = {name: asyncio.run(measure(name, one, arguments.rounds)) for name, one in chosen.items()}
    write_result("server_load", clients=CLIENTS, kills=KILLS, rounds=arguments.rounds, workloads=results)


if __name__ == "__main__":
    main()
