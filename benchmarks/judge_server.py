"""A judge over HTTP against the same judge in a loop over batches: how much of its speed a server keeps.

The server is ``telltale serve --judge`` in a process of its own on loopback, with one thread; clients are coroutines here, each of
which posts one conversation, waits for the answer and posts the next. "offline" is ``Judge.explain_all`` on the same conversations
in this process, with the same batches, also with one thread: it has all of them at once and sorts them by length, which a server
cannot. Answers have to be the same numbers to 1e-5 before anything is timed. Both ways take turns; a rate is conversations per
second of wall time, and per second of CPU time of whoever computes (the clients' own is not the server's). The model has random
weights and 19 objectives: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from judge_best_of import WORDS, judge_on
from measurement import quartiles, write_result
from telltale.align.judge.judge import Judge, conversation

TARGET = 0.9
"""Of the offline rate that the server has to keep, where the model is the work."""
BATCH = 32
Chats = list[list[dict[str, str]]]


def chats_of(count: int, longest: int) -> Chats:
    """Conversations whose prompts and responses have up to ``longest`` words each."""
    generator = random.Random(0)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(longest // 4, longest)))

    return [conversation(text(), text()) for _ in range(count)]


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server of the judge in ``folder``, and its process."""
    command = [sys.executable, "-m", "telltale", "serve", "--judge", str(folder), "--port", "0", "--json"]
    command += ["--threads", "1", "--batch-size", str(BATCH)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start.")
            text += line
        url = json.loads(text)["url"]
        with httpx.Client(transport=httpx.HTTPTransport(retries=50)) as client:
            client.get(f"{url}/health", timeout=60).raise_for_status()
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)


async def asked(url: str, chats: Chats, clients: int) -> list[float]:
    """Scores of all conversations, asked for by so many clients."""
    scores: list[float] = [0.0] * len(chats)
    waiting = iter(range(len(chats)))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as session:

        async def work() -> None:
            for index in waiting:
                answer = await session.post(f"{url}/score", json={"messages": chats[index]})
                scores[index] = answer.raise_for_status().json()["score"]

        await asyncio.gather(*(work() for _ in range(clients)))
    return scores


def measure(preset: str, longest: int, count: int, clients: int, rounds: int) -> dict[str, Any]:
    """One setting; rates of both ways, round by round."""
    torch.set_num_threads(1)
    judge = judge_on(preset, BATCH)
    chats = chats_of(count, longest)
    found: dict[str, list[dict[str, float]]] = {"offline": [], "served": []}
    with tempfile.TemporaryDirectory() as scratch:
        judge.save(Path(scratch) / "judge")
        with served(Path(scratch) / "judge") as (url, process):
            batches = _batches(url)
            apart = _agreement(judge, chats, asyncio.run(asked(url, chats, clients)))
            batches = _batches(url) - batches
            for index in range(rounds):
                for name in ("offline", "served") if index % 2 == 0 else ("served", "offline"):
                    own = psutil.Process() if name == "offline" else process
                    cpu, wall = sum(own.cpu_times()[:2]), time.perf_counter()
                    if name == "offline":
                        judge.explain_all(chats)
                    else:
                        asyncio.run(asked(url, chats, clients))
                    wall, cpu = time.perf_counter() - wall, sum(own.cpu_times()[:2]) - cpu
                    found[name].append({"wall_seconds": wall, "cpu_seconds": cpu})
    return {
        "preset": preset,
        "conversations": count,
        "words_at_most": longest,
        "clients": clients,
        "batch_size": BATCH,
        "conversations_per_pass_of_the_server": count / batches,
        "largest_difference": apart,
        "rounds": found,
        "conversations_per_second": {
            name: count / quartiles([one["wall_seconds"] for one in runs])[1] for name, runs in found.items()
        },
        "server_over_offline": {
            kind: quartiles([a[f"{kind}_seconds"] / b[f"{kind}_seconds"] for a, b in zip(*found.values(), strict=True)])
            for kind in ("wall", "cpu")
        },
    }


def _batches(url: str) -> int:
    """How often the server's model has been called."""
    return int(httpx.get(f"{url}/health").json()["batches"])


def _agreement(judge: Judge, chats: Chats, answers: list[float]) -> float:
    wanted = torch.tensor(judge.score(chats), dtype=torch.float64)
    apart = float((torch.tensor(answers, dtype=torch.float64) - wanted).abs().max())
    if apart > 1e-5:
        raise SystemExit(f"scores differ by {apart}; nothing was timed.")
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--preset", help="Only this one, in place of both settings.")
    arguments = parser.parse_args()
    settings = [("small", 128, 128), ("tiny", 128, 512)]
    if arguments.preset:
        settings = [setting for setting in settings if setting[0] == arguments.preset]
    results = []
    for preset, longest, count in settings:
        found = measure(preset, longest, count, arguments.clients, arguments.rounds)
        results.append(found)
        kept = {kind: f"{ratio[1]:.2f}" for kind, ratio in found["server_over_offline"].items()}
        print(preset, found["conversations_per_second"], f"server over offline: {kept}", flush=True)
    write_result("judge_server", target=TARGET, settings=results)


if __name__ == "__main__":
    main()
