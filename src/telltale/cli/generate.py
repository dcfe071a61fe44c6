"""``telltale generate``: text from a local checkpoint, streamed as it is committed, by any decoding method.

``telltale layerskip``: will self-speculation pay on a checkpoint (diagnose), at which settings (sweep), and exits that draft for a
checkpoint as it is (retrofit).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import Backend, Dtype, Json, Seed, Threads, Weights, automatic, emit, read_text, set_threads
from telltale.config import check_choice, parse_overrides
from telltale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from telltale.decode.method import MethodOptions

METHODS = {
    "auto": "drafts where they pay",
    "autoregressive": "the model, token by token",
    "self-speculative": "LayerSkip: early layers draft, the same output",
    "step-verified": "SpecGuard: a draft writes steps, the model redoes those that are rejected",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)
    group = typer.Typer(help="Early exits that draft: diagnose, sweep or retrofit a checkpoint.", no_args_is_help=True)
    group.command("diagnose")(diagnose)
    group.command("sweep")(sweep)
    app.add_typer(group, name="layerskip")


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt. Default: --prompt-file, or standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.")] = None,
    method: Annotated[
        str, typer.Option(help="autoregressive, self-speculative, step-verified, or auto: drafts where they pay.")
    ] = "auto",
    exit_layer: Annotated[str, typer.Option(help="auto, or the layer after which drafts are read.")] = "auto",
    draft_length: Annotated[str, typer.Option(help="auto, or tokens per draft.")] = "auto",
    drafter: Annotated[str | None, typer.Option(help="exit, ngram or both. Default: both for auto, else exit.")] = None,
    draft: Annotated[Path | None, typer.Option(help="step-verified: the checkpoint that drafts steps.")] = None,
    guard: Annotated[Path | None, typer.Option(help="step-verified: a calibration of these models.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="step-verified: FIELD=VALUE of StepVerifiedConfig, such as beta=1; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest output, in tokens. Default: 128, or what the positions allow.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this probability mass.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    weights: Weights = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Generate text. Drafts by tokens change the speed alone; `step-verified` accepts whole steps of the draft's own.

    Example: `telltale generate runs/tour/training/model --prompt "def main(" --max-new-tokens 64`
    """
    check_choice("method", method, tuple(METHODS))
    exits, lengths = automatic("exit_layer", exit_layer), automatic("draft_length", draft_length)
    set_threads(threads)
    from telltale.decode.method import MethodOptions, StepMethod

    options = MethodOptions(
        exit_layer=exits,
        draft_length=lengths,
        drafter=drafter,
        draft=draft,
        guard=guard,
        settings=parse_overrides(overrides or ()),
    )
    options.check("self-speculative" if method == "auto" else method)
    stepwise = StepMethod.of(options) if method == "step-verified" else None
    import torch

    from telltale.models.loading import load

    model, tokenizer = load(checkpoint, dtype=dtype, weights=weights)
    text = _prompt(prompt, prompt_file)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"]
    if ids.numel() == 0:
        raise DataError("the prompt is empty; expected some text.")
    decoder: Any
    if stepwise is not None:
        decoder = stepwise.open(model, tokenizer, draft, dtype=dtype, weights=weights, backend=backend)
    else:
        decoder = _decoder(model, method, options, backend)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(128, decoder.decoder.max_positions - ids.numel()))
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(seed),
        "stop_strings": stop or None,
        "tokenizer": tokenizer,
    }
    if json:
        result = decoder.generate(ids, **arguments)
        tokens = result.tokens[0, : int(result.lengths[0])].tolist()
        found = {
            "text": tokenizer.decode(tokens),
            "tokens": tokens,
            "stop_reason": result.stop_reason[0],
            "stats": _stats(result),
        }
        if method == "step-verified":
            found["steps"] = [step.to_dict() for step in result.steps[0]]
        emit(found)
        return
    _stream(decoder, tokenizer, ids, arguments)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise DataError("both --prompt and --prompt-file were given; expected one.")
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise DataError("no prompt was given; expected --prompt, --prompt-file or text on standard input.")
        prompt = sys.stdin.read()
    if not prompt:
        raise DataError("the prompt is empty; expected some text.")
    return prompt


def _decoder(model: Any, method: str, options: MethodOptions, backend: str) -> Any:
    from telltale.decode import Autoregressive, SelfSpeculative

    if method == "autoregressive":
        return Autoregressive(model, backend=backend)
    drafter: Any = options.drafter or ("both" if method == "auto" else "exit")
    exit_layer = "auto" if options.exit_layer is None else options.exit_layer
    draft_length = "auto" if options.draft_length is None else options.draft_length
    return SelfSpeculative(model, exit_layer, draft_length, drafter=drafter, backend=backend)


def _stream(decoder: Any, tokenizer: Any, ids: Any, options: dict[str, Any]) -> None:
    """Print text as soon as it cannot change any more: bytes of an unfinished character wait for the rest."""
    tokens: list[int] = []
    shown = ""
    stream = decoder.stream(ids, **options)
    while True:
        try:
            tokens.extend(next(stream))
        except StopIteration as end:
            result = end.value
            break
        text = tokenizer.decode(tokens)
        stable = text.rstrip("\ufffd")
        if stable.startswith(shown):
            sys.stdout.write(stable[len(shown) :])
            sys.stdout.flush()
            shown = stable
    sys.stdout.write(tokenizer.decode(tokens)[len(shown) :] + "\n")
    typer.echo(_line(result.stats), err=True)


def _line(stats: Any) -> str:
    parts = [f"{stats.tokens} tokens", f"{stats.tokens_per_second:,.0f} tokens/s", f"backend {stats.backend}"]
    if hasattr(stats, "target_share"):
        parts.append(step_line(stats))
    elif getattr(stats, "drafted", 0):
        parts.append(f"{stats.accepted}/{stats.drafted} drafts accepted")
    return ", ".join(parts)


def _stats(result: Any) -> dict[str, Any]:
    stats = result.stats
    extra = {"tokens_per_second": stats.tokens_per_second}
    if hasattr(stats, "target_share"):
        extra |= {"acceptance_rate": stats.acceptance_rate, "target_share": stats.target_share}
    elif hasattr(stats, "drafted"):
        extra |= {"acceptance_rate": stats.acceptance_rate, "tokens_per_verify": stats.tokens_per_verify}
    return asdict(stats) | extra


def step_line(stats: Any) -> str:
    """Accepted steps and the target's share, in words."""
    drafted = stats.accepted_steps + stats.rejected_steps
    line = f"{stats.accepted_steps}/{drafted} drafted steps accepted, the target wrote {stats.target_share:.0%} of the tokens"
    return line if stats.calibrated else f"{line} (scores are not calibrated for these models)"


Checkpoint = Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint.")]
Data = Annotated[Path, typer.Argument(help="A text file, or a folder of text files.")]


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
    from telltale.decode.diagnose import diagnose as examine

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
            "draft exit" if row.loss is None else f"{row.loss:.3f}",
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
    from telltale.models.open import open_decoder
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
    from telltale.runs.html_report import Report
    from telltale.tour.comparison import speed_up

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
