"""Links that die without a word, are reset, or meet what a user has registered."""

import socket
import struct
import time

import numpy as np

from edge.small_edges import IMAGE, counting_server, misbehaving, unsure_edge
from telltale.edge.arbitration import Arbiter
from telltale.edge.budget import ByteBudget
from telltale.edge.client import EdgeClient, Policy
from telltale.edge.link import LinkProxy
from telltale.edge.server import CloudServer
from telltale.edge.wire import Answer, Frame


def client(url, policy):
    return EdgeClient(unsure_edge(), url, policy=policy, budget=ByteBudget(600))


def test_a_connection_that_dies_without_a_word_is_replaced():
    ignored = set()

    async def first_connection_is_dead(socket, message):
        if socket.id in ignored:
            return
        ignored.add(socket.id)
        await answering(socket, message)

    async def answering(socket, message):
        await socket.send(Answer(Frame.decode(message).request, np.log(np.full(3, 1 / 3))).encode())

    quick = Policy(arbiter=Arbiter("server"), deadline=0.15)
    with misbehaving(first_connection_is_dead) as url, client(url, quick) as edge:
        edge.check_server()
        assert edge.predict(IMAGE, deadline=2.0).source == "server"
        assert [edge.predict(IMAGE).source for _ in range(2)] == ["edge", "edge"]
        assert edge.predict(IMAGE, deadline=3.0).source == "server"
        assert len(ignored) == 2


def test_a_reset_of_the_client_reaches_the_server_through_the_proxy():
    server = CloudServer(counting_server())
    with server.background():
        proxy = LinkProxy("127.0.0.1", server.port)
        with proxy.background() as port:
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(
                    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                )
                until = time.monotonic() + 5
                while not server.measures.connections and time.monotonic() < until:
                    time.sleep(0.01)
                assert server.measures.connections == 1
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            until = time.monotonic() + 5
            while server.measures.connections and time.monotonic() < until:
                time.sleep(0.01)
            assert server.measures.connections == 0


def test_a_selector_that_wants_the_width_of_the_model_is_served():
    from telltale.edge.selection import _REGISTRY, register_selector

    @register_selector("of_width_16", compares=True)
    def of_width(importance, embeddings, budget):
        return np.argsort(-(embeddings @ np.ones(16)))[:budget]

    try:
        with CloudServer(counting_server()).background() as url:
            policy = Policy(selector="of_width_16", arbiter=Arbiter("server"), deadline=3.0)
            with client(url, policy) as edge:
                assert edge.predict(IMAGE).source == "server"
    finally:
        del _REGISTRY["of_width_16"]
