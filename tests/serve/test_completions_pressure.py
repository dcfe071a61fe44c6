"""Work that is refused before it costs anything, accidents outside a turn, and clients that are killed by the hundred."""

from __future__ import annotations

import gc
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from serve.small_servers import CONTEXT, NAME, STEPS, Held, running, served, slowed, wait_for
from telltale.decode import reading as pieces
from telltale.serve.scheduler import ResponseHandle

ASK = {"model": NAME, "prompt": "the sum of two", "max_tokens": 4, "temperature": 0}


def post(server, **change):
    return httpx.post(f"{server.url}/v1/completions", json=ASK | change, timeout=30)


class HeldEncoder:
    """Keeps the tokenizer's thread at its next prompt until :meth:`release`; counts the prompts it is given."""

    def __init__(self, service) -> None:
        self.open, self.prompts = threading.Event(), 0
        encode = service.encoder._completion

        def held(*arguments):
            self.prompts += 1
            assert self.open.wait(30)
            return encode(*arguments)

        service.encoder._completion = held

    def release(self) -> None:
        self.open.set()


def test_more_outputs_than_ever_fit_are_refused_unread():
    with running(served("autoregressive"), max_rows=2, queue=2) as server:
        encoder = HeldEncoder(server.service)
        for change, param in (
            ({"prompt": ["two"] * 100_000}, "prompt"),
            ({"prompt": [[5]] * 5}, "prompt"),
            ({"prompt": ["two"] * 3, "n": 2}, "n"),
            ({"n": 5}, "n"),
        ):
            answer = post(server, **change)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert encoder.prompts == 0
        encoder.release()
        assert len(post(server, prompt=["two"] * 2, n=2).json()["choices"]) == 4


def test_a_limit_beyond_the_context_is_named_whatever_the_prompt():
    talk = {"model": NAME, "messages": [{"role": "user", "content": "two"}]}
    with running(served("autoregressive")) as server:
        for path, body, param, limit in (
            ("completions", ASK, "max_tokens", CONTEXT),
            ("chat/completions", talk, "max_tokens", 10**30),
            ("chat/completions", talk, "max_completion_tokens", 10**4200),
        ):
            answer = httpx.post(f"{server.url}/v1/{path}", json=body | {param: limit})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
            assert len(error["message"]) < 200
        # What fits by itself and not with the prompt is still told by the prompt.
        assert post(server, max_tokens=CONTEXT - 1).json()["error"]["param"] == "prompt"


def test_prompts_that_are_being_read_count_as_work():
    with running(served("autoregressive"), max_rows=1, queue=2) as server, ThreadPoolExecutor(3) as pool:
        encoder = HeldEncoder(server.service)
        reading = [pool.submit(post, server) for _ in range(3)]
        wait_for(lambda: server.service.scheduler._load == 3)
        assert post(server).status_code == 429
        encoder.release()
        assert [one.result().status_code for one in reading] == [200] * 3
        assert post(server).status_code == 200
        wait_for(lambda: server.service.scheduler._load == 0)


def test_places_are_given_back_when_nothing_comes_of_a_prompt():
    with running(served("autoregressive"), max_rows=1, queue=0) as server:
        for change in ({"prompt": "two " * 600}, {"prompt": [10**6]}):
            assert post(server, **change).status_code == 400
            assert server.service.scheduler._load == 0
        encoder = HeldEncoder(server.service)
        host, _, port = server.url.removeprefix("http://").partition(":")
        content = httpx.Request("POST", server.url, json=ASK).content
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + content)
            wait_for(lambda: encoder.prompts == 1)
            assert post(server).status_code == 429
        wait_for(lambda: server.service.scheduler._load == 0)
        encoder.release()
        assert post(server).status_code == 200
        metrics = server.service.metrics
        wait_for(lambda: metrics.value("telltale_requests_total", endpoint="/v1/completions", status="499") == 1)


def test_a_row_that_cannot_be_taken_in_is_told_and_those_behind_it_are_served():
    with running(served("autoregressive"), max_rows=3, queue=5) as server, ThreadPoolExecutor(3) as pool:
        scheduler = server.service.scheduler
        held = Held(server.service)
        live = pool.submit(post, server, max_tokens=400)
        wait_for(held.reached.is_set)
        engine, admit = scheduler._engine, scheduler._engine.admit

        def fails(row):
            if row.stopping.limit == 7:
                raise RuntimeError("an accident")
            return admit(row)

        engine.admit = fails
        bad = pool.submit(post, server, max_tokens=7)
        wait_for(lambda: server.held().waiting == 1)
        behind = pool.submit(post, server, max_tokens=9)
        wait_for(lambda: server.held().waiting == 2)
        held.release()
        assert [one.result().status_code for one in (live, bad, behind)] == [500, 500, 200]
        server.settle()
        assert (scheduler._load, scheduler.broken) == (0, False)
        assert server.service.metrics.value("telltale_engine_failures_total") == 1


def test_a_row_that_cannot_be_dropped_does_not_end_the_server():
    with running(served("autoregressive"), max_rows=2) as server:
        scheduler = server.service.scheduler
        engine = scheduler._engine

        def fails(number):
            raise RuntimeError("an accident")

        slowed(server.service)
        stream = server.client().completions.create(**ASK | {"max_tokens": 480, "temperature": 1.0}, stream=True)
        next(iter(stream))
        engine.drop = fails
        stream.close()
        wait_for(lambda: scheduler._engine is not engine)
        assert post(server).status_code == 200
        assert (scheduler.broken, server.service.metrics.value("telltale_engine_failures_total")) == (False, 1)


@pytest.mark.long
def test_a_hundred_clients_killed_mid_stream_leave_nothing_behind():
    draw = random.Random(0)
    config = replace(STEPS, candidates=2, max_step_tokens=4)
    with (
        running(served("step-verified", config), max_rows=4, prefix_cache=None) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):

        def kill(seed):
            body = ASK | {"max_tokens": 480, "temperature": 1.0, "seed": seed, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                for _ in range(draw.randint(1, 2)):
                    next(lines)

        kill(0)
        server.settle()
        before = server.held()
        for seed in range(1, 100):
            kill(seed)
        server.settle()
        assert server.held() == before
        assert (before.slots_in_use, before.branches_in_use, server.service.scheduler._load) == (0, 0, 0)
        metrics = server.service.metrics
        assert metrics.value("telltale_outputs_total", reason="dropped") > 90
        wait_for(lambda: _tickets() == 0)


def _tickets() -> int:
    gc.collect()
    return sum(type(one) is ResponseHandle for one in gc.get_objects())


def test_a_long_prompt_does_not_hold_up_who_is_being_answered(monkeypatch):
    monkeypatch.setattr(pieces, "piece_of", lambda _: 32)
    with running(served("autoregressive")) as server, ThreadPoolExecutor(2) as pool:
        engine, held = server.service.scheduler._engine, Held(server.service)
        advance, turns = engine.advance, []

        def watched(*arguments):
            found = advance(*arguments)
            turns.append({one.number for one in found})
            return found

        engine.advance = watched
        first = pool.submit(post, server, max_tokens=60)
        wait_for(held.reached.is_set)
        second = pool.submit(post, server, prompt="two " * 320)
        wait_for(lambda: server.held().waiting == 1)
        held.release()
        assert [one.result().status_code for one in (first, second)] == [200, 200]
    assert next(place for place, numbers in enumerate(turns) if 1 in numbers) >= 320 // 32
    assert all(0 in numbers for numbers in turns[: 320 // 32])
