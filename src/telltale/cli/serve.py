"""``telltale serve``: a language model (MODEL) or a judge (--judge) over HTTP, on loopback by default, until interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Device, Dtype, Json, Threads, automatic, config_options, emit, set_threads
from telltale.config import check_integer, check_range, parse_overrides
from telltale.errors import ConfigError, MissingExtraError
from telltale.serve.http_errors import ENVIRONMENT, MISSING_EXTRA, check_host, checked_key

BATCH_SIZE = 32
PATIENCE = 0.002


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


_FLAGS = {"settings": "set"}


@dataclass(frozen=True)
class ServeOptions:
    """Options of a language model and of how it answers; the flags of ``telltale serve`` are made from these fields."""

    draft: Path | None = None
    """A smaller checkpoint that drafts steps for MODEL."""
    guard: Path | None = None
    """A calibration of MODEL and its draft (JSON)."""
    decode: str | None = None
    """autoregressive, self-speculative or step-verified. Default: step-verified with --draft or --guard, else autoregressive."""
    exit_layer: str = "auto"
    """Layers of MODEL that draft; auto measures at the start (self-speculative only)."""
    draft_length: str = "auto"
    """Tokens per draft, self-speculative; auto measures."""
    drafter: str | None = None
    """Who drafts, self-speculative: exit (default), ngram (copies from the text) or both."""
    settings: list[str] = field(default_factory=list)
    """A field of StepVerifiedConfig, key=value, instead of --guard; repeatable."""
    audit_share: float = 0.0
    """Share of outputs of which an accepted step is audited; 0 audits none."""
    audit_by: str = "target"
    """target (it writes the step again: disagreement) or gsm8k (marked arithmetic: wrongness)."""
    audit_limit: float | None = None
    """Rate that is an alarm. Default: the calibration's alpha, if its labels are of the same kind."""
    on_drift: str = "withdraw"
    """After an alarm: withdraw the promise, or raise the threshold as well."""
    name: str | None = None
    """The model's name for clients. Default: the folder's."""
    api_key: str | None = None
    """Bearer token that clients need. Better: the environment's TELLTALE_API_KEY."""
    allow_anonymous: bool = False
    """Listen beyond loopback without an API key."""
    max_rows: int = 16
    """Outputs that are decoded at the same time."""
    queue: int = 64
    """Outputs that may wait; more are refused with 429."""
    max_body: int = 1 << 20
    """Largest request body, bytes."""
    prefix_cache: str = "512M"
    """Bytes for keys and values of texts that were read before (K, M and G are understood), or off."""
    cors: list[str] = field(default_factory=list)
    """An origin whose pages may ask from a browser, or * for all; repeatable."""
    grace: int = 30
    """Seconds for answers under way when the server ends."""
    backend: str = "auto"
    """auto, native, fused or module."""
    weights: str | None = None
    """int8: linear layers in 8 bits, for the native step. Default: the dtype's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", list(self.settings or ()))
        object.__setattr__(self, "cors", list(self.cors or ()))

    @property
    def prefix_bytes(self) -> int | None:
        """The limit of the cache of prefixes; None for off. Raises :class:`~telltale.errors.ConfigError` for anything else."""
        given = self.prefix_cache.strip().upper().removesuffix("B").removesuffix("I")
        if given in ("OFF", "0"):
            return None
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(given[-1:], 1)
        digits = given if unit == 1 else given[:-1]
        if not digits.isdecimal() or len(digits) > 15 or int(digits) < 1:
            raise ConfigError(f"prefix_cache={self.prefix_cache!r}; expected bytes, such as 512M, or off.")
        return int(digits) * unit

    def audits(self, served: Any) -> tuple[Any, Any]:
        """The monitor of the served guard and its checker; both None without audits.

        Raises :class:`~telltale.errors.ConfigError` for options that would do nothing.
        """
        from telltale.serve.open_model import open_monitor

        if not self.audit_share:
            if self.audit_limit is not None or self.audit_by != "target" or self.on_drift != "withdraw":
                raise ConfigError(
                    "--audit-by, --audit-limit and --on-drift do nothing without --audit-share; give a share."
                )
            return None, None
        return open_monitor(
            served, share=self.audit_share, by=self.audit_by, limit=self.audit_limit, on_drift=self.on_drift
        )

    def refuse_for_judge(self) -> None:
        """Raise :class:`~telltale.errors.ConfigError` for an option, or a key in the environment, that a judge does not take.

        No option is ignored: a user who sets an API key must not get an open judge.
        """
        plain = ServeOptions()
        for one in fields(self):
            if getattr(self, one.name) != getattr(plain, one.name):
                raise ConfigError(f"--{_FLAGS.get(one.name, one.name.replace('_', '-'))} does nothing with --judge.")
        if os.environ.get(ENVIRONMENT):
            raise ConfigError(
                f"{ENVIRONMENT} is set, and a judge does not check keys; unset it to serve the judge openly."
            )


@config_options(ServeOptions, into="options", flags={"settings": "--set"}, panel="How MODEL answers")
def serve(
    model: Annotated[
        Path | None, typer.Argument(help="A local Hugging Face checkpoint that answers completions and chats.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Instead of MODEL: a judge's folder, of telltale's or the official layout.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback MODEL needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    batch_size: Annotated[
        int | None, typer.Option(help="With --judge: conversations that go through the model together. Default: 32.")
    ] = None,
    patience: Annotated[
        float | None, typer.Option(help="With --judge: seconds an idle server waits for more requests. Default: 0.002.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    *,
    options: ServeOptions,
) -> None:
    """Serve a checkpoint as an OpenAI-compatible API, or a judge (POST /score, OpenRLHF's POST /get_reward). Never logs requests.

    Example: `telltale serve runs/tour/training/model --decode self-speculative --port 8000`
    """
    check_range("port", port, low=0, high=65535)
    if judge is not None:
        if model is not None:
            raise ConfigError("both MODEL and --judge were given; expected one of them.")
        options.refuse_for_judge()
        set_threads(threads)
        serve_judge(
            judge,
            host=host,
            port=port,
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
            patience=PATIENCE if patience is None else patience,
            dtype=dtype,
            device=device,
            json=json,
        )
        return
    if model is None:
        raise ConfigError("nothing to serve was given; expected MODEL (a checkpoint) or --judge PATH.")
    if batch_size is not None or patience is not None:
        raise ConfigError("--batch-size and --patience are for --judge; MODEL batches by --max-rows.")
    set_threads(threads)
    serve_completions(model, options, host=host, port=port, dtype=dtype, device=device, json=json)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end this process even where it was started with them ignored, as shells do for ``command &``.

    SIGINT raises KeyboardInterrupt in the block then, and SIGTERM has its usual effect. Handlers that are already set stay.
    """
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in ignored:
        signal.signal(number, usual[number])
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


@ended_by_signals()
def serve_completions(
    model: Path, options: ServeOptions, *, host: str, port: int, dtype: str | None, device: str | None, json: bool
) -> None:
    """Open the model and answer until interrupted."""
    check_integer("max_rows", options.max_rows, low=1)
    check_integer("queue", options.queue, low=0)
    check_integer("grace", options.grace, low=0)
    prefix_bytes = options.prefix_bytes
    exit_layer, draft_length = (
        automatic("exit_layer", options.exit_layer),
        automatic("draft_length", options.draft_length),
    )
    uvicorn_module()
    key = checked_key(os.environ.get(ENVIRONMENT) if options.api_key is None else options.api_key)
    check_host(host, api_key=key, anonymous=options.allow_anonymous)
    with listen(host, port) as listening:
        # Checks that need no torch come before the imports that do.
        from telltale.serve.open_model import open_served
        from telltale.serve.openai_app import create_app

        served = open_served(
            model,
            draft=options.draft,
            guard=options.guard,
            decode=options.decode,
            exit_layer=exit_layer,
            draft_length=draft_length,
            drafter=options.drafter,
            settings=parse_overrides(options.settings),
            name=options.name,
            dtype=dtype,
            device=device,
            weights=options.weights,
            backend=options.backend,
        )
        # Nobody else is in this process: PyTorch's own counts show every change of the weights.
        served = replace(served, shared=False)
        monitor, checker = options.audits(served)
        app = create_app(
            served,
            api_key=key,
            max_rows=options.max_rows,
            queue=options.queue,
            max_body=options.max_body,
            prefix_cache=prefix_bytes,
            cors=options.cors,
            monitor=monitor,
            checker=checker,
        )
        url = url_of(host, listening)
        entry = served.entry()
        if json:
            emit({"url": url, "model": served.name, **entry["telltale"]})
        else:
            typer.echo(
                f"{served.name} at {url}/v1, {served.decode}: {entry['telltale']['chosen']}; Ctrl-C ends it", err=True
            )
            if key is None and options.allow_anonymous:
                typer.echo("anybody who reaches this address may use the model: no API key is set", err=True)
        answer(app, listening, grace=options.grace, end=app.state.service.scheduler.end)


@ended_by_signals()
def serve_judge(
    judge: Path,
    *,
    host: str,
    port: int,
    batch_size: int,
    patience: float,
    dtype: str | None,
    device: str | None,
    json: bool,
) -> None:
    """Load the judge and answer until interrupted."""
    check_integer("batch_size", batch_size, low=1)
    uvicorn = uvicorn_module()
    from telltale.align.judge import Judge
    from telltale.serve.judge_app import create_app

    loaded = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    app = create_app(loaded, batch_size=batch_size, patience=patience)
    with listen(host, port) as listening:
        url = url_of(host, listening)
        if json:
            emit({"url": url, "judge": str(judge), "objectives": list(loaded.objectives)})
        else:
            typer.echo(f"{judge} at {url}/score and {url}/get_reward; Ctrl-C ends it", err=True)
        from telltale.serve.connections import guarded_protocol

        config = uvicorn.Config(app, http=guarded_protocol(open_to_all=True), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""
LAST_SECONDS = 10
"""Seconds to send clients the error that the server ends; a turn under way is finished first."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; it listens from here on, so that a taken port is refused before any other work.

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
        raise MissingExtraError(MISSING_EXTRA) from error
    return uvicorn


def answer(app: Any, listening: socket.socket, *, grace: int, end: Callable[[], None]) -> None:
    """Serve ``app`` until interrupted. Answers under way then have ``grace`` seconds, after which
    ``end`` is called to end them."""
    uvicorn = uvicorn_module()

    class Server(uvicorn.Server):  # type: ignore[name-defined]
        """Shuts down in order: clients get an error, not a cut connection. A second Ctrl-C does not wait, a third tears down."""

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

    from telltale.serve.connections import guarded_protocol

    config = uvicorn.Config(
        app,
        http=guarded_protocol(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace + LAST_SECONDS,
    )
    Server(config).run(sockets=[listening])
