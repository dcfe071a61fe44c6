"""The server: frames in over WebSocket, micro-batches through the model, log-probabilities out.

A frame that cannot be read gets a refusal that names the reason, and the connection lives on. Requests with as many patches go
through the model together; a full queue refuses at once (``busy``), a request whose deadline has passed is not computed (``late``).
``GET /health`` and ``GET /metrics`` (Prometheus text) answer on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket as socket_module
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np

from telltale.config import check_integer, check_range
from telltale.edge.wire import LARGEST_MESSAGE, Answer, Frame, FrameError, Refusal, model_number, websocket_header
from telltale.errors import ConfigError, MissingExtraError

Respond = Callable[[Sequence[Frame]], np.ndarray]
"""``frames with equally many patches -> log-probabilities (frames, classes)``; raises FrameError for a payload it cannot read."""


@dataclass(frozen=True)
class Served:
    """What a server answers with: the grid and labels that requests must fit, and the function that answers."""

    rows: int
    columns: int
    patch: int
    labels: tuple[str, ...]
    respond: Respond

    @property
    def model(self) -> int:
        """The 16-bit number that requests carry."""
        return model_number(self.rows, self.columns, self.patch, self.labels)


def served_model(vision: Any) -> Served:
    """Answer with a :class:`~telltale.models.vision.VisionModel`: patches through its partial forward, whole images plainly."""
    import torch

    from telltale.edge.codecs import codec_named

    def respond(frames: Sequence[Frame]) -> np.ndarray:
        pixels = vision.pixels(np.stack([frame.image() for frame in frames]))
        whole = codec_named(frames[0].codec).whole
        indices = None if whole else torch.tensor([frame.indices for frame in frames])
        with torch.inference_mode():
            return vision.logits(pixels, indices).float().log_softmax(dim=-1).cpu().numpy()

    return Served(vision.rows, vision.columns, vision.patch, vision.labels, respond)


@dataclass
class _Waiting:
    frame: Frame
    arrived: float
    future: asyncio.Future[Answer | Refusal]


@dataclass
class _Measures:
    """Counters of ``/metrics``."""

    started: float = field(default_factory=time.monotonic)
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    batches: int = 0
    model_seconds: float = 0.0
    connections: int = 0


class CloudServer:
    """Serves one model. ``await start()``, ``await close()`` in an event loop, or ``with server.background() as url``.

    token: what clients must present as a bearer token. max_batch, max_wait (seconds): a micro-batch is full or waited long enough.
    queue: requests that may wait. tls: an ``ssl.SSLContext`` for wss. grace: seconds for requests under way at the end.
    """

    def __init__(
        self,
        served: Served,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        max_batch: int = 32,
        max_wait: float = 0.0,
        queue: int = 128,
        max_message: int = LARGEST_MESSAGE,
        max_connections: int = 256,
        tls: ssl.SSLContext | None = None,
        grace: float = 5.0,
    ) -> None:
        check_integer("port", port, low=0, high=65_535)
        check_integer("max_batch", max_batch, low=1)
        check_integer("queue", queue, low=1)
        check_integer("max_message", max_message, low=64, high=LARGEST_MESSAGE)
        check_integer("max_connections", max_connections, low=1)
        check_range("max_wait", max_wait, low=0.0, high=1.0)
        check_range("grace", grace, low=0.0)
        if token is not None and not token:
            raise ConfigError("the token is empty; give a token or none.")
        self.served = served
        self.host, self.port, self.token, self.tls = host, port, token, tls
        self.max_batch, self.max_wait, self.queue = max_batch, max_wait, queue
        self.max_message, self.max_connections, self.grace = max_message, max_connections, grace
        self.measures = _Measures()
        self._closing = False

    @property
    def url(self) -> str:
        """Where clients connect, after :meth:`start`."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"{'ws' if self.tls is None else 'wss'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises ConfigError if the address cannot be had."""
        serve = _websockets().serve
        self._waiting: list[_Waiting] = []
        self._in_model = 0
        self._arrived = asyncio.Event()
        self._connections: set[Any] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="telltale-model")
        self._batcher = asyncio.create_task(self._batch_forever())
        try:
            self._server = await serve(
                self._converse,
                self.host,
                self.port,
                process_request=self._before_upgrade,
                max_size=self.max_message,
                compression=None,
                ping_interval=None,
                ssl=self.tls,
                close_timeout=1,
                server_header=None,
            )
        except OSError as error:
            self._batcher.cancel()
            raise ConfigError(f"{self.host}:{self.port} cannot be listened on: {error.strerror or error}.") from error
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def close(self) -> None:
        """Refuse new requests (``closing``), answer those under way within ``grace`` seconds, then end connections."""
        self._closing = True
        end = time.monotonic() + self.grace
        while (self._waiting or self._in_model) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        self._batcher.cancel()
        self._server.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), 2)
        self._worker.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def background(self) -> Iterator[str]:
        """Serve from a thread while the block runs; yields the URL."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="telltale-server", daemon=True)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.start(), loop).result()
            try:
                yield self.url
            finally:
                asyncio.run_coroutine_threadsafe(self.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)
            loop.close()

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` says."""
        waiting = len(getattr(self, "_waiting", []))
        return {"status": "closing" if self._closing else "ok", "waiting": waiting, "answered": self.measures.answered}

    def metrics(self) -> str:
        """What ``GET /metrics`` says, in Prometheus' text form."""
        kept = self.measures
        rows = [
            ("telltale_edge_answers_total", "counter", kept.answered),
            ("telltale_edge_bytes_received_total", "counter", kept.bytes_in),
            ("telltale_edge_batches_total", "counter", kept.batches),
            ("telltale_edge_model_seconds_total", "counter", round(kept.model_seconds, 6)),
            ("telltale_edge_waiting", "gauge", len(self._waiting)),
            ("telltale_edge_connections", "gauge", kept.connections),
        ]
        lines = [f"# TYPE {name} {kind}\n{name} {value}" for name, kind, value in rows]
        lines.append("# TYPE telltale_edge_refusals_total counter")
        lines += [
            f'telltale_edge_refusals_total{{kind="{kind}"}} {count}' for kind, count in sorted(kept.refused.items())
        ]
        return "\n".join(lines) + "\n"

    def hello(self) -> str:
        """The first message of a connection, JSON: what requests have to fit."""
        known = self.served
        return json.dumps(
            {
                "telltale": 1,
                "rows": known.rows,
                "columns": known.columns,
                "patch": known.patch,
                "labels": list(known.labels),
                "model": known.model,
                "max_message": self.max_message,
            }
        )

    def _before_upgrade(self, connection: Any, request: Any) -> Any:
        path = request.path.partition("?")[0]
        if path == "/health":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._closing else HTTPStatus.OK
            return connection.respond(status, json.dumps(self.health()) + "\n")
        if self.token is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "a bearer token is needed\n")
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics())
        if self._closing or self.measures.connections >= self.max_connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "no more connections\n")
        return None

    async def _converse(self, socket: Any) -> None:
        closed = _websockets().closed
        _keep_alive(socket.transport.get_extra_info("socket"))
        self.measures.connections += 1
        answers: set[asyncio.Task[None]] = set()
        try:
            await socket.send(self.hello())
            async for message in socket:
                reply = self._admit(message)
                if isinstance(reply, Refusal):
                    await socket.send(self._count(reply).encode())
                    continue
                # Only answers that the client does not read can pile up beyond what waits and what is computed.
                while len(answers) >= self.queue + self.max_batch:
                    await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._answer(socket, reply.future))
                answers.add(task)
                task.add_done_callback(answers.discard)
        except closed:
            pass
        finally:
            self.measures.connections -= 1
            for task in answers:
                task.cancel()

    async def _answer(self, socket: Any, future: asyncio.Future[Answer | Refusal]) -> None:
        reply = await future
        with contextlib.suppress(_websockets().closed):
            await socket.send((self._count(reply) if isinstance(reply, Refusal) else reply).encode())

    def _admit(self, message: bytes | str) -> _Waiting | Refusal:
        """Put a request in the queue, or say why not."""
        if isinstance(message, str):
            return Refusal(0, "malformed", "text was sent; requests are binary")
        self.measures.bytes_in += len(message)
        try:
            frame = Frame.decode(message)
        except FrameError as error:
            return Refusal(error.request, error.kind, str(error))
        known = self.served
        if (frame.rows, frame.columns, frame.patch) != (known.rows, known.columns, known.patch):
            told = f"the grid is {frame.rows} x {frame.columns} patches of {frame.patch}"
            return Refusal(frame.request, "grid", f"{told}; expected {known.rows} x {known.columns} of {known.patch}")
        if frame.model != known.model:
            return Refusal(frame.request, "model", f"model {frame.model} is not served; expected {known.model}")
        if len(message) + websocket_header(len(message)) > frame.budget:
            return Refusal(frame.request, "over_budget", f"{len(message)} bytes exceed the budget of {frame.budget}")
        if self._closing:
            return Refusal(frame.request, "closing", "the server is ending")
        if len(self._waiting) >= self.queue:
            return Refusal(frame.request, "busy", f"{self.queue} requests are waiting")
        waiting = _Waiting(frame, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return waiting

    async def _batch_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self.max_wait and len(self._waiting) < self.max_batch:
                await asyncio.sleep(self.max_wait)
            batch = self._next_batch()
            if not batch:
                continue
            self._in_model += len(batch)
            started = time.perf_counter()
            replies = await loop.run_in_executor(self._worker, self._respond, [waiting.frame for waiting in batch])
            seconds = time.perf_counter() - started
            self._in_model -= len(batch)
            self.measures.batches += 1
            self.measures.model_seconds += seconds
            for waiting, reply in zip(batch, replies, strict=True):
                if isinstance(reply, Answer):
                    self.measures.answered += 1
                    reply = Answer(reply.request, reply.log_probabilities, int(1e6 * seconds))
                if not waiting.future.done():
                    waiting.future.set_result(reply)

    def _next_batch(self) -> list[_Waiting]:
        """The oldest request and those behind it with the same form, at most ``max_batch``; late ones are refused."""
        now = time.monotonic()
        taken: list[_Waiting] = []
        left: list[_Waiting] = []
        for waiting in self._waiting:
            if waiting.frame.deadline and now - waiting.arrived > waiting.frame.deadline / 1000:
                if not waiting.future.done():
                    waiting.future.set_result(Refusal(waiting.frame.request, "late", "the deadline has passed"))
            elif len(taken) < self.max_batch and (not taken or _form(waiting.frame) == _form(taken[0].frame)):
                taken.append(waiting)
            else:
                left.append(waiting)
        self._waiting = left
        if not left:
            self._arrived.clear()
        return taken

    def _respond(self, frames: list[Frame]) -> list[Answer | Refusal]:
        """Answers of one batch; if it fails, of each request alone, so that one bad payload spoils no other."""
        try:
            values = self.served.respond(frames)
            if not np.isfinite(values).all():
                raise FloatingPointError("the model's answer is not finite")
            return [Answer(frame.request, row) for frame, row in zip(frames, values, strict=True)]
        except Exception as error:
            if len(frames) > 1:
                return [self._respond([frame])[0] for frame in frames]
            kind = error.kind if isinstance(error, FrameError) else "failed"
            told = str(error) if isinstance(error, FrameError) else f"the model failed: {type(error).__name__}"
            return [Refusal(frames[0].request, kind, told)]

    def _count(self, refusal: Refusal) -> Refusal:
        self.measures.refused[refusal.kind] += 1
        return refusal


def _keep_alive(connection: Any) -> None:
    """Let TCP find edges that went without a word within two minutes: else they would use up ``max_connections``.

    WebSocket's pings would cost an edge's budget; TCP's probes cost no byte of its stream.
    """
    with contextlib.suppress(OSError):
        connection.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket_module, name):
                connection.setsockopt(socket_module.IPPROTO_TCP, getattr(socket_module, name), value)


def _form(frame: Frame) -> tuple[bool, int]:
    from telltale.edge.codecs import codec_named

    whole = codec_named(frame.codec).whole
    return whole, 0 if whole else len(frame.indices)


@dataclass(frozen=True)
class _Library:
    serve: Any
    closed: type[Exception]


def _websockets() -> _Library:
    try:
        from websockets.asyncio.server import serve
        from websockets.exceptions import ConnectionClosed
    except ImportError as error:
        raise MissingExtraError("the edge's link needs websockets: pip install 'telltale[edge]'") from error
    return _Library(serve, ConnectionClosed)
