"""What a server lives through: clients that leave, more work than it takes on, strangers, accidents, and its own end."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
from dataclasses import replace
from typing import ClassVar

import httpx
import openai
import pytest
import torch

from serve.small_servers import CONFIGS, NAME, STEPS, Held, offline, running, served, slowed, text_of, wait_for
from serve.small_tokenizers import byte_level
from telltale.errors import ConfigError
from telltale.serve import openai_app
from telltale.serve.http_errors import check_host, checked_key
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_app import create_app
from telltale.serve.openai_schema import completion_body
from telltale.serve.scheduler import Event

PROMPT = "the sum of two"
SECRET = "the-secret-of-this-prompt"
LONG = {"model": NAME, "prompt": PROMPT, "max_tokens": 480, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module", params=list(CONFIGS))
def endless(request):
    """Outputs that never end by themselves: no token ends one."""
    found = served(request.param)
    with running(_Endless(found.name, found.decoder, found.decode)) as server:
        yield server


class _Endless(ServedModel):
    eos: ClassVar[list[int]] = []


@pytest.mark.long
def test_clients_that_leave_free_everything(endless):
    """Streaming or not, while queued, while the prompt is read, in the middle of a step."""
    empty = endless.held()
    metrics = endless.service.metrics
    finished = metrics.value("telltale_outputs_total", reason="length")
    slowed(endless.service)
    for delay in (0.0, 0.002, 0.01, 0.03, 0.1):
        for stream in (True, False):
            with socket.create_connection(_address(endless.url)) as client:
                client.sendall(_request(endless.url, LONG | {"stream": stream, "n": 2}))
                wait_for(lambda: endless.held().rows + endless.held().waiting > 0)
                time.sleep(delay)
            endless.settle()
    held = endless.held()
    assert (held.branches_in_use, held.slots_in_use, held.waiting) == (0, 0, 0)
    assert held.cache_bytes == empty.cache_bytes
    gone = metrics.value("telltale_requests_total", endpoint="/v1/completions", status="499")
    assert gone == 10
    assert metrics.value("telltale_outputs_total", reason="length") == finished, (
        "an output that nobody wanted was decoded to its end"
    )
    assert metrics.value("telltale_outputs_total", reason="dropped") > 10


@pytest.mark.long
def test_a_client_that_leaves_does_not_change_the_others(endless):
    found = endless.service.served
    tokens, _ = offline(found, [byte_level()(PROMPT)["input_ids"]], seed=5, temperature=1.0, max_new_tokens=60)
    texts = []

    def stay():
        answer = endless.client().completions.create(model=NAME, prompt=PROMPT, max_tokens=60, temperature=1.0, seed=5)
        texts.append(answer.choices[0].text)

    staying = threading.Thread(target=stay)
    staying.start()
    for _ in range(4):
        stream = endless.client().completions.create(stream=True, **LONG)
        next(iter(stream))
        stream.close()
    staying.join(30)
    assert texts == [text_of(tokens[0])]
    endless.settle()


def test_more_work_than_it_takes_on_is_refused_at_once():
    with running(served("autoregressive"), max_rows=2, queue=1) as server:
        held = Held(server.service)
        waiting = [threading.Thread(target=_ask, args=(server, 2)), threading.Thread(target=_ask, args=(server, 1))]
        waiting[0].start()
        wait_for(held.reached.is_set)
        waiting[1].start()
        wait_for(lambda: server.held().waiting == 1)
        started = time.monotonic()
        with pytest.raises(openai.RateLimitError) as refusal:
            _ask(server, 1)
        assert time.monotonic() - started < 5
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert refusal.value.code == "rate_limit_exceeded"
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": NAME, "rows": 2, "waiting": 1}
        held.release()
        for thread in waiting:
            thread.join(30)
        assert _ask(server, 3).usage.completion_tokens > 0
        with pytest.raises(openai.BadRequestError) as never:
            _ask(server, 4)
        assert never.value.param == "n"


def test_rows_that_wait_are_dropped_when_their_client_leaves():
    with running(served("autoregressive"), max_rows=1, queue=5) as server:
        held = Held(server.service)
        first = threading.Thread(target=_ask, args=(server, 1))
        first.start()
        wait_for(held.reached.is_set)
        with socket.create_connection(_address(server.url)) as client:
            client.sendall(_request(server.url, LONG | {"n": 5}))
            wait_for(lambda: server.held().waiting == 5)
        gone = {"endpoint": "/v1/completions", "status": "499"}
        wait_for(lambda: server.service.metrics.value("telltale_requests_total", **gone) == 1)
        held.release()
        first.join(30)
        server.settle()
        assert server.service.metrics.value("telltale_outputs_total", reason="dropped") == 0, (
            "a row that nobody waited for was decoded"
        )
        assert _ask(server, 5).choices[4].index == 4


def test_strangers_are_told_401():
    with running(served("autoregressive"), api_key="the-key") as server:
        assert server.client(api_key="the-key").models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError) as wrong:
            server.client(api_key="another").models.list()
        assert wrong.value.code == "invalid_api_key"
        wrong_ways = [{}, *({"Authorization": value} for value in ("Bearer the-key2", "the-key", "Basic the-key"))]
        with httpx.Client() as stranger:
            for path in ("/v1/models", "/v1/completions", "/metrics", "/nowhere", "/openapi.json"):
                for headers in wrong_ways:
                    answer = stranger.post(server.url + path, headers=headers, json={"model": NAME, "prompt": PROMPT})
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
        for method in ("GET", "HEAD"):
            assert httpx.request(method, f"{server.url}/health").status_code == 200
        answer = httpx.get(f"{server.url}/metrics", headers={"Authorization": "bearer the-key"})
        assert answer.status_code == 200


def test_keys_and_hosts_that_are_refused():
    for key in ("", "with space", "ümlaut", "line\n"):
        with pytest.raises(ConfigError):
            checked_key(key)
    assert checked_key(None) is None
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_host(host, api_key=None, anonymous=False)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="API key"):
            check_host(host, api_key=None, anonymous=False)
        check_host(host, api_key="key", anonymous=False)
        check_host(host, api_key=None, anonymous=True)
    with pytest.raises(ConfigError, match="256"):
        check_host("256.1.1.1", api_key=None, anonymous=False)


def test_bodies_that_are_too_large_or_no_json_or_never_end(monkeypatch):
    monkeypatch.setattr(openai_app, "BODY_SECONDS", 0.3)
    with running(served("autoregressive"), max_body=1000) as server:
        url = f"{server.url}/v1/completions"
        large = httpx.post(url, json={"model": NAME, "prompt": "x" * 1000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        chunked = httpx.post(url, content=iter([b"x" * 600] * 3), headers={"Content-Type": "application/json"})
        assert chunked.status_code == 413
        form = httpx.post(url, data={"model": NAME})
        assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert httpx.post(url, content=b"{}").json()["error"]["param"] == "model"
        with socket.create_connection(_address(server.url)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in client.recv(1000)


def test_a_turn_that_fails_ends_its_rows_and_nothing_else(caplog):
    with running(served("step-verified")) as server, caplog.at_level(logging.DEBUG):
        scheduler = server.service.scheduler

        def fails(*arguments):
            raise RuntimeError(f"an accident with {SECRET}")

        answers = []
        for stream in (False, True):
            engine = scheduler._engine
            engine.advance = fails
            body = {"model": NAME, "prompt": SECRET, "stream": stream}
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body))
            wait_for(lambda broken=engine: scheduler._engine is not broken)
        whole, stream = answers
        assert whole.status_code == 500
        assert whole.json()["error"]["type"] == "server_error"
        assert stream.status_code == 200, "the status is sent before the accident"
        assert '"type":"server_error"' in stream.text
        assert "[DONE]" not in stream.text
        for told in (whole.text, stream.text, caplog.text):
            assert SECRET not in told
        assert "RuntimeError" in caplog.text
        server.settle()
        assert _ask(server, 1).choices[0].finish_reason in ("length", "stop")
        assert server.service.metrics.value("telltale_requests_total", endpoint="/v1/completions", status="500") == 2


def test_a_model_that_gives_nan_is_told_of():
    from decode.models_that_draft import drafting_model
    from telltale.decode.step_verified import StepVerified

    broken = drafting_model(vocabulary_size=len(byte_level()))
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    opened = StepVerified(broken, None, byte_level(), CONFIGS["self-speculative"])
    with running(ServedModel(NAME, opened, "self-speculative")) as server:
        for override in ({}, {"speculate": False}):
            for temperature in (0, 1):
                body = {"model": NAME, "prompt": PROMPT, "temperature": temperature, "telltale": override}
                answer = httpx.post(f"{server.url}/v1/completions", json=body)
                assert answer.status_code == 500
                assert "NumericalError" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_cannot_be_made_again_is_told_by_the_health_check():
    with running(served("autoregressive")) as server:
        scheduler = server.service.scheduler

        def broken(*_, **__):
            raise RuntimeError("no")

        scheduler._engine.advance = scheduler.decoder.engine = broken
        with pytest.raises(openai.InternalServerError):
            _ask(server, 1)
        wait_for(lambda: scheduler.broken)
        assert httpx.get(f"{server.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as refusal:
            _ask(server, 1)
        assert refusal.value.status_code == 503


def test_answers_under_way_are_finished_when_the_server_ends():
    with running(served("autoregressive")) as server:
        stream = server.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=150, temperature=0, stream=True
        )
        chunks = [next(iter(stream))]
        server.server.should_exit = True
        chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason is not None


def test_answers_that_take_too_long_are_given_up_when_the_server_ends():
    service = create_app(served("autoregressive")).state.service

    async def ended() -> list[Event]:
        async with service:
            held = Held(service)
            _, handle = await service.begin(completion_body(LONG | {"n": 2}))
            await asyncio.to_thread(held.reached.wait, 20)
            threading.Timer(0.05, held.release).start()
        return [event async for event in handle]

    events = asyncio.run(ended())
    failures = [event.failure.status for event in events if event.failure is not None]
    assert failures == [503, 503], "a reader would have waited for ever"
    assert not service.scheduler._thread.is_alive()


def test_nothing_that_was_asked_or_said_is_logged(caplog):
    with caplog.at_level(logging.DEBUG), running(served("autoregressive"), log_level="trace") as server:
        body = {"model": NAME, "prompt": f"{SECRET} is", "max_tokens": 4, "echo": True, "stop": SECRET + "!"}
        answers = [
            httpx.post(f"{server.url}/v1/completions", json=body),
            httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}),
            httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": [SECRET, 5]}),
            httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": SECRET * 200}),
            httpx.post(f"{server.url}/v1/chat/completions", json={"model": NAME, "messages": [{"role": SECRET}]}),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 400, 400, 400]
        assert SECRET in answers[0].text
        assert all(SECRET not in answer.text for answer in answers[2:])
    assert SECRET not in caplog.text
    assert "/v1/completions" in caplog.text, "the log was not watched"


def test_metrics_are_prometheus_text_and_add_up():
    found = served("step-verified", replace(STEPS, candidates=2))
    with running(found, max_rows=4) as server:
        usage = _ask(server, 3, max_tokens=40).usage
        httpx.post(f"{server.url}/v1/completions", json={})
        httpx.get(f"{server.url}/nowhere/{SECRET}")
        answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+')
    assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines)
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert values['telltale_requests_total{endpoint="/v1/completions",status="200"}'] == 1
    assert values['telltale_requests_total{endpoint="/v1/completions",status="400"}'] == 1
    assert values['telltale_requests_total{endpoint="other",status="404"}'] == 1
    assert SECRET not in answer.text
    assert values["telltale_engine_failures_total"] == 0, "a counter that first shows up at 1 has never risen"
    assert values["telltale_turns_total"] > 10
    draft, target = (values[f'telltale_tokens_total{{source="{name}"}}'] for name in ("draft", "target"))
    assert draft + target == usage.completion_tokens
    assert draft == usage.completion_tokens_details.accepted_prediction_tokens
    assert values['telltale_unused_tokens_total{why="rejected"}'] > 0
    assert values['telltale_steps_total{outcome="accepted"}'] > 0
    assert values["telltale_time_to_first_step_seconds_count"] == 3
    assert values['telltale_time_to_first_step_seconds_bucket{le="+Inf"}'] == 3
    assert values["telltale_queue_seconds_count"] == 3
    assert values["telltale_step_seconds_count"] > 3
    assert values['telltale_cache_slots{state="all"}'] == 4
    assert values['telltale_cache_slots{state="in_use"}'] == values["telltale_rows_live"] == 0
    assert values["telltale_queue_depth"] == values["telltale_cache_branches_in_use"] == 0


def _ask(server, n, max_tokens=4):
    return server.client().completions.create(
        model=NAME, prompt=PROMPT, n=n, max_tokens=max_tokens, temperature=1.0, seed=1
    )


def _address(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def _request(url, body):
    request = httpx.Request("POST", f"{url}/v1/completions", json=body)
    headers = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(request.content)}"]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *headers, "", ""]).encode() + request.content
