"""A place to listen on, and the server that answers there until it is interrupted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from telltale.errors import ConfigError, MissingExtraError

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""
LAST_SECONDS = 10
"""For telling clients that the server ends, when their time is over; a turn under way is finished first."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; it listens from here on, so that a taken port is told in a sentence before anything else happens.

    A bound one would not do: another server may take the same port as long as neither listens, and a model takes its time to
    open. Clients that come early wait until it answers.

    Raises :class:`~telltale.errors.ConfigError` if there is no such address or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on host={host!r} port={port}: {error.strerror or error}.") from error
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """The address as clients write it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def uvicorn_module() -> Any:
    """uvicorn. Raises :class:`~telltale.errors.MissingExtraError` with the line that installs it."""
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("the server needs FastAPI and uvicorn: pip install 'telltale[serve]'") from error
    return uvicorn


def answer(app: Any, listening: socket.socket, *, grace: int, end: Callable[[], None]) -> None:
    """Serve ``app`` until interrupted. Answers under way then have ``grace`` seconds, after which
    ``end`` is called to end them."""
    uvicorn = uvicorn_module()

    class Server(uvicorn.Server):  # type: ignore[name-defined]
        """Ends what it has begun in order: clients are told, not cut off. A second Ctrl-C does not wait, a third tears down."""

        signals = 0

        def handle_exit(self, sig: int, frame: Any) -> None:
            """See uvicorn's."""
            self.signals += 1
            if self.signals == 2:
                end()
            else:
                super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """See uvicorn's."""
            timer = asyncio.get_running_loop().call_later(grace, end)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace + LAST_SECONDS
    )
    Server(config).run(sockets=[listening])
