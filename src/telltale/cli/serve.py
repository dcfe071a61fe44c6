"""``telltale serve``: a judge over HTTP, on loopback unless told otherwise."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Device, Dtype, Json, Threads, emit, set_threads
from telltale.configuration import check_integer, check_range
from telltale.errors import ConfigError, MissingExtraError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    judge: Annotated[Path | None, typer.Option(help="A judge's folder, of telltale's or the official layout.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; anyone who reaches it may use the judge.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    batch_size: Annotated[int, typer.Option(help="Conversations that go through the model together.")] = 32,
    patience: Annotated[float, typer.Option(help="Seconds an idle server waits for more requests to batch.")] = 0.002,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Serve a judge: POST /score, OpenRLHF's POST /get_reward, GET /health. Requests are never logged.

    Example: `telltale serve --judge runs/judge --port 8000`
    """
    if judge is None:
        raise ConfigError("nothing to serve was given; expected --judge PATH.")
    check_range("port", port, low=0, high=65535)
    check_integer("batch_size", batch_size, low=1)
    set_threads(threads)
    uvicorn = _uvicorn()
    from telltale.align.judge import Judge
    from telltale.serve.judge_app import create_app

    loaded = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    app = create_app(loaded, batch_size=batch_size, patience=patience)
    with _listen(host, port) as listening:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        if json:
            emit({"url": url, "judge": str(judge), "objectives": list(loaded.objectives)})
        else:
            typer.echo(f"{judge} at {url}/score and {url}/get_reward; Ctrl-C ends it", err=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; bound here so that a taken port is told in a sentence before anything else happens."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on host={host!r} port={port}: {error.strerror or error}.") from error
    return listening


def _uvicorn() -> Any:
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("the server needs FastAPI and uvicorn: pip install 'telltale[serve]'") from error
    return uvicorn
