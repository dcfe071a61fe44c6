"""Connections that cannot starve the server: a deadline for the complete request, and a bound on strangers.

uvicorn waits forever for the headers of a request, and for the rest of a body that the application has refused. Here a connection
whose request is not complete in time is closed. A connection is a stranger's until one of its requests has been let in
(:data:`~telltale.serve.http_errors.LET_IN` in its scope); beyond the bound the oldest of these is closed, so that those who hold
many shut nobody out but themselves. A client that takes nothing of its answer for a while is closed as well: its answer would stay
in memory for as long as it likes. No connection becomes a WebSocket, which would leave all this behind.
"""

from __future__ import annotations

import asyncio

from telltale.errors import MissingExtraError
from telltale.serve.http_errors import LET_IN, MISSING_EXTRA

try:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError(MISSING_EXTRA) from error

REQUEST_SECONDS = 40.0
"""How long a request, from its first byte to its last, may take to arrive; an application may refuse a late body before."""
HEADER_SECONDS = 10.0
"""How long a new connection may take to send its first request's headers."""
TAKING_SECONDS = 60.0
"""How long a client may leave what is sent to it untouched: about 48 KiB of it, the difference of asyncio's two marks."""
STRANGERS = 128
"""Most connections of which no request has been let in; a quarter of the process's file descriptors if that is less."""


def guarded_protocol(
    *,
    header_seconds: float = HEADER_SECONDS,
    request_seconds: float = REQUEST_SECONDS,
    taking_seconds: float = TAKING_SECONDS,
    strangers: int | None = None,
    open_to_all: bool = False,
) -> type[H11Protocol]:
    """A protocol for ``uvicorn.Config(http=...)``, for one server. ``strangers`` None is :data:`STRANGERS`, or less where the
    process may open few files. ``open_to_all``: whoever has sent a request's headers is let in, for applications without a key."""
    most = min(STRANGERS, max(1, _open_files() // 4)) if strangers is None else strangers
    unknown: dict[GuardedProtocol, None] = {}

    class OneServers(GuardedProtocol):
        """A connection of this server."""

        connections_of_strangers = unknown
        most_strangers = most
        deadlines = (header_seconds, request_seconds)
        taking = taking_seconds
        knows_all = open_to_all

    return OneServers


class GuardedProtocol(H11Protocol):
    """A connection with deadlines. Subclasses are a server's."""

    connections_of_strangers: dict[GuardedProtocol, None]
    """In order of arrival; shared by the connections of a server."""
    most_strangers: int
    deadlines: tuple[float, float]
    """Seconds for the headers of a new connection, and for a whole request."""
    taking: float
    """Seconds in which a reader must take something."""
    knows_all: bool
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn's; the clock of the first request starts."""
        super().connection_made(transport)
        self.ws_protocol_class = None
        self._start_clock(self.deadlines[0])
        strangers = self.connections_of_strangers
        strangers[self] = None
        while len(strangers) > self.most_strangers:
            oldest = next(iter(strangers))
            del strangers[oldest]
            if not oldest.let_in:
                oldest.transport.abort()

    @property
    def let_in(self) -> bool:
        """Whether the request under way, or the last one, may be served."""
        return self.cycle is not None and (self.knows_all or LET_IN in self.cycle.scope)

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn's."""
        self._stop_clock()
        self._stop_waiting()
        self.connections_of_strangers.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See uvicorn's; the client has a while to take what is there."""
        super().pause_writing()
        self._stop_waiting()
        self._stalled = self.loop.call_later(self.taking, self.transport.abort)

    def resume_writing(self) -> None:
        """See uvicorn's."""
        self._stop_waiting()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """See uvicorn's; between two requests the first byte starts the clock, the last one of a request stops it."""
        waiting = self.cycle is None
        super().data_received(data)
        if self._complete():
            self._stop_clock()
        elif self._timer is None or (waiting and self.cycle is not None):
            # The headers have come, or a next request begins.
            self._start_clock(self.deadlines[1])

    def on_response_complete(self) -> None:
        """See uvicorn's."""
        if self.let_in:
            self.connections_of_strangers.pop(self, None)
        super().on_response_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn would advise to install a library for WebSockets, once a request."""

    def _complete(self) -> bool:
        """Whether no request is on its way: the last one has come to its end."""
        return self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR) or (
            self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        )

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._timer = self.loop.call_later(seconds, self._too_late)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_waiting(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _too_late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and self.cycle is None:
            self.transport.write(_LATE)
        self.transport.close()


_BODY = (
    b'{"error": {"message": "the request did not arrive in time.", "type": "invalid_request_error", "param": null, '
    b'"code": "timeout"}}'
)
_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
    + str(len(_BODY)).encode()
    + b"\r\n\r\n"
    + _BODY
)


def _open_files() -> int:
    """How many files this process may open; where the system does not say, enough."""
    try:
        import resource
    except ImportError:
        return 4 * STRANGERS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4 * STRANGERS if soft == resource.RLIM_INFINITY else soft
