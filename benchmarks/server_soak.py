"""The server for a while: many streams, clients that are killed, that read slowly, that never finish their headers, and nonsense.

Each part counts what must not happen: a 5xx, an answer that does not come, a row, slot or branch that stays, memory that grows. In
the soak, streams, chats with a growing history, constrained answers and abandoned streams go on at once; the resident memory and
the cache of prefixes are sampled on the way. At the end the server gets SIGTERM in the middle of streams, each of which must end
with its ``[DONE]`` or with an error event. ``--fuzz``: schemathesis on the OpenAPI document of a server with few positions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import psutil

from measurement import write_result
from server_process import checkpoint, metrics, serving

WORDS = ["sum", "of", "two", "and", "three", "is", "five", "so", "we", "add", "one", "more"]
CHOICE = {"guided_choice": ["yes", "no"]}


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], *, leave_after: int | None = None, pause: float = 0.0
) -> str:
    """How a stream ended: "done", "left", an error event's code, or "cut"."""
    count = 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "done"
                if line.startswith('data: {"error"'):
                    return str(json.loads(line[6:])["error"]["code"])
                count += line.startswith("data: ")
                if leave_after is not None and count >= leave_after:
                    return "left"
                if pause:
                    await asyncio.sleep(pause)
    except httpx.HTTPError as error:
        return type(error).__name__
    return "cut"


def body(draw: random.Random, **options: Any) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=draw.randint(3, 40)))
    asks = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": draw.randint(4, 48)}
    return asks | {"seed": draw.randrange(99)} | options


async def worker(client: httpx.AsyncClient, place: int, deadline: float, ends: dict[str, int]) -> None:
    """One client until the deadline, of every kind in turn."""
    draw, history = random.Random(place), []
    while time.monotonic() < deadline:
        kind = draw.randrange(6)
        if kind == 0:
            end = await stream(client, body(draw), leave_after=draw.randint(1, 6))
        elif kind == 1:
            end = await stream(client, body(draw, max_tokens=16), pause=0.05)
        elif kind == 2:
            end = await stream(client, body(draw, **CHOICE))
        elif kind == 3:
            history = [*history[-6:], *body(draw)["messages"]]
            end = await stream(client, body(draw) | {"messages": history})
        elif kind == 4:
            end = await stream(client, body(draw, n=3, logprobs=True, top_logprobs=2))
        else:
            end = await stream(client, body(draw))
        ends[end] = ends.get(end, 0) + 1


