"""The judge over HTTP: exact sums over a real socket, batches across requests, refusals that name the field, no text in logs."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import math
import socket
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from align.judge.tiny_judges import tiny_tokenizer
from telltale.align.judge.explanation import Explanation
from telltale.errors import ConfigError, DataError, MissingExtraError
from telltale.serve.judge_app import MicroBatcher, create_app

SECRET = "the-secret-of-this-prompt"
ONE = [{"role": "user", "content": f"add {SECRET}"}, {"role": "assistant", "content": "4"}]
OTHER = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "a longer answer"}]


class LengthJudge:
    """Stands in for the model: rewards are functions of the text, so that every answer can be told from the others."""

    objectives = ("short", "long", "verbosity")

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.calls = []
        self.threads = set()
        self.started = threading.Event()
        self.release = threading.Event()
        self.release.set()

    def explain_all(self, conversations):
        self.calls.append(len(conversations))
        self.threads.add(threading.current_thread().name)
        self.started.set()
        assert self.release.wait(10)
        return [self.explain(messages) for messages in conversations]

    def explain(self, messages):
        text = messages[-1]["content"]
        if text == "refuse":
            raise DataError("this conversation cannot be judged.")
        if text == "crash":
            raise RuntimeError(f"an accident with {messages[0]['content']}")
        rewards = (1.0 / (1 + len(text)), len(text) / 3.0, len(text) / 7.0)
        return Explanation.of(self.objectives, rewards, (0.7, 0.3, 0.0), (0.7, 0.3, -0.1))


@pytest.fixture
def judge():
    return LengthJudge()


@pytest.fixture
def client(judge):
    with TestClient(create_app(judge)) as found:
        yield found


@contextmanager
def listening(app):
    """The application on a free port of loopback, under uvicorn as users run it."""
    # Without a configuration of its own what it logs reaches the test.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="trace", log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_a_score_over_a_real_socket_is_the_sum_and_the_judges_own(judge, caplog):
    with caplog.at_level(logging.DEBUG), listening(create_app(judge)) as url:
        one = httpx.post(f"{url}/score", json={"messages": ONE}).json()
        many = httpx.post(f"{url}/score", json={"messages": [ONE, OTHER]}).json()
        rewards = httpx.post(f"{url}/get_reward", json={"query": [ONE, OTHER]}).json()
        crashed = httpx.post(f"{url}/score", json={"messages": [ONE[0], {"role": "assistant", "content": "crash"}]})
    expected = [judge.explain(messages) for messages in (ONE, OTHER)]
    assert one["score"] == expected[0].score == math.fsum(one["contributions"].values())
    told = {"score", "objectives", "weights", "coefficients", "contributions"}
    assert set(one) == told | {"truncated", "response_truncated", "unfamiliar"}
    assert one["objectives"] == expected[0].rewards
    assert [found["score"] for found in many] == [found.score for found in expected]
    assert rewards["rewards"] == rewards["scores"] == [found.score for found in expected]
    sums = [math.fsum(rewards["extra_logs"][f"contribution/{n}"][i] for n in judge.objectives) for i in range(2)]
    assert sums == rewards["scores"]
    assert crashed.status_code == 500
    assert SECRET not in crashed.text
    assert SECRET not in caplog.text


def test_a_client_that_goes_away_leaves_no_trace(judge, caplog):
    with caplog.at_level(logging.WARNING), listening(create_app(judge)) as url:
        address = (url.split("//")[1].split(":")[0], int(url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
        assert httpx.post(f"{url}/score", json={"messages": ONE}).status_code == 200
    assert "Traceback" not in caplog.text
    assert "Exception" not in caplog.text


def test_empty_lists_are_answered_without_the_model(client, judge):
    assert client.post("/score", json=[]).json() == []
    assert client.post("/score", json={"messages": []}).json() == []
    answer = client.post("/get_reward", json={"query": []})
    assert answer.status_code == 200
    assert answer.json() == {"rewards": [], "scores": [], "extra_logs": {}}
    assert judge.calls == []


def test_the_forms_of_a_score_body(client, judge):
    expected = [judge.explain(messages).score for messages in (ONE, OTHER)]
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in ONE]
    assert client.post("/score", json={"messages": parts}).json()["score"] == expected[0]
    for body in ([ONE, OTHER], [{"messages": ONE}, {"messages": OTHER}], {"messages": [ONE, OTHER]}):
        assert [found["score"] for found in client.post("/score", json=body).json()] == expected
    assert client.post("/score", json={"messages": ONE}).json()["score"] == expected[0]


@pytest.mark.parametrize("path", ["/score", "/get_reward"])
@pytest.mark.parametrize("raw", [b"", b"{", b"messages", b'{"messages": [}', b"\xff\xfe\x00"])
def test_what_is_not_json_is_400(client, path, raw):
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/score", "/get_reward"])
def test_what_is_nested_too_deep_is_400(client, path):
    answer = client.post(path, content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "more than 64 levels deep" in answer.json()["error"]["message"]


USER, ASSISTANT = ONE
WRONG = [
    ("/score", {}, "messages"),
    ("/score", "text", None),
    ("/score", 3, None),
    ("/score", None, None),
    ("/score", {"messages": "text"}, "messages"),
    ("/score", {"messages": None}, "messages"),
    ("/score", {"messages": ["text"]}, "messages[0]"),
    ("/score", {"messages": [[]]}, "messages[0]"),
    ("/score", {"messages": [USER]}, "messages[0].role"),
    ("/score", {"messages": [ASSISTANT]}, "messages"),
    ("/score", {"messages": [USER, ASSISTANT | {"content": "\ud800"}]}, "messages[1].content"),
    ("/score", {"messages": [USER, {"role": "assistant"}]}, "messages[1].content"),
    ("/score", {"messages": [{"content": "a"}, ASSISTANT]}, "messages[0].role"),
    ("/score", {"messages": [USER, {"role": "assistant", "content": 3}]}, "messages[1].content"),
    ("/score", {"messages": [{"role": "robot", "content": "a"}, ASSISTANT]}, "messages[0].role"),
    ("/score", {"messages": [ONE, "text"]}, "messages[1]"),
    ("/score", [ONE, {"other": ONE}], "[1].messages"),
    ("/get_reward", [], None),
    ("/get_reward", {}, "query"),
    ("/get_reward", {"query": "text"}, "query"),
    ("/get_reward", {"query": [3]}, "query[0]"),
    ("/get_reward", {"query": [ONE], "prompts": "a"}, "prompts"),
    ("/get_reward", {"query": [ONE], "prompts": []}, "prompts"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_malformed_body_is_422_and_names_the_field(client, judge, path, body, param):
    answer = client.post(path, content=json.dumps(body))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(param or "the body is ")
    assert error["code"]
    assert SECRET not in answer.text
    assert judge.calls == []


def test_what_the_judge_refuses_is_422_with_its_sentence(client):
    answer = client.post("/score", json={"messages": [ONE[0], {"role": "assistant", "content": "refuse"}]})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "this conversation cannot be judged."


def test_rendered_text_is_read_as_the_messages_that_it_renders(client, judge):
    rendered = [judge.tokenizer.apply_chat_template(messages, tokenize=False) for messages in (ONE, OTHER)]
    expected = [judge.explain(messages).score for messages in (ONE, OTHER)]
    assert client.post("/get_reward", json={"query": rendered}).json()["rewards"] == expected
    begun = [
        judge.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        for messages in (ONE, OTHER)
    ]
    assert client.post("/get_reward", json={"query": rendered, "prompts": begun}).json()["rewards"] == expected
    plain = {"query": ["add 4"], "prompts": ["add "], "labels": ["5"]}
    assert client.post("/get_reward", json=plain).json()["rewards"] == [expected[0]]
    refused = client.post("/get_reward", json={"query": [rendered[0], f"no template {SECRET}"]})
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "query[1]"
    assert SECRET not in refused.text


def test_health_and_methods(client):
    assert client.get("/health").json() == {"status": "ok", "objectives": ["short", "long", "verbosity"], "batches": 0}
    wrong = client.get("/score")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert "/get_reward" in client.get("/openapi.json").json()["paths"]


def test_requests_that_wait_together_share_a_batch_and_keep_their_answers(judge):
    app = create_app(judge)
    texts = ["x" * length for length in range(1, 25)]

    async def many():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            judge.release.clear()
            first = asyncio.create_task(client.post("/score", json={"messages": ONE}))
            await asyncio.to_thread(judge.started.wait, 10)
            rest = [
                asyncio.create_task(
                    client.post("/score", json={"messages": [USER, {"role": "assistant", "content": t}]})
                )
                for t in texts
            ]
            # The model is busy, the event loop is not.
            assert (await asyncio.wait_for(client.get("/health"), 5)).status_code == 200
            while len(app.state.batcher._waiting) < len(texts):
                await asyncio.sleep(0.001)
            judge.release.set()
            await first
            return [answer.json()["score"] for answer in await asyncio.gather(*rest)]

    scores = asyncio.run(many())
    assert scores == [judge.explain([USER, {"role": "assistant", "content": text}]).score for text in texts]
    assert judge.calls == [1, 24], "what waited while the model was busy has to go through it together"
    assert all(name.startswith("judge") for name in judge.threads), "the model never runs on the event loop"


def test_batches_keep_to_their_size_and_a_bad_request_fails_alone(judge):
    async def run(items, size):
        async with MicroBatcher(judge.explain_all, size=size, patience=0.01) as batcher:
            return await asyncio.gather(*(batcher.submit(one) for one in items), return_exceptions=True)

    def conversation(text):
        return [USER, {"role": "assistant", "content": text}]

    found = asyncio.run(run([[conversation("a")] * 3, [conversation("b")] * 2, [conversation("c")] * 9], 5))
    assert [len(answers) for answers in found] == [3, 2, 9]
    assert judge.calls == [5, 9]
    found = asyncio.run(run([[conversation("a")], [conversation("crash")], [conversation("c")]], 5))
    assert isinstance(found[1], RuntimeError)
    assert found[0][0] == judge.explain(conversation("a"))
    assert found[2][0] == judge.explain(conversation("c"))


def test_a_batcher_answers_what_it_has_before_it_closes_and_refuses_the_rest(judge):
    async def run():
        batcher = MicroBatcher(judge.explain_all, patience=0.0)
        with pytest.raises(RuntimeError, match="not running"):
            await batcher.submit([ONE])
        async with batcher:
            pending = asyncio.create_task(batcher.submit([ONE]))
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="not running"):
            await batcher.submit([ONE])
        return await pending

    assert asyncio.run(run()) == [judge.explain(ONE)]


def test_a_request_that_was_given_up_does_not_stop_the_server(judge):
    async def run():
        async with MicroBatcher(judge.explain_all, patience=0.0) as batcher:
            judge.release.clear()
            first = asyncio.create_task(batcher.submit([ONE]))
            await asyncio.to_thread(judge.started.wait, 10)
            waiting = asyncio.create_task(batcher.submit([OTHER]))
            await asyncio.sleep(0)
            first.cancel()
            waiting.cancel()
            judge.release.set()
            return await batcher.submit([OTHER])

    assert asyncio.run(run()) == [judge.explain(OTHER)]
    assert judge.calls == [1, 1], "what nobody waits for is not computed"


def test_sizes_out_of_range_and_a_missing_package_are_told(judge, monkeypatch):
    with pytest.raises(ConfigError, match="batch_size=0"):
        create_app(judge, batch_size=0)
    with pytest.raises(ConfigError, match="patience=-1"):
        create_app(judge, patience=-1)
    for package in ("fastapi", "pydantic"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, "telltale.serve.judge_app")
            with pytest.raises(MissingExtraError, match=r"pip install 'telltale\[serve\]'"):
                importlib.import_module("telltale.serve.judge_app")


def test_answers_keep_every_bit(client, judge):
    text = client.post("/score", json={"messages": OTHER}).text
    assert json.loads(text)["objectives"]["short"] == judge.explain(OTHER).rewards["short"]
