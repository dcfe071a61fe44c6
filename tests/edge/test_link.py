"""A real socket between edge and server: budgets, refusals, faults. Every request is answered, whatever happens."""

import concurrent.futures
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from edge.small_edges import IMAGE, LABELS, counting_server, misbehaving, unsure_edge
from telltale.edge.arbitration import Arbiter, CircuitBreaker
from telltale.edge.budget import ByteBudget
from telltale.edge.client import EdgeClient, Policy
from telltale.edge.gate import Gate
from telltale.edge.link import LinkConfig, LinkProxy
from telltale.edge.selection import register_selector, selectors
from telltale.edge.server import CloudServer, Served
from telltale.edge.wire import Answer, Frame, Refusal, decode_reply
from telltale.errors import ConfigError, DataError

TRUST = Policy(arbiter=Arbiter("server"), deadline=2.0)
SLACK = 0.5
"""Seconds beyond the deadline on a machine that may be busy; ``benchmarks/edge_faults.py`` holds the contract's 0.05."""


def client(url, *, policy=TRUST, budget=600, **options):
    return EdgeClient(unsure_edge(), url, policy=policy, budget=ByteBudget(budget), **options)


def test_a_request_is_answered_within_its_bytes():
    server = CloudServer(counting_server())
    with server.background():
        proxy = LinkProxy("127.0.0.1", server.port)
        with proxy.background() as port, client(f"ws://127.0.0.1:{port}") as edge:
            edge.check_server()
            assert edge.predict(IMAGE).source == "server"
            for _ in range(60):
                before = proxy.up
                answer = edge.predict(IMAGE)
                assert answer.label == "cat"
                assert answer.bytes_up == proxy.up - before <= 600
                assert answer.patches > 1
    assert proxy.handshakes > 100
    assert server.measures.answered == 61


def test_the_gate_and_no_server_stay_at_the_edge():
    kept = Policy(gate=Gate(threshold=9.0))
    with EdgeClient(unsure_edge(), None) as edge:
        assert edge.predict(IMAGE).source == "edge"
        assert "no server" in edge.predict(IMAGE).reason
    with EdgeClient(unsure_edge(), None, policy=kept) as edge:
        assert "sure" in edge.predict(IMAGE).reason
    with pytest.raises(ConfigError, match="ws://"):
        EdgeClient(unsure_edge(), "http://127.0.0.1:1")
    for token in ("", "caf\u00e9", "a\n"):
        with pytest.raises(ConfigError, match="no header can carry"):
            EdgeClient(unsure_edge(), "ws://127.0.0.1:1", policy=TRUST, token=token)


def test_fusion_uses_the_weight_of_the_budget():
    fused = Policy(arbiter=Arbiter("fused", {4: 3.0}), deadline=2.0)
    shy = Policy(arbiter=Arbiter("fused", {64: 3.0}), deadline=2.0)
    with CloudServer(counting_server()).background() as url:
        with client(url, policy=fused) as edge:
            answer = edge.predict(IMAGE)
            assert (answer.label, answer.source) == ("cat", "fused")
        with client(url, policy=shy) as edge:
            assert edge.predict(IMAGE).source == "edge"


@pytest.mark.parametrize(
    ("arbiter", "words"),
    [
        (Arbiter("fused", {}), "not fitted"),
        (Arbiter("fused", {4: 0.0, 64: 0.0}), "0 at every budget"),
        (Arbiter("fused", {4: 1.0, 6: 0.0}), "the server's weight is 0"),
        (Arbiter("edge"), "never asks"),
    ],
)
def test_an_answer_that_cannot_count_costs_no_bytes(arbiter, words):
    server = CloudServer(counting_server())
    with server.background():
        proxy = LinkProxy("127.0.0.1", server.port)
        policy = Policy(arbiter=arbiter, deadline=2.0)
        with proxy.background() as port, client(f"ws://127.0.0.1:{port}", policy=policy) as edge:
            if arbiter.heeds():
                edge.check_server()
            else:
                with pytest.raises(DataError, match=words):
                    edge.check_server()
            before = proxy.up
            answer = edge.predict(IMAGE)
            assert words in answer.reason
            assert (answer.source, answer.bytes_up, proxy.up - before) == ("edge", 0, 0)
            assert (proxy.connections > 0) == arbiter.heeds()
            assert edge.breaker.state == "closed"