async def soak(url: str, server: psutil.Process, *, streams: int, seconds: float, samples: int = 20) -> dict[str, Any]:
    ends: dict[str, int] = {}
    found = []
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        deadline = time.monotonic() + seconds
        work = [asyncio.create_task(worker(client, place, deadline, ends)) for place in range(streams)]
        for _ in range(samples):
            await asyncio.sleep(seconds / samples)
            now = await asyncio.to_thread(metrics, url)
            found.append(
                {
                    "seconds": seconds - (deadline - time.monotonic()),
                    "rss_mb": server.memory_info().rss / 2**20,
                    "prefix_cache_mb": now["telltale_prefix_cache_bytes"] / 2**20,
                    "connections": len(server.net_connections()),
                }
            )
        await asyncio.gather(*work)
    half = [one["rss_mb"] for one in found[samples // 2 :]]
    quarter = max(1, len(half) // 2)
    return {
        "streams": streams,
        "seconds": seconds,
        "ends": ends,
        "rss_growth_over_the_second_half_mb": statistics.median(half[-quarter:]) - statistics.median(half[:quarter]),
        "samples": found,
    }


async def kills(url: str, count: int) -> dict[str, int]:
    """Connections that are closed in the middle of a stream, hard."""
    ends: dict[str, int] = {}
    for place in range(count):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            end = await stream(client, body(random.Random(place), max_tokens=400), leave_after=1 + place % 5)
            ends[end] = ends.get(end, 0) + 1
    return ends


def half_open(url: str, count: int) -> dict[str, Any]:
    """Headers that never end, while an honest client asks."""
    address = urlparse(url)
    sockets = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            one = socket.create_connection((address.hostname, address.port), timeout=5)
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-")
            sockets.append(one)
    began = time.perf_counter()
    status = httpx.post(
        f"{url}/v1/completions", json={"model": "m", "prompt": "two", "max_tokens": 2}, timeout=60
    ).status_code
    waited = time.perf_counter() - began
    time.sleep(11)
    closed = 0
    for one in sockets:
        one.settimeout(1)
        try:
            rest = one.recv(4096)
            closed += not rest or b" 408 " in rest
        except TimeoutError:
            pass
        except OSError:
            # Reset: so ends what came beyond the cap.
            closed += 1
        one.close()
    return {
        "opened": len(sockets),
        "honest_status": status,
        "honest_seconds": waited,
        "closed_after_11_seconds": closed,
    }


def settled(url: str, seconds: float = 60.0) -> dict[str, float]:
    """What the server holds when nobody asks any more."""
    deadline = time.monotonic() + seconds
    while True:
        now = metrics(url)
        held = {
            "rows": now["telltale_rows_live"],
            "waiting": now["telltale_queue_depth"],
            "slots": now['telltale_cache_slots{state="in_use"}'],
            "branches": now["telltale_cache_branches_in_use"],
        }
        if not any(held.values()) or time.monotonic() > deadline:
            errors = sum(count for name, count in now.items() if "requests_total" in name and 'status="5' in name)
            return held | {"answers_5xx": errors, "engine_failures": now["telltale_engine_failures_total"]}
        time.sleep(0.1)


def fuzz(folder: Path, examples: int, seconds: float) -> dict[str, Any]:
    """schemathesis on the server's own document, for about so long: no answer may be a 5xx, and nothing may stay behind.

    It has a server of its own with few positions: what is drawn asks for 128 answers as long as there is room.
    """
    model = checkpoint(folder / "fuzz", max_positions=96)
    program = Path(sys.executable).parent / "schemathesis"
    with serving(model, "--decode", "self-speculative", "--exit-layer", "3", "--draft-length", "3") as (url, server, _):
        command = [str(program), "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", str(examples), "--seed", "1", "--workers", "1", "--request-timeout", "60"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-time", str(int(seconds))]
        before = server.memory_info().rss
        ended = True
        # It leaves a folder of its own where it runs.
        with tempfile.TemporaryDirectory() as place, (folder / "fuzz.log").open("w+") as log:
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=place)
            try:
                # The phase of coverage does not look at its budget while it tries one operation.
                run.wait(2 * seconds)
            except subprocess.TimeoutExpired:
                ended = False
                run.kill()
                run.wait()
            log.seek(0)
            tail = log.read().strip().splitlines()[-12:]
        statuses: dict[str, float] = {}
        for name, count in metrics(url).items():
            if found := re.search(r'requests_total\{.*status="(\d+)"', name):
                statuses[found[1]] = statuses.get(found[1], 0) + count
        return {
            "examples": examples,
            "ended_by_itself": ended,
            "exit_code": run.returncode,
            "answers": sum(statuses.values()),
            "statuses": dict(sorted(statuses.items())),
            "rss_growth_mb": (server.memory_info().rss - before) / 2**20,
            "tail": tail,
        } | settled(url)


async def terminated(url: str, server: psutil.Process, streams: int) -> dict[str, Any]:
    """SIGTERM in the middle of streams: each ends in order."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        asks = [body(random.Random(place), max_tokens=300) for place in range(streams)]
        work = [asyncio.create_task(stream(client, one)) for one in asks]
        await asyncio.sleep(1.0)
        began = time.perf_counter()
        server.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*work)
    with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
        await asyncio.to_thread(server.wait, 60)
    return {
        "streams": streams,
        "ends": {end: ends.count(end) for end in sorted(set(ends))},
        "seconds_to_the_end": time.perf_counter() - began,
        "process_ended": not server.is_running() or server.status() == psutil.STATUS_ZOMBIE,
    }


def main() -> None:
    """Run every part, or the fuzzing, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--crowds", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--crowd-seconds", type=float, default=30.0)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--fuzz", type=int, metavar="EXAMPLES", help="do this alone, with so many an operation")
    parser.add_argument("--fuzz-seconds", type=float, default=120.0, help="its budget; it is ended after twice as long")
    asked = parser.parse_args()
    found: dict[str, Any] = {}

    def note(name: str, part: Any) -> None:
        """What is there is written at once: a run that is cut short keeps it."""
        found[name] = part
        shown = {key: value for key, value in part.items() if key != "samples"} if isinstance(part, dict) else "done"
        print(name, json.dumps(shown), flush=True)
        write_result("server_soak", **found)

    with tempfile.TemporaryDirectory() as name:
        if asked.fuzz:
            result = fuzz(Path(name), asked.fuzz, asked.fuzz_seconds)
            print("fuzz", json.dumps(result), flush=True)
            write_result("server_fuzz", **result)
            return
        model = checkpoint(Path(name) / "tiny")
        options = ["--decode", "self-speculative", "--exit-layer", "3", "--draft-length", "3", "--grace", "3"]
        with serving(model, *options, "--queue", "256", "--prefix-cache", "32M") as (url, server, _):
            crowds: list[dict[str, Any]] = []
            for count in asked.crowds:
                crowds.append(asyncio.run(soak(url, server, streams=count, seconds=asked.crowd_seconds, samples=4)))
                note("crowds", crowds)
            note("kills", asyncio.run(kills(url, asked.kills)))
            note("after_kills", settled(url))
            note("half_open", half_open(url, 280))
            note("soak", asyncio.run(soak(url, server, streams=asked.streams, seconds=60 * asked.minutes)))
            note("after_soak", settled(url))
            note("sigterm", asyncio.run(terminated(url, server, 64)))


if __name__ == "__main__":
    main()
