"""``telltale layerskip retrofit``: draft exits for an ordinary checkpoint, and what they are worth, the bound first."""

from __future__ import annotations

import json as json_module
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import INTERRUPTED, Dtype, Json, Seed, Threads, emit, set_threads
from telltale.config import from_mapping, parse_overrides

if TYPE_CHECKING:
    from telltale.train.retrofit import RetrofitConfig


def register(app: typer.Typer) -> None:
    """Add the command to the group ``layerskip``."""
    group = next(one.typer_instance for one in app.registered_groups if one.name == "layerskip")
    assert group is not None
    group.command("retrofit")(retrofit)


def retrofit(
    checkpoint: Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint, or a GGUF file.")],
    texts: Annotated[
        list[Path],
        typer.Argument(help="Prompts: chats (.jsonl), text files, folders of both; several are drawn from alike."),
    ],
    run_dir: Annotated[Path, typer.Option(help="Where the model's texts, metrics and checkpoints go.")] = Path(
        "runs/retrofit"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --run-dir holds.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of RetrofitConfig, such as steps=600; repeatable.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train exits that draft for a checkpoint as it is; the result is a small file beside it, which generate and serve find.

    Example: `telltale layerskip retrofit models/mine chats.jsonl my_project/ --run-dir runs/retrofit`
    """
    set_threads(threads)
    from telltale.decode.costs_report import draft_bound
    from telltale.models.draft_exits import draft_exits_path
    from telltale.models.loading import load
    from telltale.runs.files import check_writable, write_atomically
    from telltale.train.own_text import Prompts
    from telltale.train.retrofit import RetrofitConfig
    from telltale.train.retrofit import retrofit as train

    config = from_mapping(RetrofitConfig, {"seed": seed} | parse_overrides(set_ or ()))
    target = draft_exits_path(checkpoint)
    check_writable(target)
    model, tokenizer = load(checkpoint, dtype=dtype)
    prompts = Prompts(texts, tokenizer, longest=config.new_tokens, seed=config.seed)
    costs, layers = _costs(model, config)
    exits = config.exits_of(layers)
    bounds = [draft_bound(costs, layer) for layer in sorted({*exits, max(1, layers // 3)})]
    if not json:
        for one in bounds:
            typer.echo(_sentence(one, own=one.exit_layer not in exits), err=True)
    with _Bars() as bars:
        result = train(
            _trunk(model),
            tokenizer,
            prompts,
            config,
            checkpoint=checkpoint,
            run_dir=run_dir,
            resume=resume,
            progress=bars.show,
        )
    if result.exits is None:
        raise typer.Exit(INTERRUPTED)
    result.exits.save(target)
    document = _document(result, bounds, costs) | {"written": str(target)}
    write_atomically(run_dir / "report.json", json_module.dumps(document, indent=1) + "\n")
    if json:
        emit(document)
    else:
        _show(document)


def _costs(model: Any, config: RetrofitConfig) -> tuple[Any, int]:
    """Pass costs of this machine with untrained exits of the same size, and the model's layers."""
    from telltale.decode.pass_costs import costs_of
    from telltale.models.draft_exits import attached
    from telltale.models.open import open_decoder
    from telltale.train.retrofit import untrained

    decoder = open_decoder(model)
    with attached(model, untrained(decoder, config)):
        decoder.open_draft_exits()
    return costs_of(decoder, 1), decoder.layers


def _trunk(model: Any) -> Any:
    """A decoder that is fast with many texts at once: PyTorch's, where it can read the family."""
    from telltale.errors import UnsupportedModelError
    from telltale.models.open import open_decoder

    try:
        return open_decoder(model, backend="fused")
    except UnsupportedModelError:
        return open_decoder(model)


def _sentence(bound: Any, *, own: bool) -> str:
    head = "its final norm and whole head" if own else "a draft exit"
    needed = "no acceptance gives" if bound.needed is None else f"{bound.needed:.0%} of drafts must be accepted for"
    return (
        f"bound: exit layer {bound.exit_layer} with {head}: a draft costs {bound.cost:.2f} of a token; {needed} 1.3x."
    )


def _document(result: Any, bounds: list[Any], costs: Any) -> dict[str, Any]:
    from telltale.decode.costs_report import best_draft

    exits = []
    for one in result.reports:
        speedup, length = best_draft(costs, one.exit_layer, one.acceptance)
        exits.append(asdict(one) | {"draft_length": length, "predicted_speedup": speedup})
    return {
        "bounds": [asdict(one) for one in bounds],
        "exits": exits,
        "shortlist_covers": result.covered,
        "steps": result.step,
        "seconds": result.seconds,
    }


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"drafts on held-out text of the model's own; the shortlist has {document['shortlist_covers']:.1%} of it"
    )
    for name in ("exit layer", "before", "accepted, by draft", "best draft", "predicted speed-up"):
        table.add_column(name, justify="right")
    for one in document["exits"]:
        table.add_row(
            str(one["exit_layer"]),
            f"{one['before']:.1%}",
            "  ".join(f"{share:.1%}" for share in one["acceptance"]),
            str(one["draft_length"]),
            f"{one['predicted_speedup']:.2f}x",
        )
    console = Console()
    console.print(table)
    console.print(f"Written: {document['written']}", soft_wrap=True)


class _Bars:
    """A progress bar for each stage, one after another."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None

    def show(self, stage: str, done: int, total: int, note: str) -> None:
        """Move the bar of ``stage``, which opens when it comes."""
        from telltale.runs.progress import ProgressBar

        if self._bar is None or self._bar.description != stage:
            self._stack.close()
            self._bar = self._stack.enter_context(ProgressBar(stage, total))
        self._bar.update(done, note)

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
