"""A place to listen on, and the server that answers there until it is interrupted."""

from __future__ import annotations

import socket
from typing import Any

from telltale.errors import ConfigError, MissingExtraError


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; bound here so that a taken port is told in a sentence before anything else happens.

    Raises :class:`~telltale.errors.ConfigError` if there is no such address or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
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
