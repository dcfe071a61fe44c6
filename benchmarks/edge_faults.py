"""Faults: a server killed in mid-request, a thin uplink with stalls, garbage answers, garbage frames. Who answers, and when?

Every request has to be answered before its deadline + 50 ms, and nothing may be raised. The fuzzed frames go over a real socket to
a server process, whose memory is watched. A request during which this process itself was stopped (a thread that should wake every
10 ms slept for half a second) is made again, and the count of such requests is in the result.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from measurement import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from edge.small_edges import IMAGE, LABELS, counting_server, misbehaving, unsure_edge
from telltale.edge.arbitration import Arbiter, CircuitBreaker
from telltale.edge.budget import ByteBudget
from telltale.edge.client import EdgeClient, Policy, Prediction
from telltale.edge.gate import Gate
from telltale.edge.link import LinkConfig, LinkProxy
from telltale.edge.server import CloudServer
from telltale.edge.wire import Answer, Frame, Refusal, decode_reply, model_number

SLACK = 0.05


def serve_for_ever(port: int, wait: float, ready: Any) -> None:
    """A server process with a model that takes ``wait`` seconds."""
    import asyncio

    async def run() -> None:
        server = CloudServer(counting_server(wait=wait), port=port)
        await server.start()
        ready.send(server.port)
        await asyncio.Event().wait()

    asyncio.run(run())


def started_server(port: int, wait: float) -> tuple[Any, int]:
    receiving, sending = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=serve_for_ever, args=(port, wait, sending), daemon=True
    )
    process.start()
    return process, receiving.recv()


def summary(answers: list[Prediction], seconds: list[float], deadline: float) -> dict[str, Any]:
    return {
        "requests": len(answers),
        "deadline_ms": 1000 * deadline,
        "answered_in_time": int(sum(taken <= deadline + SLACK for taken in seconds)),
        "latest_ms": 1000 * max(seconds),
        "p50_ms": 1000 * float(np.median(seconds)),
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "by_server": sum(answer.source == "server" for answer in answers),
        "by_edge": sum(answer.source == "edge" for answer in answers),
    }


class Stops:
    """Times in which the machine did not run this process."""

    def __init__(self) -> None:
        self.last = 0.0
        self.repeated = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.01)
            now = time.monotonic()
            if now - before > 0.5:
                self.last = now
            before = now


STOPS = Stops()


def timed(client: EdgeClient) -> tuple[Prediction, float] | None:
    """Answer and seconds, or None if the machine stopped this process meanwhile."""
    started = time.monotonic()
    answer = client.predict(IMAGE)
    seconds = time.monotonic() - started
    time.sleep(0.02)
    if STOPS.last >= started:
        STOPS.repeated += 1
        return None
    return answer, seconds


def undisturbed(client: EdgeClient, requests: int) -> list[tuple[Prediction, float]]:
    """So many requests that the machine did not stop."""
    found: list[tuple[Prediction, float]] = []
    while len(found) < requests:
        one = timed(client)
        if one is not None:
            found.append(one)
    return found


def killed(times: int) -> dict[str, Any]:
    """SIGKILL to the server process while a request is in its model."""
    deadline, wait = 0.3, 0.1
    policy = Policy(arbiter=Arbiter("server"), deadline=deadline, gate=Gate(threshold=0.0))
    answers, seconds = [], []
    process, port = started_server(0, wait)
    with EdgeClient(unsure_edge(), f"ws://127.0.0.1:{port}", policy=policy, budget=ByteBudget(600)) as client:
        client.breaker = CircuitBreaker(failures=10**9)
        while len(answers) < times:
            client.check_server(60.0)
            killer = threading.Timer(0.05, os.kill, (process.pid, signal.SIGKILL))
            killer.start()
            one = timed(client)
            if one is not None:
                answers.append(one[0])
                seconds.append(one[1])
            killer.join()
            process.join()
            process, _ = started_server(port, wait)
    process.kill()
    return summary(answers, seconds, deadline)


def thin_uplink(requests: int) -> dict[str, Any]:
    """60 kbit/s, 200 ms round trip, 2% of segments stall by 200 ms; budgets follow the measured uplink."""
    deadline = 0.8
    policy = Policy(arbiter=Arbiter("server"), deadline=deadline, gate=Gate(threshold=0.0), codec="raw8")
    server = CloudServer(counting_server())
    with server.background():
        config = LinkConfig(rate=7500.0, round_trip=0.2, jitter=0.02, loss=0.02, timeout=0.2)
        proxy = LinkProxy("127.0.0.1", server.port, config)
        with proxy.background() as port, EdgeClient(unsure_edge(), f"ws://127.0.0.1:{port}", policy=policy) as client:
            client.breaker = CircuitBreaker(failures=10**9)
            client.check_server(20.0)
            found = undisturbed(client, requests)
    sizes = [answer.bytes_up for answer, _ in found if answer.bytes_up]
    result = summary([answer for answer, _ in found], [taken for _, taken in found], deadline)
    return {**result, "median_bytes": float(np.median(sizes)), "largest_bytes": max(sizes)}


def garbage(requests: int) -> dict[str, Any]:
    """A server whose answers are random bytes, half-right frames, wrong classes, NaN, or of another request."""
    generator = np.random.default_rng(0)
    deadline = 0.2

    async def react(socket: Any, message: bytes) -> None:
        request = Frame.decode(message).request
        kind = int(generator.integers(6))
        logs = np.log(np.full(len(LABELS), 1 / len(LABELS)))
        good = Answer(request, logs).encode()
        answers = [
            generator.bytes(int(generator.integers(0, 200))),
            good[: int(generator.integers(len(good)))],
            Answer(request, np.log(np.full(9, 1 / 9))).encode(),
            Answer(request, np.full(3, np.nan)).encode(),
            Answer(request + 1, logs).encode(),
            b"",
        ]
        await socket.send(answers[kind] if kind < 5 else "text")

    policy = Policy(arbiter=Arbiter("server"), deadline=deadline, gate=Gate(threshold=0.0))
    with misbehaving(react) as url, EdgeClient(unsure_edge(), url, policy=policy, budget=ByteBudget(600)) as client:
        client.breaker = CircuitBreaker(failures=10**9)
        client.check_server(10.0)
        found = undisturbed(client, requests)
    return summary([answer for answer, _ in found], [taken for _, taken in found], deadline)


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzzed(frames: int) -> dict[str, Any]:
    """Random, mutated and resealed frames over a socket: a typed reply for each, the connection lives, memory stays."""
    import struct
    from zlib import crc32

    from websockets.sync.client import connect

    generator = np.random.default_rng(1)
    fields = {
        "request": 1,
        "model": model_number(8, 8, 4, LABELS),
        "codec": "mosaic_webp",
        "setting": 5,
        "budget": 9000,
    }
    whole = Frame(
        **fields, deadline=0, rows=8, columns=8, patch=4, indices=(1, 2, 9), payload=generator.bytes(60)
    ).encode()
    process, port = started_server(0, 0.0)
    replies: dict[str, int] = {}
    slowest = 0.0
    with connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
        socket.recv()
        socket.send(whole)
        socket.recv(timeout=10)
        before = memory(process.pid)
        for number in range(frames):
            data = bytearray(whole)
            if number % 4 == 0:
                data = bytearray(generator.bytes(int(generator.integers(0, 2000))))
            else:
                for place in generator.integers(0, len(data), int(generator.integers(1, 8))):
                    data[place] = int(generator.integers(256))
                if number % 4 >= 2:
                    data[:3] = b"\x54\x01\x00"
                    data[-4:] = struct.pack("<I", crc32(bytes(data[:-4])))
            started = time.perf_counter()
            socket.send(bytes(data))
            reply = decode_reply(socket.recv(timeout=10))
            slowest = max(slowest, time.perf_counter() - started)
            kind = reply.kind if isinstance(reply, Refusal) else "answer"
            replies[kind] = replies.get(kind, 0) + 1
        grown = memory(process.pid) - before
    process.kill()
    return {"frames": frames, "replies": replies, "slowest_ms": 1000 * slowest, "server_memory_grown_bytes": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--frames", type=int, default=10_000)
    arguments = parser.parse_args()
    found = {}
    for name, work in {
        "killed in mid-request": lambda: killed(arguments.kills),
        "60 kbit/s with stalls": lambda: thin_uplink(arguments.requests),
        "garbage answers": lambda: garbage(arguments.requests),
        "fuzzed frames": lambda: fuzzed(arguments.frames),
    }.items():
        found[name] = work()
        print(name, found[name], flush=True)
    write_result("edge_faults", slack_ms=1000 * SLACK, faults=found, repeated_because_stopped=STOPS.repeated)


if __name__ == "__main__":
    main()
