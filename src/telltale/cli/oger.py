"""``telltale oger``: look at teachers, train a policy with them, compare the method with its rivals on the embedded task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Json, Seed, Threads, emit, set_threads
from telltale.config import parse_overrides
from telltale.errors import ConfigError, MissingExtraError

group = typer.Typer(no_args_is_help=True, help="Teachers' traces as a reference for exploration (OGER), on TRL.")

Prompts = Annotated[
    Path, typer.Argument(help="JSON lines: id, prompt or messages, answer and what the verifier reads.")
]
Teachers = Annotated[Path, typer.Argument(help="JSON lines: prompt_id, teacher, text and, if recorded, log_probs.")]
VerifierName = Annotated[str, typer.Option(help="gsm8k, routes, routes-answer, or file.py:function.")]
EncoderName = Annotated[
    str, typer.Option(help="hidden (of the checkpoint), ngrams, or a folder with a sentence encoder.")
]
Cache = Annotated[Path | None, typer.Option(help="A file that keeps the teachers' embeddings between runs.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group.command("inspect")(inspect)
    group.command("train")(train)
    group.command("compare")(compare)
    app.add_typer(group, name="oger")


def inspect(
    prompts: Prompts,
    teachers: Teachers,
    verifier: VerifierName = "gsm8k",
    encoder: EncoderName = "ngrams",
    checkpoint: Annotated[Path | None, typer.Option(help="The policy: for its tokens, and for encoder hidden.")] = None,
    max_completion_length: Annotated[int, typer.Option(help="Longest trace in tokens, with --checkpoint.")] = 1024,
    cache: Cache = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Per teacher: count, correctness, length; how alike they are; whether the encoder can tell their traces apart.

    Example: `telltale oger inspect prompts.jsonl teachers.jsonl --verifier gsm8k --encoder hidden --checkpoint my_model`
    """
    set_threads(threads)
    from telltale.align.oger.encoders import open_encoder
    from telltale.align.oger.inspection import inspect as look
    from telltale.align.oger.teachers import TeacherStore
    from telltale.align.oger.tokens import TokenisedTeachers, end_tokens
    from telltale.models.loading import load

    store = TeacherStore.from_jsonl(prompts, teachers, verifier=_verifier(verifier), cache=cache)
    model = tokenizer = tokens = None
    if checkpoint is not None:
        model, tokenizer = load(checkpoint, any_family=True)
        tokens = TokenisedTeachers(
            store, tokenizer, end_ids=end_tokens(model, tokenizer), longest=max_completion_length
        )
    found = look(store, open_encoder(encoder, model=model, tokenizer=tokenizer), tokens=tokens)
    if json:
        document = {name: getattr(found, name) for name in found.__dataclass_fields__}
        emit(document | {"separates": found.separates, "verdict": found.verdict})
        return
    _print_inspection(found)


