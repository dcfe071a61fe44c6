"""``telltale layerskip``: will self-speculation pay on a checkpoint (diagnose), and at which settings (sweep)."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Backend, Dtype, Json, Seed, Threads, emit, set_threads
from telltale.errors import ConfigError, DataError

Checkpoint = Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint.")]
Data = Annotated[Path, typer.Argument(help="A text file, or a folder of text files.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Early exits that draft: diagnose a checkpoint, sweep its settings.", no_args_is_help=True)
    group.command("diagnose")(diagnose)
    group.command("sweep")(sweep)
    app.add_typer(group, name="layerskip")


def diagnose(
    checkpoint: Checkpoint,
    data: Data,
    tokens: Annotated[int, typer.Option(help="Most tokens of DATA to measure on.")] = 16384,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Per-exit loss, agreement, pass costs on this machine, and a plain verdict: will self-speculation pay?

    Example: `telltale layerskip diagnose runs/tour/training/model my_project/`
    """
    set_threads(threads)
    from telltale.decode.costs_report import diagnose as examine

    model, ids = _opened(checkpoint, data, dtype)
    length = min(length, model.config.max_position_embeddings, ids.numel())
    if length < 2 or tokens < 2:
        raise ConfigError(f"tokens={tokens} and length={length} leave nothing to predict; expected at least 2 of each.")
    rows = max(1, min(ids.numel(), tokens) // length)
    result = examine(model, ids[: rows * length].view(rows, length).split(8), backend=backend)
    if json:
        emit(_plain(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{checkpoint}: {result.tokens} tokens, backend {result.backend}")
    for name in ("exit layer", "loss (nats)", "agreement", "best draft", "expected acceptance", "predicted speed-up"):
        table.add_column(name, justify="right")
    for row in result.exits:
        table.add_row(
            str(row.exit_layer),
            f"{row.loss:.3f}",
            f"{row.agreement:.1%}",
            str(row.draft_length),
            f"{row.expected_acceptance:.1%}",
            f"{row.predicted_speedup:.2f}x",
        )
    table.add_row("last", f"{result.last_loss:.3f}", "", "", "", "1.00x")
    console = Console()
    console.print(table)
    console.print(result.verdict)


def sweep(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for sweep.csv and sweep.html.")] = Path("runs/sweep"),
    exit_layers: Annotated[str, typer.Option(help="Comma-separated. Default: all.")] = "",
    draft_lengths: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,3,4,6,8",
    prompts: Annotated[int, typer.Option(help="How many prompts, drawn from DATA.")] = 4,
    prompt_length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode per prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 3,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure every exit layer with every draft length against plain decoding; writes a CSV and a plot.

    Example: `telltale layerskip sweep runs/tour/training/model my_project/ --draft-lengths 2,4,8`
    """
    set_threads(threads)
    import torch

    from telltale.decode.costs_report import sweep as measure
    from telltale.models.decoder import open_decoder
    from telltale.runs.progress import ProgressBar

    exits, lengths = _numbers("exit_layers", exit_layers), _numbers("draft_lengths", draft_lengths)
    for name, value in (
        ("prompts", prompts),
        ("prompt_length", prompt_length),
        ("new_tokens", new_tokens),
        ("rounds", rounds),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} is not allowed; expected an integer >= 1.")
    model, ids = _opened(checkpoint, data, dtype)
    if ids.numel() <= prompt_length:
        raise DataError(f"{data} has {ids.numel()} tokens; a prompt of prompt_length={prompt_length} needs more.")
    starts = torch.randint(ids.numel() - prompt_length, (prompts,), generator=torch.Generator().manual_seed(seed))
    chosen = [ids[start : start + prompt_length] for start in starts.tolist()]
    decoder = open_decoder(model, backend=backend)
    total = len(exits or range(1, decoder.layers)) * len(lengths)
    with ProgressBar("sweep", total, unit="point") as bar:
        result = measure(
            decoder,
            chosen,
            exit_layers=exits or None,
            draft_lengths=lengths,
            new_tokens=new_tokens,
            rounds=rounds,
            on_point=lambda done, _: bar.update(done),
        )
    result.write_csv(out / "sweep.csv")
    _page(out, checkpoint, result)
    if json:
        emit(_plain(result) | {"best": asdict(result.best), "csv": str(out / "sweep.csv")})
        return
    best = result.best
    typer.echo(
        f"best: exit layer {best.exit_layer}, draft length {best.draft_length}: {best.speedup:.2f}x plain decoding "
        f"({result.plain_tokens_per_second:,.0f} tokens/s), {best.acceptance_rate:.0%} of drafts accepted. "
        f"Written: {out / 'sweep.csv'}, {out / 'sweep.html'}"
    )


def _plain(result: Any) -> dict[str, Any]:
    """A result as JSON values; of the pass costs, what a reader can use."""
    costs = result.costs
    seconds = {
        "plain_step": costs.plain,
        "relative_cost_of_width": {str(n): costs.relative(n) for n in (1, 2, 4, 8, 16)},
    }
    return asdict(dataclasses.replace(result, costs=None)) | {"costs": seconds}


def _page(out: Path, checkpoint: Path, result: Any) -> None:
    from telltale.runs.report import Report
    from telltale.tour.figures import speed_up

    report = Report("Self-speculation sweep", subtitle=str(checkpoint))
    report.figure(speed_up(result.points), caption="Marks are measured, dotted lines the cost model.")
    headers = ["exit layer", "draft length", "accepted", "tokens per verify", "tokens/s", "speed-up", "predicted"]
    report.table(
        headers,
        [
            [
                p.exit_layer,
                p.draft_length,
                f"{p.acceptance_rate:.1%}",
                f"{p.tokens_per_verify:.2f}",
                f"{p.tokens_per_second:,.0f}",
                f"{p.speedup:.2f}x",
                f"{p.predicted_speedup:.2f}x",
            ]
            for p in result.points
        ],
    )
    report.save(out / "sweep.html")


def _opened(checkpoint: Path, data: Path, dtype: str | None) -> tuple[Any, Any]:
    """The model, and DATA as one 1-D tensor of its tokens."""
    from telltale.models.loading import load
    from telltale.tasks.code import read_tokens

    model, tokenizer = load(checkpoint, dtype=dtype)
    return model, read_tokens(data, tokenizer)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not understood; expected integers separated by commas.") from None