def test_a_weightless_request_goes_only_to_measure_a_stale_uplink():
    policy = Policy(arbiter=Arbiter("fused", {60: 1.0}), codec="raw8", deadline=2.0)
    with CloudServer(counting_server()).background() as url:
        now = [0.0]
        budget = ByteBudget(first_rate=300.0, clock=lambda: now[0])
        with EdgeClient(unsure_edge(), url, policy=policy, budget=budget) as edge:
            edge.check_server()
            assert edge.predict(IMAGE).bytes_up == 0
            now[0] = 3.0
            probe = edge.predict(IMAGE)
            assert probe.bytes_up > 0
            assert probe.source == "edge"
            assert edge.predict(IMAGE).source == "fused"  # the link was fast: more patches, whose weight is not 0


def test_a_selector_that_fails_is_no_fault_of_the_server():
    if "broken" not in selectors():

        @register_selector("broken")
        def broken(importance, embeddings, budget):
            """The same patch twice, but for the blank image of the warm-up."""
            return [0] if budget == 1 and len(set(importance.tolist())) == 1 else [3] * budget

    policy = Policy(selector="broken", arbiter=Arbiter("server"), deadline=2.0)
    breaker = CircuitBreaker(failures=1)
    with CloudServer(counting_server()).background() as url, client(url, policy=policy, breaker=breaker) as edge:
        edge.check_server()
        for _ in range(2):
            answer = edge.predict(IMAGE)
            assert (answer.source, answer.bytes_up) == ("edge", 0)
            assert "distinct indices" in answer.reason
        assert breaker.state == "closed"


def test_a_budget_too_small_and_a_deadline_too_short_stay_at_the_edge():
    with CloudServer(counting_server()).background() as url:
        with client(url, budget=30) as edge:
            edge.check_server()
            answer = edge.predict(IMAGE)
            assert "header" in answer.reason
            assert answer.bytes_up == 0
            assert edge.breaker.state == "closed"
        slow = ByteBudget(first_rate=10.0)
        with EdgeClient(unsure_edge(), url, policy=TRUST, budget=slow) as edge:
            edge.check_server()
            assert "uplink carries nothing" in edge.predict(IMAGE).reason


def test_pairs_that_do_not_fit_are_told():
    other = counting_server(labels=("x", "y", "z"))
    with CloudServer(other).background() as url, client(url) as edge:
        with pytest.raises(DataError, match="labels differ"):
            edge.check_server()
        assert "labels differ" in edge.predict(IMAGE).reason
    with CloudServer(counting_server()).background() as url:
        edge = EdgeClient(unsure_edge(patch=8), url, policy=TRUST)
        with edge, pytest.raises(DataError, match="8 x 8 patches of 8"):
            edge.check_server()


