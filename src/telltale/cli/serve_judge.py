"""A judge over HTTP: what ``telltale serve --judge`` runs."""

from __future__ import annotations

from pathlib import Path

import typer

from telltale.cli.listening import listen, url_of, uvicorn_module
from telltale.cli.options import emit
from telltale.configuration import check_integer


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
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[listening])
