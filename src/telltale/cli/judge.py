"""``telltale judge``: scores and explanations of a fitted judge, fitting and auditing.

``telltale judge features`` and ``telltale judge fit``: from a backbone and files to a judge, or the embedded default.

``telltale judge audit`` and ``telltale judge evaluate``: what a fitted judge's score follows, and public benchmarks.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import Device, Dtype, Json, Seed, Threads, emit, is_first_rank, set_threads
from telltale.config import check_choice, check_integer, parse_overrides
from telltale.errors import ConfigError

if TYPE_CHECKING:
    from telltale.align.judge.judge import Judge

JudgePath = Annotated[Path, typer.Argument(help="A judge's folder, of telltale's or the official layout.")]
BatchSize = Annotated[int, typer.Option(help="Conversations that go through the model together.")]
Reweight = Annotated[
    list[str] | None, typer.Option(help="NAME=FACTOR: count an objective that many times as much; repeatable.")
]
Messages = list[dict[str, str]]


def register(app: typer.Typer) -> None:
    """Add the command group."""

    group = typer.Typer(
        help="A judge whose score is a sum of named objectives: fit, score, explain, audit.", no_args_is_help=True
    )
    group.command("features")(features)
    group.command("fit")(fit)
    group.command("score")(score)
    group.command("explain")(explain)
    group.command("audit")(audit)
    group.command("evaluate")(evaluate)
    app.add_typer(group, name="judge")


def score(
    judge: JudgePath,
    conversations: Annotated[
        Path | None,
        typer.Argument(help="JSON lines of messages, or of prompt and response; - is standard input."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A user's text, to judge --response against.")] = None,
    response: Annotated[
        list[str] | None, typer.Option(help="A response to --prompt; repeatable, the prompt is computed once.")
    ] = None,
    reweight: Reweight = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Score conversations from a file, or several responses to one prompt.

    Example: `telltale judge score runs/judge --prompt "2 + 2?" --response 4 --response 5`
    """
    if (conversations is None) == (prompt is None) or (prompt is None) != (not response):
        raise ConfigError("expected either a file of conversations, or --prompt with at least one --response.")
    set_threads(threads)
    if prompt is not None:
        choice = _open(judge, reweight, batch_size, dtype, device).best_of(prompt, response or [])
        explanations = list(choice.explanations)
        extra = {"best": choice.index}
    else:
        rows = read(conversations)
        explanations = _open(judge, reweight, batch_size, dtype, device).explain_all(rows)
        extra = {}
    if json:
        emit(
            extra
            | {
                "scores": [found.score for found in explanations],
                "explanations": [found.to_dict() for found in explanations],
            }
        )
        return
    for index, found in enumerate(explanations):
        mark = " best" if extra.get("best") == index else ""
        cut = " response truncated" if found.response_truncated else " truncated" if found.truncated else ""
        typer.echo(f"{found.score:+.6f}{mark}{cut}{' unfamiliar' if found.unfamiliar else ''}")


