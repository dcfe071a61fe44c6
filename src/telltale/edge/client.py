"""The edge: look once, answer if sure, else send what the budget holds, and always answer before the deadline.

Whatever the server does (dead, slow, refusing, talking nonsense), :meth:`EdgeClient.predict` returns the edge's own answer with the
reason, and raises only for an image that cannot be used.
"""

from __future__ import annotations

import itertools
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from telltale.config import check_choice, check_range
from telltale.edge.arbitration import Arbiter, CircuitBreaker
from telltale.edge.budget import BudgetTooSmall, ByteBudget, Space, on_socket, pack
from telltale.edge.codecs import codec_named
from telltale.edge.connection import Connection, Hello, LinkDown, check_url
from telltale.edge.gate import Gate
from telltale.edge.selection import select
from telltale.edge.wire import Answer, Refusal
from telltale.errors import ConfigError, DataError, NumericalError, TelltaleError

Array = np.ndarray
Look = Callable[[Array], tuple[Array, Array, Array]]
"""``image (height, width, 3) uint8 -> log-probabilities (classes,), importance (N,), embeddings (N, D)`` of the edge model."""

GUARD = 0.01
"""Seconds before the deadline at which a reply no longer counts."""


@dataclass(frozen=True)
class EdgeModel:
    """The edge's own model: the grid and labels that the server must share, and one function that looks at an image."""

    rows: int
    columns: int
    patch: int
    labels: tuple[str, ...]
    look: Look


def edge_model(vision: Any, *, importance: Any = "rollout", space: str = "patch") -> EdgeModel:
    """An edge model of a :class:`~telltale.models.vision.VisionModel`, with the importance and the space that an audit chose."""
    import torch

    from telltale.edge.importance import look

    def looked(image: Array) -> tuple[Array, Array, Array]:
        evidence = look(vision, vision.pixels(image[None]), importance=importance, space=space)
        with torch.inference_mode():
            logs = evidence.logits[0].float().log_softmax(dim=-1)
        return logs.cpu().numpy(), evidence.importance[0].cpu().numpy(), evidence.embeddings[0].float().cpu().numpy()

    return EdgeModel(vision.rows, vision.columns, vision.patch, vision.labels, looked)


@dataclass(frozen=True)
class Policy:
    """How an edge sends. selector and options: of :func:`~telltale.edge.select`. codec: of :mod:`~telltale.edge.codecs`.

    count: patches; None: as many as the bytes hold. deadline: seconds from the call to the answer. weigh: what the arbiter's
    budgets count, ``patches`` or ``bytes``. arbiter: the default is fused without weights, for which nothing is sent; fit some.
    """

    selector: str = "facility"
    options: dict[str, Any] = field(default_factory=dict)
    codec: str = "mosaic_webp"
    count: int | None = None
    deadline: float = 0.5
    gate: Gate = field(default_factory=Gate)
    arbiter: Arbiter = field(default_factory=lambda: Arbiter("fused", {}))
    weigh: str = "patches"

    def __post_init__(self) -> None:
        if not codec_named(self.codec).uses_patches and self.weigh == "patches" and self.arbiter.weights:
            raise ConfigError(
                f"codec {self.codec!r} sends no patches to weigh by; give weigh='bytes' and weights by bytes."
            )
        check_range("deadline", self.deadline, low=0.001, high=3600.0)
        check_choice("weigh", self.weigh, ("patches", "bytes"))


@dataclass(frozen=True)
class Prediction:
    """An answer. source: ``edge``, ``server`` or ``fused``; reason: why it is that one. Times in seconds.

    bytes_up: bytes that were handed to the socket for it, WebSocket header included, also where no reply came.
    """

    label: str
    index: int
    log_probabilities: Array
    source: str
    reason: str
    bytes_up: int = 0
    patches: int = 0
    edge_seconds: float = 0.0
    select_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    seconds: float = 0.0


