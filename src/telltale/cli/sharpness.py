"""``telltale sharpness``: a checkpoint's dimension, a monitored run's report, many runs compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Json, Seed, Threads, emit, set_threads
from telltale.config import check_choice, check_integer
from telltale.errors import CheckpointError, ConfigError, DataError

JACOBIANS = ("gd", "optimizer")
AGGREGATES = ("mixture", "rank")


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="Sharpness Dimension and the edge of stability, with their controls.", no_args_is_help=True
    )
    group.command("measure")(measure)
    group.command("report")(report)
    group.command("compare")(compare)
    app.add_typer(group, name="sharpness")


def measure(
    checkpoint: Annotated[Path, typer.Argument(help="A local Hugging Face causal LM, of a telltale run or not.")],
    data: Annotated[Path, typer.Argument(help="Training text: a file, or a folder of text files.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Text not trained on: adds the gaps that compare needs.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate. Default: the run's at that step.")] = None,
    jacobian: Annotated[
        str, typer.Option(help="gd: I - rate H, the paper's. optimizer: the run's own, from a training checkpoint.")
    ] = "gd",
    aggregate: Annotated[str, typer.Option(help="mixture, or rank: exponents averaged per rank.")] = "mixture",
    minibatches: Annotated[int, typer.Option(help="Minibatch Hessians, drawn from DATA.")] = 4,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per minibatch. Default: the run's, or 8.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per sequence. Default: the run's, or 128, or what the model takes.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Random probes, shared out over the minibatches.")] = 30,
    steps: Annotated[int, typer.Option(help="Lanczos steps per probe.")] = 25,
    parameters: Annotated[
        list[str] | None,
        typer.Option(help="Measure these only: a parameter's or module's name, or a pattern; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for sharpness_dimension.json and .html. Default: the run's, or one in runs/sharpness."
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure one checkpoint: dimension with interval, where it comes from, and the controls beside it.

    Example: `telltale sharpness measure runs/tour/training/model my_project/ --held-out other_project/`
    """
    check_choice("jacobian", jacobian, JACOBIANS)
    check_choice("aggregate", aggregate, AGGREGATES)
    check_integer("minibatches", minibatches, low=1)
    for name, value, low in (("batch_size", batch_size, 1), ("length", length, 2)):
        if value is not None:
            check_integer(name, value, low=low)
    if jacobian == "optimizer" and rate is not None:
        raise ConfigError(
            "--rate beside --jacobian optimizer, which takes the rate of the saved optimizer; leave out one."
        )
    set_threads(threads)
    from telltale.models.loading import load
    from telltale.tasks.code import read_tokens
    from telltale.train.sharpness.measure import measure as examine
    from telltale.train.sharpness.result import DIMENSION_FILE

    run = _run_of(checkpoint)
    model, tokenizer = load(checkpoint, dtype="float32", any_family=True)
    settings = _settings(run, checkpoint, rate)
    if batch_size is None:
        batch_size = settings.get("batch_size", 8)
    length = _length(length, settings.get("sequence_length", 128), model.config)
    batches = _batches(read_tokens(data, tokenizer), data, minibatches, batch_size, length, seed)
    optimizer = _optimizer(run, checkpoint, model) if jacobian == "optimizer" else None
    result = examine(
        model,
        None,
        batches,
        optimizer=optimizer,
        rate=None if optimizer is not None else settings["rate"],
        runs=runs,
        steps=steps,
        jacobian=jacobian,
        aggregate=aggregate,
        parameters=parameters,
        seed=seed,
    )
    folder = out or run or Path("runs/sharpness", "-".join(checkpoint.resolve().parts[-2:]))
    result.save(folder / DIMENSION_FILE)
    result.to_html(folder / "sharpness_dimension.html")
    gaps = {}
    if held_out is not None:
        others = _batches(read_tokens(held_out, tokenizer), held_out, minibatches, batch_size, length, seed)
        gaps = _gaps(model, batches, others)
        _save_point(folder, checkpoint, result, settings, gaps, batch_size)
    if json:
        emit(_document(result) | {"gaps": gaps, "written": str(folder)})
    else:
        _print(result, gaps, folder)


