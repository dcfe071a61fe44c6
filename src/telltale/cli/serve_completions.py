"""A language model over HTTP: what ``telltale serve MODEL`` runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import typer

from telltale.cli.listening import answer, listen, url_of, uvicorn_module
from telltale.cli.options import automatic, emit
from telltale.configuration import check_integer, parse_overrides
from telltale.errors import ConfigError
from telltale.serve.completions.access import ENVIRONMENT, check_host, checked_key

_FLAGS = {"settings": "set"}


@dataclass(frozen=True)
class Answering:
    """Options of the model and of how it answers. ``grace``: seconds that answers under way have when the server ends."""

    draft: Path | None = None
    guard: Path | None = None
    decode: str | None = None
    exit_layer: str = "auto"
    draft_length: str = "auto"
    settings: list[str] = field(default_factory=list)
    name: str | None = None
    api_key: str | None = None
    allow_anonymous: bool = False
    max_rows: int = 16
    queue: int = 64
    max_body: int = 1 << 20
    grace: int = 30
    backend: str = "auto"

    def refuse_for_judge(self) -> None:
        """Raise :class:`~telltale.errors.ConfigError` for an option, or a key in the environment, that means nothing to a judge.

        None may be dropped: who sets an API key must not get a judge that anybody can use.
        """
        plain = Answering()
        for one in fields(self):
            if getattr(self, one.name) != getattr(plain, one.name):
                raise ConfigError(f"--{_FLAGS.get(one.name, one.name.replace('_', '-'))} does nothing with --judge.")
        if os.environ.get(ENVIRONMENT):
            raise ConfigError(
                f"{ENVIRONMENT} is set, and a judge asks nobody for a key; unset it to serve the judge openly."
            )


def serve_completions(
    model: Path, options: Answering, *, host: str, port: int, dtype: str | None, device: str | None, json: bool
) -> None:
    """Open the model and answer until interrupted."""
    check_integer("max_rows", options.max_rows, low=1)
    check_integer("queue", options.queue, low=0)
    check_integer("grace", options.grace, low=0)
    exit_layer, draft_length = (
        automatic("exit_layer", options.exit_layer),
        automatic("draft_length", options.draft_length),
    )
    uvicorn_module()
    key = checked_key(os.environ.get(ENVIRONMENT) if options.api_key is None else options.api_key)
    check_host(host, api_key=key, anonymous=options.allow_anonymous)
    with listen(host, port) as listening:
        # What imports torch comes after what can be refused without it.
        from telltale.serve.completions.app import create_app
        from telltale.serve.completions.opening import open_served

        served = open_served(
            model,
            draft=options.draft,
            guard=options.guard,
            decode=options.decode,
            exit_layer=None if isinstance(exit_layer, str) else exit_layer,
            draft_length=None if isinstance(draft_length, str) else draft_length,
            settings=parse_overrides(options.settings),
            name=options.name,
            dtype=dtype,
            device=device,
            backend=options.backend,
        )
        app = create_app(served, api_key=key, max_rows=options.max_rows, queue=options.queue, max_body=options.max_body)
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