def train(
    checkpoint: Annotated[Path, typer.Argument(help="The policy: a local Hugging Face checkpoint.")],
    prompts: Prompts,
    teachers: Teachers,
    verifier: VerifierName = "gsm8k",
    encoder: EncoderName = "hidden",
    out: Annotated[
        Path, typer.Option(help="Folder of the run: checkpoints, metrics, and the policy in OUT/model.")
    ] = Path("runs/oger"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    preset: Annotated[str, typer.Option(help="default, or paper (the literal formula).")] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of OGERConfig or TRL's GRPOConfig, such as oger_coef=0.5; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    cache: Cache = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a policy with TRL's GRPO and these teachers.

    Example: `telltale oger train my_model prompts.jsonl teachers.jsonl --verifier gsm8k --steps 200 --set num_generations=8`
    """
    set_threads(threads)
    _need_trl()
    import torch

    from telltale.align.oger.job import train_policy

    checked = _config_fields(parse_overrides(settings or []))
    given = {
        "max_steps": steps,
        "oger_preset": preset,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    } | checked
    with _Progress(json) as progress:
        summary = train_policy(
            checkpoint,
            prompts,
            teachers,
            out,
            verifier=_verifier(verifier),
            encoder=encoder,
            fields=given,
            resume=resume,
            cache=cache,
            progress=progress.tell,
        )
    if json:
        emit(summary)
        return
    last = summary["last"]
    told = [f"{name} {last[key]:.3f}" for name, key in _TOLD if last.get(key) is not None]
    typer.echo(f"{summary['model']}: step {summary['steps']}, " + ", ".join(told))


def compare(
    arms: Annotated[str | None, typer.Option(help="Comma-separated; default: all nine.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated whole numbers.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Folder of the results; what is there already is not run again.")] = Path(
        "runs/oger-compare"
    ),
    steps: Annotated[int, typer.Option(help="Policy updates of every run.")] = 80,
    base_steps: Annotated[int, typer.Option(help="Updates that train the base policy.")] = 1200,
    problems: Annotated[int, typer.Option(help="Held-out problems of an evaluation, 16 samples each.")] = 150,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """GRPO, its rivals and OGER on the embedded multi-route arithmetic: a table with intervals and a page with curves.

    Example: `telltale oger compare --arms grpo,hybrid,default --seeds 0,1 --steps 40`
    """
    set_threads(threads)
    _need_trl()
    from telltale.align.oger.comparison import ARMS, Setting, summarise
    from telltale.align.oger.comparison import compare as run
    from telltale.align.oger.comparison_page import save_page
    from telltale.tasks.routes import BaseRecipe

    chosen = list(ARMS) if arms is None else [arm.strip() for arm in arms.split(",")]
    quarters = tuple(sorted({max(steps // 4, 1), max(steps // 2, 1), steps}))
    setting = Setting(steps=steps, evaluate_at=quarters, evaluated_problems=problems, base=BaseRecipe(steps=base_steps))
    with _Progress(json) as progress:
        records = run(out, arms=chosen, seeds=_seeds(seeds), setting=setting, progress=progress.tell)
    rows = summarise(records)
    if json:
        emit({"setting": setting.digest, "arms": rows})
        return
    _print_comparison(rows, quarters)
    page = save_page(records, out / "report.html")
    typer.echo(f"page: {page}")


_TOLD = (
    ("online solved", "oger/online_solved"),
    ("bonus", "oger/bonus"),
    ("divergence", "oger/divergence"),
    ("teacher share", "oger/teacher_share"),
    ("entropy", "entropy"),
)


class _Progress:
    """One bar per named piece of work, nothing with ``--json``."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._name: str | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def tell(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` steps of ``name``."""
        if self.quiet:
            return
        from telltale.runs.progress import ProgressBar

        if name != self._name:
            self._close()
            self._name, self._bar = name, ProgressBar(name, total)
            self._bar.__enter__()
        self._bar.update(done, note)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _verifier(name: str) -> Callable[..., Any]:
    from telltale.align.oger.verification import load_verifier
    from telltale.tasks.verifiers import VERIFIERS

    return load_verifier(name, VERIFIERS)


def _need_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("OGER trains with TRL: pip install 'telltale[align]'") from error


def _config_fields(values: dict[str, Any]) -> dict[str, Any]:
    from telltale.align.oger.config import OGERConfig

    names = [field.name for field in fields(OGERConfig) if field.init]
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name!r} is no field of OGERConfig or TRL's GRPOConfig.{hint}")
    return values


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"seeds={text!r} is not understood; expected whole numbers, such as 0,1,2.") from None


def _print_inspection(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.prompts} prompts, {found.without_teacher} without a usable trace")
    for heading in ("teacher", "given", "correct", "kept", "prompts", "words", "usable", "tokens"):
        table.add_column(heading, justify="left" if heading == "teacher" else "right", overflow="fold")
    left_out = []
    for row in found.teachers:
        reasons = dict(row["dropped"])
        for reason, count in row.get("unusable", {}).items():
            reasons[reason] = reasons.get(reason, 0) + count
        if reasons:
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            left_out.append(f"left out of {row['teacher']}: {told}")
        usable, tokens = row.get("usable"), row.get("mean_tokens")
        table.add_row(
            row["teacher"],
            str(row["given"]),
            f"{row['correctness']:.1%}",
            str(row["kept"]),
            str(row["prompts"]),
            f"{row['mean_words']:.0f}",
            "" if usable is None else str(usable),
            "" if tokens is None else f"{tokens:.0f}",
        )
    console = Console()
    console.print(table)
    for line in left_out:
        console.print(line, highlight=False, markup=False)
    console.print("mean cosine of two teachers' traces for the same prompt:", highlight=False)
    matrix = Table()
    for heading in ("", *found.names):
        matrix.add_column(heading, justify="right", overflow="fold")
    for name, row in zip(found.names, found.similarity, strict=True):
        matrix.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(matrix)
    console.print(found.verdict, highlight=False)


def _print_comparison(rows: list[dict[str, Any]], steps: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out problems, means over seeds; 95% t intervals where there are several")
    for heading in ("arm", *(f"hard@{step}" for step in steps), "easy", "pass@16", "routes", "entropy"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in rows:
        cells = [f"{row[f'hard@{step}']:.2f}" for step in steps[:-1]]
        for name in ("hard", "easy", "hard_pass_at_n", "routes", "entropy"):
            low, high = row[f"{name}_interval"]
            cells.append(f"{row[name]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else ""))
        table.add_row(row["arm"], *cells)
    Console().print(table)