class EdgeClient:
    """Answers images at the edge with the help of a server. Close it, or use it in a ``with`` block.

    server: URL, or None to stay at the edge; it is not connected to if the policy's arbiter heeds no answer of it.

    budget: a :class:`ByteBudget`. breaker: a :class:`CircuitBreaker`.
    """

    def __init__(
        self,
        model: EdgeModel,
        server: str | None,
        *,
        policy: Policy | None = None,
        budget: ByteBudget | None = None,
        breaker: CircuitBreaker | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.model = model
        self.policy = policy or Policy()
        self.budget = budget or ByteBudget()
        self.breaker = breaker or CircuitBreaker()
        self._secure = bool(server and check_url(server).startswith("wss://"))
        heeded = server is not None and self.policy.arbiter.heeds()
        self.link = Connection(server, token=token, tls=tls) if server is not None and heeded else None
        self._alone = "no server was given" if server is None else f"nothing was sent: {_unheeded(self.policy.arbiter)}"
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._packing = 0.0
        self._warm_up()

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        if self.link is not None:
            self.link.close()

    def check_server(self, seconds: float = 5.0) -> Hello:
        """Wait for the server and check that it fits. Raises DataError if it does not, or cannot be reached in time."""
        if self.link is None:
            raise DataError(f"no server is asked: {self._alone}.")
        if not self.link.wait(seconds) or self.link.hello is None:
            raise DataError(f"no server answered within {seconds:g} s: {self.link.why}.")
        problem = self._misfit(self.link.hello)
        if problem:
            raise DataError(
                f"edge and server do not fit: {problem}. Give two checkpoints with one grid and the same labels."
            )
        return self.link.hello

    def predict(self, image: Array, *, deadline: float | None = None) -> Prediction:
        """Answer ``image`` (height, width, 3) uint8 within ``deadline`` seconds (the policy's).

        Raises :class:`~telltale.errors.DataError` for an image of another size, :class:`~telltale.errors.NumericalError` if the
        edge model itself gives no numbers; nothing else.
        """
        started = time.monotonic()
        end = started + (self.policy.deadline if deadline is None else deadline)
        logs, importance, embeddings = self.model.look(image)
        if not np.isfinite(logs).any() or np.isnan(logs).any():
            raise NumericalError("the edge model gave no finite answer; check the checkpoint and the image.")
        at_edge = _Draft(self, logs, started, edge_seconds=time.monotonic() - started)
        if not self.policy.gate.offloads(np.exp(logs.astype(np.float64))[None])[0]:
            return at_edge.stay("the gate keeps it: the edge is sure")
        if self.link is None:
            return at_edge.stay(self._alone)
        if not self.breaker.allow():
            return at_edge.stay("the circuit is open: the server failed before")
        try:
            prediction, fault = self._offload(image, importance, embeddings, at_edge, end)
        except Exception as error:
            # The contract is an answer: whatever goes wrong beyond the edge model must not reach the caller.
            # Before anything was sent it is no fault of the server: a selector of the user's, for one.
            fault = True if at_edge.sent else None
            prediction = at_edge.stay(f"offloading failed: {type(error).__name__}: {error}")
        if fault is True:
            self.breaker.failure()
        elif fault is False:
            self.breaker.success()
        else:
            self.breaker.release()
        return prediction

    def _offload(
        self, image: Array, importance: Array, embeddings: Array, draft: _Draft, end: float
    ) -> tuple[Prediction, bool | None]:
        """The prediction, and whether the server was at fault (None: it was not asked)."""
        link = self.link
        assert link is not None
        if not link.ready:
            link.wait(end - time.monotonic() - GUARD)
        hello = link.hello
        if hello is None or not link.ready:
            return draft.stay(link.why), True
        problem = self._misfit(hello)
        if problem:
            return draft.stay(f"edge and server do not fit: {problem}"), True
        # Taken before it is looked at: another thread may take it in between.
        measured, link.round_trip = link.round_trip, None
        if measured is not None:
            self.budget.observe_round_trip(measured)
        selecting = time.monotonic()
        # What packing took last time is not left for the uplink; it may take half of what there is.
        left = end - selecting - GUARD
        limit = min(
            self.budget.bytes(left - min(self._packing, left / 2)), on_socket(hello.max_message, tls=self._secure)
        )
        if limit <= 0:
            return draft.stay("the uplink carries nothing useful before the deadline"), None

        def choose(count: int) -> Any:
            return select(self.policy.selector, importance, embeddings, count, **self.policy.options)

        with self._lock:
            number = next(self._numbers) & 0xFFFFFFFF
        try:
            frame = pack(
                image,
                choose,
                space=Space(hello.rows, hello.columns, hello.patch, hello.model),
                codec=self.policy.codec,
                limit=limit,
                count=self.policy.count,
                request=number,
                deadline=max(1, round(1000 * (end - time.monotonic()))),
                tls=self._secure,
                until=selecting + left / 2,
            )
        except BudgetTooSmall as error:
            return draft.stay(str(error)), None
        self._packing = time.monotonic() - selecting
        message = frame.encode()
        sent = on_socket(len(message), tls=self._secure)
        weighed = len(frame.indices) if self.policy.weigh == "patches" else sent
        # An answer that will have no weight is asked for only where nothing else would measure the uplink again.
        if not self.policy.arbiter.heeds(weighed) and not (self.budget.adaptive and self.budget.stale):
            return draft.stay(f"nothing was sent: at {weighed} {self.policy.weigh} the server's weight is 0"), None
        draft.sent, draft.patches = sent, len(frame.indices)
        draft.select_seconds = time.monotonic() - selecting
        asking = time.monotonic()
        remaining = end - asking - GUARD
        if remaining <= 0:
            draft.sent = 0
            return draft.stay("selecting and packing took all the time there was"), None
        try:
            reply = link.ask(number, message, remaining)
        except LinkDown as error:
            self.budget.observe_failure(sent, time.monotonic() - asking)
            return draft.stay(str(error)), True
        draft.network_seconds = time.monotonic() - asking
        if isinstance(reply, Refusal):
            return draft.stay(f"the server refused: {reply.kind}: {reply.message}"), True
        return self._arbitrate(reply, draft)

    def _arbitrate(self, reply: Answer, draft: _Draft) -> tuple[Prediction, bool]:
        if reply.log_probabilities.shape != draft.logs.shape:
            told = f"{len(reply.log_probabilities)} classes instead of {len(draft.logs)}"
            return draft.stay(f"the server's answer is garbage: {told}"), True
        draft.server_seconds = reply.model_microseconds / 1e6
        self.budget.observe(draft.sent, draft.network_seconds, server=draft.server_seconds)
        budget = draft.patches if self.policy.weigh == "patches" else draft.sent
        logs, source = self.policy.arbiter.decide(draft.logs, reply.log_probabilities.astype(np.float64), budget)
        reason = (
            "fused as fitted" if source == "fused" else f"the {self.policy.arbiter.policy} policy took the {source}"
        )
        return draft.finish(logs, source, reason), False

    def _warm_up(self) -> None:
        """Select and pack a blank image: the first request must not pay for imports."""
        own = self.model
        blank = np.zeros((own.rows * own.patch, own.columns * own.patch, 3), dtype=np.uint8)
        patches = own.rows * own.columns
        try:
            chosen = select(self.policy.selector, np.ones(patches), np.ones((patches, 1)), 1, **self.policy.options)
        except TelltaleError:
            raise
        except (
            Exception
        ):  # a selector of the user's may want embeddings of the model's width, which only an image shows
            chosen = np.zeros(1, dtype=np.int64)
        pack(
            blank,
            lambda count: chosen,
            space=Space(own.rows, own.columns, own.patch),
            codec=self.policy.codec,
            limit=1 << 20,
            count=1,
        )

    def _misfit(self, hello: Hello) -> str:
        own = self.model
        if (own.rows, own.columns, own.patch) != (hello.rows, hello.columns, hello.patch):
            return (
                f"the edge has {own.rows} x {own.columns} patches of {own.patch}, the server {hello.rows} x {hello.columns} of "
                f"{hello.patch}"
            )
        if own.labels != hello.labels:
            return f"the labels differ ({len(own.labels)} at the edge, {len(hello.labels)} at the server)"
        return ""


def _unheeded(arbiter: Arbiter) -> str:
    """Why no answer of the server would count."""
    if arbiter.policy == "edge":
        return "the edge policy never asks the server"
    if not arbiter.weights:
        return "the server's weight was not fitted; give the profile of a sweep or another arbitration"
    return "the server's weight is 0 at every budget: it did not help on held-out images"


@dataclass
class _Draft:
    """What is known of an answer so far."""

    client: EdgeClient
    logs: Array
    started: float
    edge_seconds: float = 0.0
    sent: int = 0
    patches: int = 0
    select_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0

    def stay(self, reason: str) -> Prediction:
        """The edge's own answer."""
        return self.finish(self.logs, "edge", reason)

    def finish(self, logs: Array, source: str, reason: str) -> Prediction:
        index = int(np.argmax(logs))
        labels = self.client.model.labels
        return Prediction(
            label=labels[index] if index < len(labels) else str(index),
            index=index,
            log_probabilities=logs,
            source=source,
            reason=reason,
            bytes_up=self.sent,
            patches=self.patches,
            edge_seconds=self.edge_seconds,
            select_seconds=self.select_seconds,
            network_seconds=self.network_seconds,
            server_seconds=self.server_seconds,
            seconds=time.monotonic() - self.started,
        )