@pytest.mark.long
def test_a_token_is_needed_where_one_is_set():
    server = CloudServer(counting_server(), token="secret")
    with server.background() as url:
        with client(url, token="secret") as edge:
            assert edge.predict(IMAGE).source == "server"
        with client(url, token="wrong") as edge, pytest.raises(DataError, match="401"):
            edge.check_server(1.0)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as reply:
            assert json.load(reply)["status"] == "ok"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_secure_link_counts_its_records(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = CloudServer(counting_server(), tls=context)
    with server.background() as url:
        assert url.startswith("wss://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        counts = Policy(arbiter=Arbiter("server"), deadline=2.0)
        proxy = Counting(server.port)
        with proxy.background() as port, client(f"wss://127.0.0.1:{port}", policy=counts, tls=trusted) as edge:
            edge.check_server()
            edge.predict(IMAGE)
            for _ in range(5):
                before = proxy.total
                answer = edge.predict(IMAGE)
                assert answer.source == "server"
                assert proxy.total - before == answer.bytes_up <= 600
        with client(url) as edge, pytest.raises(DataError, match="certificate"):
            edge.check_server(1.0)


class Counting(LinkProxy):
    """A proxy in front of TLS: it sees no upgrade, so everything up counts."""

    def __init__(self, port):
        super().__init__("127.0.0.1", port)

    @property
    def total(self):
        return self.up + self.handshakes


def frame_for(url, **changed):
    from telltale.edge.wire import model_number

    fields = {
        "request": 1,
        "model": model_number(8, 8, 4, LABELS),
        "codec": "raw8",
        "setting": 0,
        "budget": 9000,
        "deadline": 0,
        "rows": 8,
        "columns": 8,
        "patch": 4,
        "indices": (1, 2),
        "payload": bytes(96),
    }
    return Frame(**{**fields, **changed}).encode()


def test_bad_frames_get_a_typed_reply_and_the_connection_lives():
    from websockets.sync.client import connect

    server = CloudServer(_reading_server())
    with server.background() as url, connect(url, compression=None) as socket:
        assert json.loads(socket.recv())["rows"] == 8
        good = frame_for(url)
        cases = [
            ("malformed", b"nonsense"),
            ("malformed", "text"),
            ("checksum", good[:-1] + b"\0"),
            ("grid", frame_for(url, rows=4, columns=16)),
            ("model", frame_for(url, model=1)),
            ("over_budget", frame_for(url, budget=100)),
            ("payload", frame_for(url, payload=bytes(95))),
            ("payload", frame_for(url, codec="mosaic_webp", payload=b"RIFF")),
        ]
        for kind, message in cases:
            socket.send(message)
            reply = decode_reply(socket.recv(timeout=5))
            assert isinstance(reply, Refusal)
            assert reply.kind == kind
        socket.send(good)
        assert isinstance(decode_reply(socket.recv(timeout=5)), Answer)
        metrics = server.metrics()
        assert 'telltale_edge_refusals_total{kind="grid"} 1' in metrics
        assert "telltale_edge_answers_total 1" in metrics


def _reading_server():
    """Decodes payloads, as a real model does."""
    served = counting_server()

    def respond(frames):
        for frame in frames:
            frame.image()
        return served.respond(frames)

    return type(served)(8, 8, 4, LABELS, respond)


def test_a_message_beyond_the_limit_ends_the_connection_only():
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    with CloudServer(counting_server(), max_message=4096).background() as url:
        with connect(url, compression=None) as socket:
            socket.recv()
            socket.send(bytes(10_000))
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=5)
        with client(url) as edge:
            assert edge.predict(IMAGE).source == "server"


def test_requests_share_batches_and_a_full_queue_refuses():
    seen = []
    server = CloudServer(counting_server(wait=0.05, seen=seen), max_batch=8, queue=4)
    patient = Policy(arbiter=Arbiter("server"), deadline=3.0, count=4)
    with server.background() as url, client(url, policy=patient, budget=2000) as edge:
        edge.check_server()
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: edge.predict(IMAGE), range(12)))
    assert max(seen) > 1
    assert {answer.source for answer in answers} == {"server", "edge"}
    assert any("busy" in answer.reason for answer in answers)
    assert server.measures.refused["busy"] >= 1


def test_a_slow_selection_does_not_cost_the_deadline():
    if "sluggish" not in selectors():

        @register_selector("sluggish")
        def sluggish(importance, embeddings, budget):
            """The first patches, after a while."""
            time.sleep(0.03)
            return np.arange(budget)

    slow = Policy(selector="sluggish", codec="raw8", arbiter=Arbiter("server"), deadline=0.2)
    with CloudServer(counting_server()).background() as url, client(url, policy=slow, budget=2900) as edge:
        edge.check_server()
        for _ in range(3):
            started = time.monotonic()
            answer = edge.predict(IMAGE)
            assert time.monotonic() - started < 0.2 + SLACK
            assert answer.source == "server"
            assert 1 <= answer.patches < 58  # as many as the time allowed, of those that the bytes hold


