"""``telltale serve``: a language model, or a judge, over HTTP; on loopback unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telltale.cli.options import Backend, Device, Dtype, Json, Threads, set_threads
from telltale.cli.serve_completions import Answering, serve_completions
from telltale.cli.serve_judge import serve_judge
from telltale.configuration import check_range
from telltale.errors import ConfigError

BATCH_SIZE = 32
PATIENCE = 0.002


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    model: Annotated[
        Path | None, typer.Argument(help="A local Hugging Face checkpoint that answers completions and chats.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Instead of MODEL: a judge's folder, of telltale's or the official layout.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="A smaller checkpoint that drafts steps for MODEL.")] = None,
    guard: Annotated[Path | None, typer.Option(help="A calibration of MODEL and its draft (JSON).")] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            help="autoregressive, self-speculative or step-verified. Default: step-verified with --draft or --guard, else "
            "autoregressive."
        ),
    ] = None,
    exit_layer: Annotated[
        str, typer.Option(help="Layers of MODEL that draft; auto measures at the start (self-speculative only).")
    ] = "auto",
    draft_length: Annotated[str, typer.Option(help="Tokens per draft, self-speculative; auto measures.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of StepVerifiedConfig, key=value, instead of --guard; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients. Default: the folder's.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback MODEL needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer token that clients need. Better: the environment's TELLTALE_API_KEY.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Listen beyond loopback without an API key.")
    ] = False,
    max_rows: Annotated[int, typer.Option(help="Outputs that are decoded at the same time.")] = 16,
    queue: Annotated[int, typer.Option(help="Outputs that may wait; more are refused with 429.")] = 64,
    max_body: Annotated[int, typer.Option(help="Largest request body, bytes.")] = 1 << 20,
    grace: Annotated[int, typer.Option(help="Seconds for answers under way when the server ends.")] = 30,
    batch_size: Annotated[
        int | None, typer.Option(help="With --judge: conversations that go through the model together. Default: 32.")
    ] = None,
    patience: Annotated[
        float | None, typer.Option(help="With --judge: seconds an idle server waits for more requests. Default: 0.002.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Serve a checkpoint as an OpenAI-compatible API, or a judge (POST /score, OpenRLHF's POST /get_reward). Never logs requests.

    Example: `telltale serve runs/tour/training/model --decode self-speculative --port 8000`
    """
    check_range("port", port, low=0, high=65535)
    options = Answering(
        draft=draft,
        guard=guard,
        decode=decode,
        exit_layer=exit_layer,
        draft_length=draft_length,
        settings=settings or [],
        name=name,
        api_key=api_key,
        allow_anonymous=allow_anonymous,
        max_rows=max_rows,
        queue=queue,
        max_body=max_body,
        grace=grace,
        backend=backend,
    )
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
