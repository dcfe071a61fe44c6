"""Connections that wait: deadlines for headers and bodies, a bound on strangers, keys, and what a body may be like."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import contextmanager

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from serve.small_servers import CONFIGS, listening, running, served, wait_for
from telltale.serve.connections import guarded_protocol
from telltale.serve.http_errors import ApiError, check_token
from telltale.serve.http_json import DEPTH, parse

OPEN = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\n"


def connected(url: str, data: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=5)
    found.sendall(data)
    return found


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while piece := connection.recv(4096):
            found += piece
    except ConnectionResetError:
        pass
    return found


@contextmanager
def small(**limits):
    app = FastAPI()
    reached = []

    @app.get("/health")
    async def health() -> dict:
        return {}

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict:
        reached.append(1)
        return {"bytes": len(await request.body())}

    with listening(app, http=guarded_protocol(**limits)) as url:
        yield url


@pytest.mark.parametrize("data", [b"", OPEN, POST + b"X-A: 1\r\n"], ids=["nothing", "half", "half a header"])
def test_headers_have_a_deadline(data):
    with small(header_seconds=0.3, request_seconds=5) as url:
        began = time.monotonic()
        with connected(url, data) as one:
            # Another header every now and then does not help.
            if data:
                time.sleep(0.1)
                one.sendall(b"X-B: 2\r\n")
            assert answer(one).startswith(b"HTTP/1.1 408")
        assert 0.2 < time.monotonic() - began < 3


def test_a_body_has_a_deadline_also_where_nobody_reads_it():
    with small(header_seconds=5, request_seconds=0.4) as url:
        for path in (b"/v1/completions", b"/nowhere"):
            with connected(url, POST.replace(b"/v1/completions", path) + b"content-length: 1000\r\n\r\n") as one:
                began = time.monotonic()
                try:
                    while time.monotonic() - began < 4:
                        one.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    pass
                assert time.monotonic() - began < 3


def test_a_request_in_time_is_answered_and_the_connection_goes_on():
    with small(header_seconds=0.4, request_seconds=0.4) as url, connected(url) as one:
        for _ in range(3):
            one.sendall(OPEN + b"\r\n")
            found = b""
            while not found.endswith(b"{}"):
                found += one.recv(4096)
            assert found.startswith(b"HTTP/1.1 200")
            # Longer than either deadline in all: only a request under way has one.
            time.sleep(0.25)


def test_a_client_that_takes_nothing_is_closed():
    app = FastAPI()
    ended = []

    @app.get("/much")
    async def much() -> StreamingResponse:
        async def pieces():
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                ended.append(time.monotonic())

        return StreamingResponse(pieces())

    with listening(app, http=guarded_protocol(taking_seconds=0.3)) as url:
        with connected(url, b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n") as reads, connected(url) as stalls:
            stalls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalls.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
            began = time.monotonic()
            while not ended and time.monotonic() - began < 5:
                # Slowly, but it does take something.
                assert reads.recv(1 << 20)
                time.sleep(0.01)
            assert len(ended) == 1
            assert reads.recv(1 << 20)
        wait_for(lambda: len(ended) == 2)


def test_no_connection_becomes_a_websocket():
    pytest.importorskip("websockets")
    with small(header_seconds=1, request_seconds=1) as url:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        with connected(url, OPEN + upgrade + b"AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n") as one:
            assert one.recv(4096).startswith(b"HTTP/1.1 200")


def test_the_oldest_stranger_makes_room():
    with small(strangers=4) as url:
        held = [connected(url, OPEN) for _ in range(12)]
        with connected(url, OPEN + b"Connection: close\r\n\r\n") as one:
            assert answer(one).startswith(b"HTTP/1.1 200")
        for connection in held[:8]:
            assert answer(connection) == b""
        for connection in held:
            connection.close()


def test_who_has_been_let_in_is_not_closed_for_strangers():
    with running(served("autoregressive"), api_key="k") as server:
        server.app.state.server.config.http_protocol_class.most_strangers = 3
        key = b"authorization: Bearer k\r\n"
        body = json.dumps({"model": "small", "prompt": "one", "max_tokens": 400, "stream": True}).encode()
        head = b"content-length: %d\r\n\r\n" % len(body)
        with connected(server.url, POST + key + head + body) as mine:
            assert mine.recv(100).startswith(b"HTTP/1.1 200")
            wrong = [connected(server.url, OPEN) for _ in range(8)]
            assert answer(wrong[0]) == b""
            mine.sendall(b"")
            found = mine.recv(100)
            assert found
            for one in wrong:
                one.close()
        server.settle()


def test_a_wrong_key_ends_its_connection():
    with running(served("autoregressive", CONFIGS["autoregressive"]), api_key="right") as server:
        for key in (b"wrong", b"righ", b"right2", "rïght".encode()):
            with connected(
                server.url, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nauthorization: Bearer " + key + b"\r\n\r\n"
            ) as one:
                assert answer(one).startswith(b"HTTP/1.1 401")
        protocol = server.app.state.server.config.http_protocol_class
        wait_for(lambda: not protocol.connections_of_strangers)


def test_the_whole_key_counts():
    def scope(header: bytes) -> dict:
        return {"path": "/v1/models", "headers": [(b"authorization", header)]}

    check_token(scope(b"bearer  key"), "key")
    for header in (b"Bearer ke", b"Bearer keys", b"Basic key", b"key", b""):
        with pytest.raises(ApiError, match="API key"):
            check_token(scope(header), "key")


def test_depth_is_bounded_and_strings_do_not_count():
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"[]" + b"}" * (depth - 1)

    assert parse(nested(DEPTH))
    for raw in (nested(DEPTH + 1), b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000):
        with pytest.raises(ApiError, match="levels deep"):
            parse(raw)
    assert parse(json.dumps("[{" * 500 + '\\"').encode()) == "[{" * 500 + '\\"'
    # A string without an end must not take the square of its length.
    began = time.process_time()
    with pytest.raises(ApiError, match="not JSON"):
        parse(b'"' + b'\\"' * 300_000)
    assert time.process_time() - began < 2