def report(
    run_dir: Annotated[Path, typer.Argument(help="The run directory of a SharpnessMonitor.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Default: RUN_DIR/sharpness.html.")] = None,
    json: Json = False,
) -> None:
    """Write the self-contained HTML report of a monitored run: edge timeline, spectrum, dimension, controls.

    Example: `telltale sharpness report runs/mine`
    """
    from telltale.train.sharpness.sharpness_report import write_report

    path = write_report(run_dir, out)
    if json:
        emit({"written": str(path)})
    else:
        typer.echo(f"written: {path}")


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories that measure has left its point in.")],
    given: Annotated[
        list[str] | None, typer.Option(help="Hold this measure fixed in partial taus; repeatable.")
    ] = None,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Kendall's tau and the granulated coefficients of the dimension and of every control, with intervals.

    Example: `telltale sharpness compare runs/sweep/*`
    """
    from telltale.train.sharpness.compare import Point
    from telltale.train.sharpness.compare import compare as judge

    result = judge([Point.load(path) for path in run_dirs], given=given or (), level=level, seed=seed)
    if json:
        emit(result.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    psis = list(dict.fromkeys(name for row in result.rows for name in row.psi))
    table = Table(title=f"{result.runs} runs, {result.level:.0%} intervals: {result.intervals}")
    for name in (
        "gap",
        "measure",
        "tau",
        *(f"psi {name}" for name in psis),
        *(f"tau given {name}" for name in given or ()),
    ):
        table.add_column(name, justify="left" if name in ("gap", "measure") else "right")
    for row in result.rows:
        cells = [row.tau, *(row.psi.get(name) for name in psis), *(row.given.get(name) for name in given or ())]
        table.add_row(row.gap, row.measure, *map(_interval, cells))
    console = Console()
    console.print(table)
    console.print("Read the dimension against its controls: batch size, null space and train loss order runs too.")


def _run_of(checkpoint: Path) -> Path | None:
    """The telltale run that ``checkpoint`` lies in: run/model or run/checkpoints/step-000100."""
    for folder in checkpoint.resolve().parents[:2]:
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def _settings(run: Path | None, checkpoint: Path, rate: float | None) -> dict[str, Any]:
    """What the run was trained with, and the rate to measure at."""
    from telltale.runs.run_dir import RunDir
    from telltale.train.run_config import TrainConfig

    given = (RunDir.open(run).config().get("train") if run is not None else None) or {}
    if given:
        config = TrainConfig.from_dict(given)
        step = _step_of(checkpoint, config.steps)
        rate = config.learning_rate_at(max(0, step - 1)) if rate is None else rate
    if rate is None:
        raise ConfigError(f"{checkpoint} lies in no telltale run that knows its learning rate; give --rate.")
    return given | {"rate": rate}


def _step_of(checkpoint: Path, last: int) -> int:
    name, _, number = checkpoint.resolve().name.partition("step-")
    return int(number) if not name and number.isdigit() else last


def _optimizer(run: Path | None, checkpoint: Path, model: Any) -> Any:
    """The optimizer of the training checkpoint, with its state, on ``model``."""
    import torch

    from telltale.runs.run_dir import RunDir
    from telltale.train.checkpoint import STATE_FILE
    from telltale.train.loop import adamw
    from telltale.train.run_config import TrainConfig

    file = checkpoint / STATE_FILE
    if run is None or not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {STATE_FILE} of a telltale run; --jacobian optimizer reads the optimizer's state from a "
            f"training checkpoint such as RUN_DIR/checkpoints/step-000100."
        )
    config = TrainConfig.from_dict(RunDir.open(run).config()["train"])
    optimizer = adamw(model.parameters(), config, learning_rate=config.learning_rate)
    try:
        optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    except Exception as error:
        raise CheckpointError(f"{file} does not hold this model's optimizer: {error}") from error
    return optimizer


def _length(wanted: int | None, usual: int, config: Any) -> int:
    """Tokens per sequence: what is asked for, or no more than the model has positions for."""
    most = getattr(config, "max_position_embeddings", None) or math.inf
    if wanted is not None and wanted > most:
        raise ConfigError(f"length={wanted} is not allowed; the model has {most} positions.")
    return wanted if wanted is not None else int(min(usual, most))


def _batches(tokens: Any, source: Path, minibatches: int, batch_size: int, length: int, seed: int) -> list[Any]:
    """``minibatches`` batches (batch_size, length) of windows of ``tokens``, drawn from the seed."""
    import torch

    if tokens.numel() <= length:
        raise DataError(f"{source} has {tokens.numel()} tokens; windows of length={length} need more.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length, (minibatches, batch_size, 1), generator=generator)
    return list(tokens[starts + torch.arange(length)])


def _gaps(model: Any, trained: list[Any], others: list[Any]) -> dict[str, float]:
    """Loss gap in nats per token, held-out minus DATA; accuracy gap, DATA minus held-out."""
    import torch

    def scores(batches: list[Any]) -> tuple[float, float]:
        losses, hits = 0.0, 0.0
        with torch.no_grad():
            for batch in batches:
                found = model(input_ids=batch, labels=batch, use_cache=False)
                losses += float(found.loss) / len(batches)
                hits += float((found.logits[:, :-1].argmax(-1) == batch[:, 1:]).double().mean()) / len(batches)
        return losses, hits

    (loss, accuracy), (other_loss, other_accuracy) = scores(trained), scores(others)
    return {"loss": other_loss - loss, "accuracy": accuracy - other_accuracy}


def _save_point(
    folder: Path, checkpoint: Path, result: Any, settings: dict[str, Any], gaps: dict[str, float], batch_size: int
) -> None:
    """Leave what ``compare`` reads."""
    from telltale.train.sharpness.compare import Point

    measures = {"sd": result.sd, "minus_batch_size": -float(batch_size)} | {
        name: float(value) for name, value in result.controls.items() if isinstance(value, (int, float))
    }
    known = {"learning_rate": result.rate, "batch_size": batch_size} | settings
    varied: dict[str, float] = {
        name: known[name] for name in ("learning_rate", "batch_size", "weight_decay") if name in known
    }
    Point(str(checkpoint), measures, gaps, varied, settings.get("seed")).save(folder)


def _document(result: Any) -> dict[str, Any]:
    return {
        "sd": result.sd,
        "interval": None if result.interval is None else list(result.interval),
        "minibatches": result.minibatches,
        "receipts": [vars(receipt) for receipt in result.receipts],
        "excluded": result.excluded,
        "codimension": result.codimension,
        "parameters": result.size,
        "no_curvature": result.no_curvature,
        "jacobian": result.jacobian,
        "conditioning": result.conditioning,
        "breakdown": vars(result.breakdown),
        "controls": dict(result.controls),
    }


def _print(result: Any, gaps: dict[str, float], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Sharpness Dimension {result.sd:,.1f} of {result.size:,}; {result.interval_text}")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in {
        "codimension": result.codimension,
        "Jacobian": result.jacobian,
        "largest residual of the receipts": result.residual,
        **{f"directions: {name}": value for name, value in vars(result.breakdown).items()},
        **{f"control: {name}": value for name, value in result.controls.items()},
        **{f"gap: {name}": value for name, value in gaps.items()},
    }.items():
        table.add_row(name, f"{value:,.5g}" if isinstance(value, (int, float)) else str(value))
    console = Console()
    console.print(table)
    if result.no_curvature:
        console.print("No curvature: H = 0, so every direction counts; a dead or linear model, not a chaotic one.")
    console.print(f"A dimension alone does not predict generalisation. Written: {folder / 'sharpness_dimension.html'}")


def _interval(estimate: Any) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:+.2f}"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"
