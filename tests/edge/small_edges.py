"""Edge and server models of a few parameters, and servers that misbehave, for the tests of link, client and commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import numpy as np

from telltale.edge.client import EdgeModel
from telltale.edge.server import Served

LABELS = ("ant", "bee", "cat")
IMAGE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def unsure_edge(labels=LABELS, patch=4):
    """An edge model without a network: unsure of everything, it leans to the first label."""
    generator = np.random.default_rng(1)
    importance, embeddings = generator.random(64), generator.normal(size=(64, 16)).astype(np.float32)
    logs = np.log(np.full(len(labels), 0.6 / (len(labels) - 1)))
    logs[0] = np.log(0.4)

    def look(image):
        assert image.shape == (32, 32, 3)
        return logs, importance, embeddings

    return EdgeModel(8, 8, patch, labels, look)


def counting_server(answer=2, labels=LABELS, wait=0.0, seen=None):
    """A model that always answers ``answer``; ``seen`` collects how many frames each call had."""
    import time

    def respond(frames):
        if seen is not None:
            seen.append(len(frames))
        time.sleep(wait)
        probabilities = np.full((len(frames), len(labels)), 0.05)
        probabilities[:, answer] = 1 - 0.05 * (len(labels) - 1)
        return np.log(probabilities).astype(np.float32)

    return Served(8, 8, 4, labels, respond)


@contextlib.contextmanager
def misbehaving(react):
    """A WebSocket server that says a proper hello and then does ``await react(socket, message)``; yields its URL."""
    from websockets.asyncio.server import serve

    from telltale.edge.wire import model_number

    hello = {"telltale": 1, "rows": 8, "columns": 8, "patch": 4, "labels": list(LABELS), "max_message": 1 << 20}
    hello["model"] = model_number(8, 8, 4, LABELS)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def converse(socket):
        await socket.send(json.dumps(hello))
        with contextlib.suppress(Exception):
            async for message in socket:
                await react(socket, message)

    async def start():
        return await serve(converse, "127.0.0.1", 0, compression=None, ping_interval=None)

    async def stop(server):
        server.close()
        await server.wait_closed()

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
