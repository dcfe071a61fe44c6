"""A TCP proxy that behaves like a thin uplink and counts what passes: rate, delay, jitter, stalls, resets.

TCP hides loss: what an application sees is a stall of one retransmission time-out in which everything behind waits. ``loss`` is
the share of 1,200-byte segments that stall so. Only the way up (client to server) is slow; both ways are delayed by half a round
trip. Bytes after the client's HTTP upgrade are counted apart: they are what a request costs on the uplink.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from telltale.config import check_integer, check_range, check_seed
from telltale.errors import ConfigError

SEGMENT = 1200
"""Bytes that are delayed, lost or reset together."""
BACKLOG = 16_384
"""Bytes that wait in the proxy before the sender feels it."""


@dataclass(frozen=True)
class LinkConfig:
    """A link. rate: bytes per second up, None: unlimited. burst: bytes that pass at once after silence.

    round_trip, jitter: seconds. loss: share of segments that stall by ``timeout`` seconds. resets: share of segments that end the
    connection. seed: of all draws.
    """

    rate: float | None = None
    burst: int = SEGMENT
    round_trip: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    timeout: float = 0.2
    resets: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is not None:
            check_range("rate", self.rate, low=1.0)
        check_integer("burst", self.burst, low=1)
        for name in ("round_trip", "jitter", "timeout"):
            check_range(name, getattr(self, name), low=0.0, high=60.0)
        check_range("loss", self.loss, low=0.0, high=1.0)
        check_range("resets", self.resets, low=0.0, high=1.0)
        check_seed(self.seed)


class LinkProxy:
    """Forwards to ``host:port``. ``await start()``, ``await close()``, or ``with proxy.background() as port``."""

    def __init__(
        self, host: str, port: int, config: LinkConfig | None = None, *, listen: str = "127.0.0.1", at: int = 0
    ) -> None:
        self.target = (host, port)
        self.config = config or LinkConfig()
        self.listen, self.port = listen, at
        self.up = 0
        """Bytes from clients to the server after their HTTP upgrades."""
        self.handshakes = 0
        """Bytes of those upgrades."""
        self.down = 0
        self.connections = 0
        self._generator = np.random.default_rng(self.config.seed)

    async def start(self) -> None:
        """Listen. Raises ConfigError if the address cannot be had."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            self._server = await asyncio.start_server(self._connect, self.listen, self.port)
        except OSError as error:
            raise ConfigError(f"{self.listen}:{self.port} cannot be listened on: {error.strerror or error}.") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End all connections."""
        self._server.close()
        self.drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self) -> None:
        """Reset every connection now, as a dying link does."""
        for writer in list(self._writers):
            writer.transport.abort()

    @contextlib.contextmanager
    def background(self) -> Iterator[int]:
        """Forward from a thread while the block runs; yields the port."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="telltale-link", daemon=True)
        thread.start()
        self.loop = loop
        try:
            asyncio.run_coroutine_threadsafe(self.start(), loop).result()
            yield self.port
            asyncio.run_coroutine_threadsafe(self.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        try:
            await asyncio.gather(
                self._pump(reader, server_writer, up=True),
                self._pump(server_reader, writer, up=False),
                return_exceptions=True,
            )
        finally:
            self._writers -= {writer, server_writer}
            for ended in (writer, server_writer):
                ended.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """Read segments, decide when each leaves, and let a second task write them then, in order."""
        config = self.config
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=max(1, BACKLOG // SEGMENT))
        writing = asyncio.create_task(_write_in_time(waiting, writer))
        free_at, head, upgraded = 0.0, b"", not up
        try:
            while segment := await reader.read(SEGMENT):
                if upgraded:
                    self.up += len(segment) * up
                    self.down += len(segment) * (not up)
                else:
                    head += segment
                    upgraded = b"\r\n\r\n" in head
                    beyond = len(head.partition(b"\r\n\r\n")[2]) if upgraded else 0
                    self.handshakes += len(segment) - beyond
                    self.up += beyond
                now = time.monotonic()
                if up and config.rate is not None:
                    # A bucket that is never fuller than ``burst``: silence is forgotten beyond it.
                    free_at = max(free_at, now - config.burst / config.rate) + len(segment) / config.rate
                leaves = max(now, free_at) + config.round_trip / 2 + config.jitter * self._generator.random()
                if up and upgraded and config.loss and self._generator.random() < config.loss:
                    leaves += config.timeout
                    free_at = max(free_at, now) + config.timeout
                if up and upgraded and config.resets and self._generator.random() < config.resets:
                    writer.transport.abort()
                    self.drop_pair(reader)
                    break
                await waiting.put((leaves, segment))
            else:
                await waiting.put((0.0, b""))
                await writing
        except OSError:
            writer.transport.abort()  # a reset goes through: the other side must not wait for ever
            raise
        finally:
            writing.cancel()

    def drop_pair(self, reader: asyncio.StreamReader) -> None:
        """Reset the connection that ``reader`` reads from."""
        transport = getattr(reader, "_transport", None)
        if transport is not None:
            transport.abort()


async def _write_in_time(waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    latest = 0.0
    while True:
        leaves, segment = await waiting.get()
        latest = max(latest, leaves)
        if not segment:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()
            return
        pause = latest - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        writer.write(segment)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
