"""One WebSocket connection to a server, kept alive from a thread: ask with a deadline, get a reply or a reason.

A request that misses its deadline while its bytes are still on the way takes the connection with it: the next one must not wait
behind them. So do two in a row in which the server says nothing at all: a path that was lost without a word (a NAT that forgot,
another Wi-Fi) would else be found out by TCP after a quarter of an hour. Late replies are told apart by their request number
and dropped.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

from telltale.config import check_range
from telltale.edge.wire import LARGEST_MESSAGE, Answer, FrameError, Refusal, decode_reply
from telltale.errors import ConfigError, MissingExtraError

SILENT = 2
"""Requests in a row without a word from the server after which its connection counts as dead."""


class LinkDown(Exception):
    """No reply can come in time; the text says why. Caught by the client, never raised to its user."""


@dataclass(frozen=True)
class Hello:
    """What the server said of itself when the connection opened."""

    rows: int
    columns: int
    patch: int
    labels: tuple[str, ...]
    model: int
    max_message: int

    @classmethod
    def parse(cls, text: Any) -> Hello:
        """Raises :class:`LinkDown` for anything that a telltale server does not say."""
        try:
            said = json.loads(text)
            numbers = [said[name] for name in ("rows", "columns", "patch", "model", "max_message")]
            labels = tuple(str(label) for label in said["labels"])
            if said["telltale"] != 1 or not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise LinkDown("the server does not speak telltale's protocol") from error
        rows, columns, patch, model, largest = numbers
        return cls(rows, columns, patch, labels, model, largest)


def check_url(url: str) -> str:
    """``url`` if it is one of a WebSocket; raises ConfigError otherwise."""
    if not url.startswith(("ws://", "wss://")):
        raise ConfigError(f"server={url!r} is not understood; expected ws://host:port or wss://host:port.")
    return url


class Connection:
    """Connects in the background and again after every loss, with pauses from 0.1 s up to ``longest_pause``.

    url: ``ws://`` or ``wss://``. token: sent as a bearer token. tls: an ``ssl.SSLContext`` for wss; None: the system's.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        longest_pause: float = 5.0,
        open_timeout: float = 5.0,
    ) -> None:
        check_range("longest_pause", longest_pause, low=0.0)
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
            raise ConfigError(
                "the token is empty or holds what no header can carry; give printable ASCII without spaces around."
            )
        self.url, self.token = check_url(url), token
        self.tls = tls or (ssl.create_default_context() if url.startswith("wss://") else None)
        self.longest_pause, self.open_timeout = longest_pause, open_timeout
        self.hello: Hello | None = None
        self.round_trip: float | None = None
        self.why = "not connected yet"
        self._websockets = _websockets()
        self._socket: Any = None
        self._silent = 0
        self._pending: dict[int, asyncio.Future[Answer | Refusal]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="telltale-edge", daemon=True)
        self._thread.start()
        self._up = asyncio.Event()
        asyncio.run_coroutine_threadsafe(self._keep(), self._loop)

    @property
    def ready(self) -> bool:
        """Whether a request could be sent now."""
        return self._socket is not None and self.hello is not None

    def wait(self, seconds: float) -> bool:
        """Whether the server has said hello within ``seconds``."""
        return bool(self._run(self._wait(max(0.0, seconds)), seconds + 0.01, default=False))

    def ask(self, request: int, message: bytes, seconds: float) -> Answer | Refusal:
        """Send one frame and return the reply to it. Raises :class:`LinkDown` if none came within ``seconds``."""
        if not self.ready:
            raise LinkDown(self.why)
        reply = self._run(self._ask(request, message, seconds), seconds + 0.01, default=None)
        if reply is None:
            raise LinkDown("no reply in time")
        return reply

    def close(self) -> None:
        """End the connection and the thread."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError, Exception):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(2)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self, work: Any, seconds: float, *, default: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(max(0.0, seconds))
        except concurrent.futures.TimeoutError:
            future.cancel()
            return default

    async def _wait(self, seconds: float) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._up.wait(), seconds)
        return self._up.is_set()

    async def _ask(self, request: int, message: bytes, seconds: float) -> Answer | Refusal:
        socket, end = self._socket, time.monotonic() + seconds
        if socket is None:
            raise LinkDown(self.why)
        future: asyncio.Future[Answer | Refusal] = self._loop.create_future()
        self._pending[request] = future
        try:
            try:
                async with asyncio.timeout_at(self._loop.time() + seconds):
                    await socket.send(message)
            except TimeoutError:
                self._abort(socket, "the uplink was too slow for the deadline")
                raise LinkDown("the uplink was too slow for the deadline") from None
            except self._websockets.closed as error:
                raise LinkDown("the connection was lost") from error
            try:
                return await asyncio.wait_for(future, max(0.0, end - time.monotonic()))
            except TimeoutError:
                self._silent += 1
                if self._silent >= SILENT and socket is self._socket:
                    self._abort(socket, "the connection is dead: the server said nothing")
                elif socket.transport.get_write_buffer_size():
                    self._abort(socket, "the uplink was too slow for the deadline")
                raise LinkDown("no reply in time") from None
        finally:
            self._pending.pop(request, None)
            if future.done() and not future.cancelled():
                future.exception()  # read, or asyncio logs a loss that the caller has reported already

    async def _keep(self) -> None:
        """Connect, read until the connection is lost, pause, and again."""
        pause = 0.1
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else None
        while True:
            try:
                async with self._websockets.connect(
                    self.url,
                    additional_headers=headers,
                    ssl=self.tls,
                    compression=None,
                    max_size=LARGEST_MESSAGE,
                    open_timeout=self.open_timeout,
                    close_timeout=0.2,
                    ping_interval=None,
                    proxy=None,
                    user_agent_header=None,
                ) as socket:
                    self.hello = Hello.parse(await asyncio.wait_for(socket.recv(), self.open_timeout))
                    started = time.perf_counter()
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(await socket.ping(b""), self.open_timeout)
                        self.round_trip = time.perf_counter() - started
                    self._socket, pause, self._silent = socket, 0.1, 0
                    self._up.set()
                    await self._read(socket)
                self.why = "the connection was lost"
            except asyncio.CancelledError:
                raise
            except LinkDown as error:
                self.why = str(error)
            except Exception as error:
                self.why = f"the server cannot be reached: {_told(error)}"
            self._lost()
            await asyncio.sleep(pause * (0.5 + 0.5 * random.random()))
            pause = min(2 * pause, self.longest_pause)

    async def _read(self, socket: Any) -> None:
        with contextlib.suppress(self._websockets.closed):
            async for message in socket:
                self._silent = 0
                try:
                    if isinstance(message, str):
                        raise FrameError("malformed", "the server sent text")
                    reply = decode_reply(message)
                except FrameError as error:
                    # Whose reply this was cannot be known: everyone who waits goes without.
                    self._fail(f"the server's answer is garbage: {error}")
                    continue
                future = self._pending.get(reply.request)
                if future is not None and not future.done():
                    future.set_result(reply)
                elif reply.request == 0 and isinstance(reply, Refusal):
                    self._fail(f"the server refused a message: {reply.kind}")

    def _fail(self, why: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(LinkDown(why))

    def _lost(self) -> None:
        self._socket = None
        self._up.clear()
        self._fail("the connection was lost")

    def _abort(self, socket: Any, why: str) -> None:
        self.why = why
        self._socket = None
        self._up.clear()
        socket.transport.abort()

    async def _end(self) -> None:
        if self._socket is not None:
            await self._socket.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@dataclass(frozen=True)
class _Library:
    connect: Any
    closed: type[Exception]


def _websockets() -> _Library:
    try:
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed
    except ImportError as error:
        raise MissingExtraError("the edge's link needs websockets: pip install 'telltale[edge]'") from error
    return _Library(connect, ConnectionClosed)


def _told(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0] if text and text[0] else type(error).__name__