@pytest.mark.long
def test_a_client_that_reads_nothing_is_no_longer_read():
    labels = tuple(map(str, range(30_000)))
    served = Served(8, 8, 4, labels, lambda frames: np.full((len(frames), 30_000), -np.log(30_000), np.float32))
    server = CloudServer(served, queue=4, max_batch=4)
    request = frame_for(None, model=server.served.model)
    message = b"\x82\xfe" + len(request).to_bytes(2, "big") + bytes(4) + request
    with server.background(), socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
        raw.sendall(f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n\r\n".encode())
        raw.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            for _ in range(20_000):
                raw.sendall(message)
        # Answers of 120 KB fill the socket's buffers; beyond those only eight may be kept.
        assert 8 < server.measures.answered < 300


def test_whole_images_are_weighed_by_bytes():
    with pytest.raises(ConfigError, match="weigh='bytes'"):
        Policy(codec="jpeg", arbiter=Arbiter("fused", {4: 3.0}))
    heavy = Policy(codec="jpeg", arbiter=Arbiter("fused", {100: 3.0}), weigh="bytes", deadline=2.0)
    with CloudServer(counting_server()).background() as url, client(url, policy=heavy, budget=2000) as edge:
        answer = edge.predict(IMAGE)
        assert (answer.label, answer.source, answer.patches) == ("cat", "fused", 0)


def test_late_requests_are_not_computed():
    seen = []
    server = CloudServer(counting_server(wait=0.3, seen=seen), max_batch=1)
    hasty = Policy(arbiter=Arbiter("server"), deadline=0.15)
    with server.background() as url, client(url, policy=hasty, breaker=CircuitBreaker(failures=99)) as edge:
        edge.check_server()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: edge.predict(IMAGE), range(4)))
        time.sleep(0.4)
    assert len(seen) < 4


def test_the_server_ends_gracefully():
    seen = []
    server = CloudServer(counting_server(wait=0.2, seen=seen))
    with client_of(server) as edge:
        under_way = concurrent.futures.ThreadPoolExecutor(1).submit(edge.predict, IMAGE)
        while not seen:
            time.sleep(0.002)
        edge.stop()
        assert under_way.result(3).source == "server"
        assert edge.predict(IMAGE, deadline=0.2).source == "edge"


class client_of:
    """A server in the background with a client whose ``stop`` ends the server only."""

    def __init__(self, server):
        self.background = server.background()

    def __enter__(self):
        self.client = client(self.background.__enter__())
        self.client.check_server()
        self.client.stop = lambda: self.background.__exit__(None, None, None)
        return self.client

    def __exit__(self, *_):
        self.client.close()


async def silent(socket, message):
    """Read and say nothing."""


async def garbage(socket, message):
    await socket.send(b"\x54\x01\x01" + bytes(40))


async def text(socket, message):
    await socket.send("hello?")


async def other_classes(socket, message):
    request = Frame.decode(message).request
    await socket.send(Answer(request, np.log(np.full(7, 1 / 7))).encode())


async def nan(socket, message):
    await socket.send(Answer(Frame.decode(message).request, np.full(3, np.nan)).encode())


async def another_request(socket, message):
    await socket.send(Answer(12345, np.log(np.full(3, 1 / 3))).encode())


async def hang_up(socket, message):
    socket.transport.abort()


@pytest.mark.parametrize("react", [silent, garbage, text, other_classes, nan, another_request, hang_up])
def test_whatever_the_server_does_the_edge_answers_in_time(react):
    quick = Policy(arbiter=Arbiter("server"), deadline=0.15)
    with misbehaving(react) as url, client(url, policy=quick, breaker=CircuitBreaker(failures=2, pause=30.0)) as edge:
        edge.check_server()
        for number in range(4):
            started = time.monotonic()
            answer = edge.predict(IMAGE)
            assert time.monotonic() - started < 0.15 + SLACK
            assert (answer.source, answer.label) == ("edge", "ant")
            if number >= 2:
                assert "circuit is open" in answer.reason


