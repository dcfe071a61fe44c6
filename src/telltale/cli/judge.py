"""``telltale judge``: scores and explanations of a fitted judge. Fitting and auditing are in the rooms beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import Device, Dtype, Json, Threads, emit, set_threads
from telltale.configuration import check_integer, parse_overrides
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
    from telltale.cli import judge_auditing, judge_fitting

    group = typer.Typer(
        help="A judge whose score is a sum of named objectives: fit, score, explain, audit.", no_args_is_help=True
    )
    judge_fitting.register(group)
    group.command("score")(score)
    group.command("explain")(explain)
    judge_auditing.register(group)
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
        typer.echo(f"{found.score:+.6f}{mark}{' truncated' if found.truncated else ''}")


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


def read(path: Path | None) -> list[Messages]:
    """Conversations of a JSON-lines file; ``-`` is standard input. Raises :class:`~telltale.errors.DataError`."""
    from telltale.align.judge.records import read_conversations

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