def explain(
    judge: JudgePath,
    conversation: Annotated[
        Path | None, typer.Argument(help="JSON lines; the first is explained. - is standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A user's text.")] = None,
    response: Annotated[str | None, typer.Option(help="The response to --prompt.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another response to the same prompt: explain the difference.")
    ] = None,
    row: Annotated[int, typer.Option(help="Which line of the file, from 0.")] = 0,
    reweight: Reweight = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page there (extra report).")] = None,
    markdown: Annotated[bool, typer.Option("--md", help="Print a Markdown table.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print what a score is made of, or what sets two responses apart, with bars; contributions add up exactly.

    Example: `telltale judge explain runs/judge --prompt "2 + 2?" --response 4 --against "It is four."`
    """
    if (conversation is None) == (prompt is None) or (prompt is None) != (response is None):
        raise ConfigError("expected either a file of conversations, or --prompt with --response.")
    if markdown and against is not None:
        raise ConfigError("--md is for one response; leave out --against, or take --json.")
    set_threads(threads)
    if prompt is not None:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response or ""}]
    else:
        messages = _line(read(conversation), row)
    opened = _open(judge, reweight, 2, dtype, device)
    if against is None:
        found: Any = opened.explain(messages)
    else:
        found = opened.compare(messages, [*messages[:-1], {"role": "assistant", "content": against}])
    if html is not None:
        found.to_html(html)
    if json:
        emit(found.to_dict())
    elif markdown:
        typer.echo(found.to_markdown())
    else:
        from rich.console import Console

        Console().print(found)
        if against is not None and found.verdict:
            typer.echo(found.verdict)


def read(path: Path | None) -> list[Messages]:
    """Conversations of a JSON-lines file; ``-`` is standard input. Raises :class:`~telltale.errors.DataError`."""
    from telltale.align.judge.importing import read_conversations

    source = Path("/dev/stdin") if path is None or str(path) == "-" else path
    return [found.messages for found in read_conversations(source)]


def _line(rows: list[Messages], index: int) -> Messages:
    check_integer("row", index, low=0)
    if index >= len(rows):
        raise ConfigError(f"row={index} is not there; the file has {len(rows)} conversations.")
    return rows[index]


def _open(path: Path, reweight: list[str] | None, batch_size: int, dtype: str | None, device: str | None) -> Judge:
    from telltale.align.judge.judge import Judge

    opened = Judge.load(path, dtype=dtype, device=device, batch_size=batch_size)
    return opened.reweight(parse_overrides(reweight)) if reweight else opened


Backbone = Annotated[Path | None, typer.Option(help="A local Hugging Face decoder or encoder; it stays frozen.")]
Ratings = Annotated[
    Path | None,
    typer.Option(
        help="Messages (or prompt, response) and ratings by name. Default: those in --preferences, else what can be counted."
    ),
]
Preferences = Annotated[
    Path | None,
    typer.Option(
        help="Pairs in JSON lines, a JSON list or Parquet: prompt, chosen, rejected, or another published form."
    ),
]
Objectives = Annotated[
    Path | None,
    typer.Option(help="YAML: name: {low: 0, high: 4, bins: 5}. Default: the file's own, or all ratings lie in 0 to 1."),
]
Reference = Annotated[
    Path | None, typer.Option(help="JSON lines of responses to decorrelate on. Default: the rated ones.")
]
ContextLength = Annotated[int | None, typer.Option(help="Tokens per conversation. Default: the backbone's positions.")]
BackboneBatchSize = Annotated[int, typer.Option(help="Conversations that go through the backbone together.")]


def features(
    backbone: Backbone = None,
    ratings: Ratings = None,
    preferences: Preferences = None,
    out: Annotated[Path, typer.Option(help="Folder of the features.")] = Path("runs/judge-features"),
    objectives: Objectives = None,
    reference: Reference = None,
    context_length: ContextLength = None,
    batch_size: BackboneBatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """One pass of the backbone over all texts, to disk. A killed run goes on; torchrun shares the work.

    Example: `telltale judge features --backbone my_model --ratings ratings.jsonl --preferences preferences.jsonl --out feats`
    """
    files = _files(ratings, preferences, objectives, reference)
    if backbone is None:
        raise ConfigError("no backbone was given; expected --backbone with a local checkpoint.")
    set_threads(threads)
    from telltale.align.judge.features import open_backbone
    from telltale.align.judge.fit_files import compute_features

    opened = open_backbone(backbone, dtype=dtype, device=device, context_length=context_length)
    stores = compute_features(opened, files, out, batch_size=batch_size)
    if not is_first_rank():
        return
    rows = {name: store.count for name, store in stores.items()}
    if json:
        emit({"features": str(out), "rows": rows, "pooling": opened.pooling, "context_length": opened.context_length})
    else:
        typer.echo(f"{out}: " + ", ".join(f"{count} rows of {name}" for name, count in rows.items()))


def fit(
    backbone: Backbone = None,
    ratings: Ratings = None,
    preferences: Preferences = None,
    objectives: Objectives = None,
    reference: Reference = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of the features; computed there if missing. Default: OUT-features.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the judge.")] = Path("runs/judge"),
    nuisance: Annotated[
        list[str] | None,
        typer.Option(help="An objective that must not buy score; repeatable. Default: verbosity, if there is one."),
    ] = None,
    scope: Annotated[str, typer.Option(help="within-prompt, or pooled as the paper has it.")] = "within-prompt",
    method: Annotated[str, typer.Option(help="spearman, kendall or pearson.")] = "spearman",
    how: Annotated[
        str, typer.Option(help="Several nuisances: sequential, or joint (every correlation zero at once).")
    ] = "sequential",
    intercept: Annotated[
        bool,
        typer.Option(help="Give every objective an intercept; the paper has none. Counted objectives always have one."),
    ] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option("--set", help="Gate options as key=value, such as hidden=256 or held_out=0.1; repeatable."),
    ] = None,
    layout: Annotated[str, typer.Option(help="telltale, or official (Llama backbones).")] = "telltale",
    context_length: ContextLength = None,
    batch_size: BackboneBatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit objectives, decorrelation and gate, compare with what the gate has to beat, and audit, on prompts left out.

    Without files: a small backbone and generated arithmetic preferences with a planted length bias.

    Example: `telltale judge fit --backbone my_model --preferences preferences.jsonl --out runs/judge`
    """
    check_choice("scope", scope, ("within-prompt", "pooled"))
    check_choice("method", method, ("spearman", "kendall", "pearson"))
    check_choice("how", how, ("sequential", "joint"))
    check_choice("layout", layout, ("telltale", "official"))
    set_threads(threads)
    from telltale.align.judge.features import open_backbone
    from telltale.align.judge.fit_files import audit_on_split, compute_features, fit_files, save_fit
    from telltale.align.judge.head import GateConfig
    from telltale.align.judge.official_checkpoint import check_target

    check_target(out)  # not after minutes of work
    overrides = parse_overrides(gate or [])
    options: dict[str, Any] = {"scope": scope, "method": method, "how": how, "seed": seed, "intercept": intercept}
    if backbone is None and ratings is None and preferences is None:
        given = {
            "objectives": objectives,
            "reference": reference,
            "nuisance": nuisance,
            "dtype": dtype,
            "device": device,
        }
        for name, value in (given | {"context-length": context_length}).items():
            if value is not None:
                raise ConfigError(f"--{name} is for a fit on files; expected --backbone and --preferences too.")
        _fit_default(features or out.with_name(f"{out.name}-features"), out, layout, overrides, options, json=json)
        return
    if backbone is None:
        raise ConfigError("no backbone was given; expected --backbone with a local checkpoint.")
    options["gate"] = GateConfig.from_dict(overrides)
    files = _files(ratings, preferences, objectives, reference)
    if layout == "official" and (intercept or files.counted):
        raise ConfigError(
            "layout='official' has no place for intercepts, which --intercept and counted objectives (no ratings) have; expected "
            "--layout telltale."
        )
    opened = open_backbone(backbone, dtype=dtype, device=device, context_length=context_length)
    folder = features or out.with_name(f"{out.name}-features")
    if not is_first_rank():
        compute_features(opened, files, folder, batch_size=batch_size)  # its share; one process fits
        return
    judge, result = fit_files(opened, files, folder, batch_size=batch_size, nuisances=nuisance, **options)
    audited = audit_on_split(opened, files, folder, result, batch_size=batch_size, seed=seed)
    save_fit(judge, result, out, layout=layout, audited=audited)
    if json:
        emit({"judge": str(out), "features": str(folder), "audit": audited.to_dict()} | result.report.to_dict())
    else:
        _print(result.report, out)
        _tell(audited, json=False)


def _fit_default(
    folder: Path, out: Path, layout: str, overrides: dict[str, Any], options: dict[str, Any], *, json: bool
) -> None:
    """The embedded default: a small backbone, generated preferences, and what length does to the labels."""
    from telltale.align.judge.default_judge import GATE, STEPS, embedded_default
    from telltale.align.judge.fit_files import save_fit
    from telltale.align.judge.head import GateConfig
    from telltale.runs.progress import ProgressBar

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("the fit without files takes one process; expected it outside of torchrun.")
    settings = GateConfig.from_dict(asdict(GATE) | overrides)
    with ProgressBar("judge", STEPS) as progress:
        found = embedded_default(folder, progress=progress, **options | {"gate": settings})
    save_fit(found.judge, found.fit, out, layout=layout)
    if json:
        emit({"judge": str(out), "unseen": found.accuracies} | found.fit.report.to_dict())
        return
    _print(found.fit.report, out)
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Unseen problems, labelled by the true preference")
    for name in ("model", "all pairs", "shorter is better"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, cells in found.accuracies.items():
        table.add_row(name, f"{cells['all']:.3f}", f"{cells.get('shorter is better', float('nan')):.3f}")
    Console().print(table)


def _files(ratings: Path | None, preferences: Path | None, objectives: Path | None, reference: Path | None) -> Any:
    from telltale.align.judge.fit_files import JudgeFiles

    if preferences is None:
        raise ConfigError("no preferences were given; expected --preferences, with or without --ratings.")
    return JudgeFiles(ratings, preferences, objectives, reference)


def _print(report: Any, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"Share of {report.compared_pairs} pairs in the right order, on prompts that nothing was fitted on"
    )
    for name in ("model", "accuracy", "95% interval", "gate less it"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in report.accuracies:
        found, gap = report.interval(name), report.differences.get(name)
        table.add_row(
            name, f"{found.value:.3f}", f"{found.low:.3f} - {found.high:.3f}", "" if gap is None else _interval(gap)
        )
    console.print(table)
    objectives = Table(title="Objectives, on prompts held out")
    for name in ("objective", "ratings", "alpha", "R2", "at most", "mean weight"):
        objectives.add_column(name, justify="left" if name == "objective" else "right")
    for index, name in enumerate(report.objectives):
        weight, quality = report.gate.mean_weights.get(name, 0.0), report.quality[name]
        objectives.add_row(
            name,
            str(int(report.ridge.rows[index])),
            f"{float(report.ridge.alpha[index]):g}",
            _value(quality.r2),
            "?" if quality.ceiling is None else f"{quality.ceiling:+.2f}",
            f"{weight:.3f}",
        )
    console.print(objectives)
    told = report.calibration
    unknown = told.error.value != told.error.value  # too few pairs for two bins
    console.print(
        (
            "calibration error unknown on so few pairs"
            if unknown
            else f"calibration error {told.error.value:.3f} [{told.error.low:.3f}, {told.error.high:.3f}]"
        )
        + "; log loss "
        f"{told.log_loss.value:.3f}, " + ", ".join(f"{_interval(gap)} below {name}" for name, gap in told.gain.items())
    )
    if told.abstention.threshold is not None:
        console.print(
            f"answers {told.abstention.answered.value:.0%} of the pairs, with at most {told.abstention.alpha:.0%} wrong at "
            f"{1 - told.abstention.delta:.0%} confidence"
        )
    if report.decorrelation is not None:
        console.print(_decorrelation(report.decorrelation))
    for warning in report.warnings:
        console.print(f"[yellow]{warning}")
    console.print(f"ships: {'yes' if report.ships else 'no'}. Written: {out}")


def _decorrelation(report: Any) -> Any:
    """Before and after, within prompts and pooled; in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    nuisances = {row.nuisance for row in report.rows}
    title = f"Correlation ({report.method}) with {' and '.join(sorted(nuisances))}, on prompts held out"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("objective")
    for name in ("within", "after", "pooled", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        name = row.objective if len(nuisances) == 1 else f"{row.objective}, {row.nuisance}"
        cells = [_value(row.within_before), _interval(row.within_after), _value(row.pooled_before)]
        table.add_row(name, *cells, _interval(row.pooled_after))
    return table


def _value(found: Any) -> str:
    return "-" if found.value != found.value else f"{found.value:+.2f}"


def _interval(found: Any) -> str:
    return "-" if found.value != found.value else f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def audit(
    judge: JudgePath,
    responses: Annotated[
        Path | None, typer.Option(help="JSON lines of responses, several to a prompt; ratings are ignored.")
    ] = None,
    preferences: Annotated[Path | None, typer.Option(help="JSON lines: prompt, chosen, rejected.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Does the final score follow length, markdown, refusals or the order of a pair? Within prompts, with intervals.

    Example: `telltale judge audit runs/judge --preferences preferences.jsonl --html audit.html`
    """
    if responses is None and preferences is None:
        raise ConfigError("there is nothing to audit on; expected --responses, --preferences or both.")
    set_threads(threads)
    from telltale.align.judge.auditing import audit as examine
    from telltale.align.judge.importing import read_conversations, read_preferences
    from telltale.align.judge.judge import Judge

    opened = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    pairs, same = ([], 0) if preferences is None else read_preferences(preferences)
    found = examine(
        opened,
        [] if responses is None else read_conversations(responses),
        preferences=pairs,
        dropped_pairs=same,
        tokens=opened.count_tokens,
        seed=seed,
    )
    if html is not None:
        found.to_html(html)
    _tell(found, json=json)


def evaluate(
    judge: JudgePath,
    suite: Annotated[str, typer.Option(help="rewardbench, rewardbench2, rm-bench or llmbar.")],
    data: Annotated[Path, typer.Option(help="A local file or folder in the benchmark's own format.")],
    weights: Annotated[
        str, typer.Option(help="RewardBench's subset weights: current, or paper (before September 2024).")
    ] = "current",
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """A public benchmark from local files, beside what preferring the longer response scores.

    Example: `telltale judge evaluate runs/judge --suite llmbar --data llmbar/`
    """
    set_threads(threads)
    from telltale.align.judge.benchmarks import SUITES, WEIGHTS
    from telltale.align.judge.benchmarks import evaluate as run
    from telltale.align.judge.judge import Judge

    # Before a large judge is loaded.
    check_choice("suite", suite, SUITES)
    check_choice("weights", weights, WEIGHTS)
    opened = Judge.load(judge, dtype=dtype, device=device, batch_size=batch_size)
    _tell(run(opened, suite, data, weights=weights), json=json)


def _tell(found: Any, *, json: bool) -> None:
    if json:
        emit(found.to_dict())
        return
    from rich.console import Console

    Console().print(found)