def test_a_dead_server_and_its_return():
    server = CloudServer(counting_server())
    with server.background() as url:
        port = server.port
    quick = Policy(arbiter=Arbiter("server"), deadline=0.2)
    with client(url, policy=quick, breaker=CircuitBreaker(failures=1, pause=0.2)) as edge:
        started = time.monotonic()
        answer = edge.predict(IMAGE)
        assert answer.source == "edge"
        assert "cannot be reached" in answer.reason
        assert time.monotonic() - started < 0.2 + SLACK
        with CloudServer(counting_server(), port=port).background():
            until = time.monotonic() + 5
            while time.monotonic() < until and edge.predict(IMAGE).source == "edge":
                time.sleep(0.05)
            assert edge.predict(IMAGE).source == "server"
            assert edge.breaker.state == "closed"


def test_connections_dropped_in_mid_request():
    server = CloudServer(counting_server(wait=0.05))
    policy = Policy(arbiter=Arbiter("server"), deadline=0.3)
    with server.background():
        proxy = LinkProxy("127.0.0.1", server.port)
        breaker = CircuitBreaker(failures=1000)
        with proxy.background() as port, client(f"ws://127.0.0.1:{port}", policy=policy, breaker=breaker) as edge:
            edge.check_server()
            for _ in range(8):
                killer = threading.Timer(0.02, lambda: proxy.loop.call_soon_threadsafe(proxy.drop))
                killer.start()
                started = time.monotonic()
                answer = edge.predict(IMAGE)
                assert time.monotonic() - started < 0.3 + SLACK
                assert answer.label in ("ant", "cat")
                killer.join()
            assert edge.predict(IMAGE, deadline=3.0).source == "server"


@pytest.mark.long
def test_a_thin_uplink_shrinks_requests_and_is_counted():
    server = CloudServer(counting_server())
    with server.background():
        thin = LinkConfig(rate=7500.0, burst=200, round_trip=0.02)
        proxy = LinkProxy("127.0.0.1", server.port, thin)
        policy = Policy(arbiter=Arbiter("server"), deadline=0.25, codec="raw8")
        with proxy.background() as port:
            url = f"ws://127.0.0.1:{port}"
            breaker = CircuitBreaker(failures=1000)
            budget = ByteBudget(first_rate=50_000.0)
            with EdgeClient(unsure_edge(), url, policy=policy, budget=budget, breaker=breaker) as edge:
                edge.check_server()
                sizes, sources = [], []
                for _ in range(12):
                    started = time.monotonic()
                    answer = edge.predict(IMAGE)
                    assert time.monotonic() - started < 0.25 + SLACK
                    sizes.append(answer.bytes_up)
                    sources.append(answer.source)
                assert "server" in sources[4:]
                assert max(sizes[6:]) < 0.25 * 7500 + 200
                assert sizes[0] > max(sizes[6:])


@pytest.mark.long
def test_stalls_and_resets_of_the_link():
    server = CloudServer(counting_server())
    with server.background():
        bad = LinkConfig(loss=0.3, timeout=0.6, resets=0.15, jitter=0.005, seed=1)
        proxy = LinkProxy("127.0.0.1", server.port, bad)
        policy = Policy(arbiter=Arbiter("server"), deadline=0.4)
        breaker = CircuitBreaker(failures=1000)
        with proxy.background() as port, client(f"ws://127.0.0.1:{port}", policy=policy, breaker=breaker) as edge:
            sources = []
            for _ in range(16):
                started = time.monotonic()
                sources.append(edge.predict(IMAGE).source)
                assert time.monotonic() - started < 0.4 + SLACK
        assert {"server", "edge"} == set(sources)
        assert proxy.connections > 1
    for values in ({"rate": 0.0}, {"loss": 2.0}, {"round_trip": -1.0}):
        with pytest.raises(ConfigError):
            LinkConfig(**values)


def test_a_taken_port_is_told():
    with CloudServer(counting_server()).background() as url:
        port = int(url.rpartition(":")[2])
        with (
            pytest.raises(ConfigError, match="cannot be listened on"),
            CloudServer(counting_server(), port=port).background(),
        ):
            pass
