"""From nothing to a fast decoder in minutes, then three short chapters on exploration, the edge and world models.

Corpus, LayerSkip training, decoding beside Transformers, and the report. Everything is real and local: the text is
Python's own standard library or the user's, the model a small Llama that any Transformers program can load afterwards. A
tour that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from telltale.decode.costs_report import Sweep, sweep
from telltale.errors import ConfigError, MissingExtraError
from telltale.models.loading import load
from telltale.models.open import open_decoder
from telltale.models.presets import PRESETS, build
from telltale.runs.files import write_json
from telltale.runs.html_report import Report, plotly_module
from telltale.runs.run_dir import RunDir
from telltale.tasks.code import CodeCorpus
from telltale.tour import comparison as figures
from telltale.tour.comparison import EARLY_EXIT, OURS_BOTH, OURS_FIXED, OURS_PLAIN, PLAIN, Row, compare
from telltale.train.display import LiveDisplay
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.loop import TrainResult, train
from telltale.train.run_config import TrainConfig

_TITLES = {
    "oger": "a policy that learns a route from its teachers",
    "edge": "which patches of an image are worth sending",
    "world": "a world model that earns its level",
}
CHAPTERS = tuple(_TITLES)
"""What follows the decoder, in this order."""
RECIPE = LayerSkipConfig(p_max=0.1, e_scale=1.0, curriculum="rotational", rotation=4, time_schedule="exp")
TRAINING = TrainConfig(steps=800, learning_rate=3e-3, evaluate_every=50, checkpoint_every=50)
QUICK_TRAINING = TrainConfig(steps=20, learning_rate=3e-3, evaluate_every=10, checkpoint_every=10, batch_size=4)


def run_tour(
    run_dir: str | Path = "runs/tour",
    *,
    text: str | Path | None = None,
    quick: bool = False,
    chapters: Sequence[str] = CHAPTERS,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the tour in ``run_dir`` and return its summary, which is also written there as ``summary.json``.

    ``text`` is a file or folder of the user's own text; None takes the standard library. ``quick`` is a rehearsal of a
    few seconds whose figures mean nothing. ``chapters`` of :data:`CHAPTERS` follow the decoder; one whose packages are not
    installed says so and is left out. The report is ``run_dir/report.html``.

    Raises :class:`~telltale.errors.DataError` if there is no usable text and
    :class:`~telltale.errors.MissingExtraError` if Plotly is not installed.
    """
    console = console or Console(stderr=True)
    plotly_module()
    folder = Path(run_dir)
    began = time.perf_counter()
    _check_same_tour(folder, {"text": None if text is None else str(text), "quick": quick, "seed": seed})
    corpus = _corpus(folder, text, seed, console)
    result = _train(folder, corpus, seed, console, quick=quick)
    if result is not None and not result.finished:
        console.print(f"stopped at step {result.step}; the same command goes on from there.")
        return {"finished": False, "step": result.step, "run_dir": str(folder)}
    model, tokenizer = load(folder / "training" / "model")
    prompts = corpus.prompts(2 if quick else 6, length=64, seed=seed)
    new_tokens = 16 if quick else 96
    console.rule("3. decoding held-out prompts")
    swept = _sweep(model, prompts, new_tokens, console, quick=quick)
    rows = compare(
        model,
        prompts,
        new_tokens=new_tokens,
        exit_layer=swept.best.exit_layer,
        draft_length=swept.best.draft_length,
        rounds=1 if quick else 5,
    )
    _print(rows, console)
    metrics = RunDir.open(folder / "training").metrics()
    summary = _summary(folder, corpus, metrics, rows, swept, time.perf_counter() - began)
    swept.write_csv(folder / "sweep.csv")
    decoder = open_decoder(model)
    report = _report(summary, metrics, rows, swept, f"{decoder.backend} ({decoder.backend_reason})")
    summary["chapters"] = _chapters(chapters, folder, report, console, seed=seed, quick=quick)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "summary.json", summary)
    path = report.save(folder / "report.html")
    console.print(f"\nreport: {path}   model: {folder / 'training' / 'model'}")
    sample = tokenizer.decode(prompts[0])
    console.print(
        f"try it: telltale generate {folder / 'training' / 'model'} --prompt {sample.strip().splitlines()[0][:40]!r}"
    )
    return summary


def _chapters(
    names: Sequence[str], folder: Path, report: Report, console: Console, *, seed: int, quick: bool
) -> dict[str, Any]:
    """Run the chapters, add each to the report, and return their summaries by name."""
    found: dict[str, Any] = {}
    for number, name in enumerate(names, 4):
        console.rule(f"{number}. {_TITLES[name]}")
        try:
            if name == "oger":
                from telltale.tour import oger

                found[name] = oger.run_chapter(folder / name, quick=quick, seed=seed, console=console)
                oger.add_to_report(report, found[name])
                continue
            if name == "edge":
                from telltale.tour.edge import edge_chapter as run
            else:
                from telltale.tour.world import world_chapter as run  # type: ignore[assignment]
            chapter = run(folder / name, seed=seed, quick=quick)
            found[name] = chapter.summary()
            chapter.write(report)
            console.print(f"{chapter.seconds:.0f} s")
        except MissingExtraError as error:
            found[name] = {"left_out": str(error)}
            console.print(f"left out: {error}", markup=False)
    return found


def _check_same_tour(folder: Path, settings: dict[str, Any]) -> None:
    """A folder holds one tour: raise ConfigError if it was begun with other settings, else note these."""
    note = folder / "tour.json"
    if note.exists():
        begun = json.loads(note.read_text())
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ConfigError(
                    f"{folder} holds a tour with {name}={begun.get(name)!r}, not {value!r}; give another run directory or "
                    f"delete it."
                )
    write_json(note, settings)


def _corpus(folder: Path, text: str | Path | None, seed: int, console: Console) -> CodeCorpus:
    console.rule("1. corpus and tokenizer")
    saved = folder / "corpus"
    if saved.exists():
        corpus = CodeCorpus.load(saved)
        console.print(f"{corpus.train.numel():,} training tokens from {corpus.source} (kept)")
        return corpus
    size = PRESETS["tiny"].vocabulary_size
    if text is None:
        corpus = CodeCorpus.from_standard_library(vocabulary_size=size, seed=seed)
    else:
        corpus = CodeCorpus.from_path(text, vocabulary_size=size, seed=seed)
    corpus.prompts(1, length=64)
    corpus.save(saved)
    console.print(
        f"{corpus.train.numel():,} training and {corpus.held_out.numel():,} held-out tokens from {corpus.source}"
    )
    return corpus


def _train(folder: Path, corpus: CodeCorpus, seed: int, console: Console, *, quick: bool) -> TrainResult | None:
    console.rule("2. training with the LayerSkip recipe")
    path = folder / "training"
    if (path / "model").exists():
        console.print("already trained (delete the folder to train anew)")
        return None
    base = QUICK_TRAINING if quick else TRAINING
    config = TrainConfig.from_dict(base.to_dict() | {"seed": seed})
    model = build("tiny", vocabulary_size=len(corpus.tokenizer), seed=seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{size / 1e6:.2f}M parameters, {config.steps} steps of {config.batch_size} x {config.sequence_length} tokens"
    )
    return train(
        model,
        corpus,
        config,
        run_dir=path,
        layerskip=RECIPE,
        tokenizer=corpus.tokenizer,
        resume=True,
        callbacks=[LiveDisplay(config.steps, console=console)],
    )


def _sweep(model: Any, prompts: list[torch.Tensor], new_tokens: int, console: Console, *, quick: bool) -> Sweep:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sweep(
            open_decoder(model),
            prompts[:1] if quick else prompts[:3],
            exit_layers=[1, 2] if quick else None,
            draft_lengths=(1, 3) if quick else (1, 2, 3, 4, 6, 8),
            new_tokens=new_tokens,
            rounds=1 if quick else 3,
        )
    finally:
        torch.set_num_threads(threads)


def _print(rows: list[Row], console: Console) -> None:
    table = Table(title="greedy decoding, one thread, batch 1")
    for name in ("method", "tokens/s (CPU time)", "x generate", "accepted", "same tokens"):
        table.add_column(name, justify="left" if name == "method" else "right")
    base = next(row for row in rows if row.method == PLAIN)
    for row in rows:
        table.add_row(*_cells(row, base))
    console.print(table)


def _cells(row: Row, base: Row) -> list[str]:
    return [
        row.method,
        f"{row.tokens_per_cpu_second:,.0f}",
        f"{row.tokens_per_cpu_second / base.tokens_per_cpu_second:.2f}x",
        "" if row.acceptance is None else f"{row.acceptance:.0%}",
        f"{row.identical}/{row.prompts}",
    ]


def _summary(
    folder: Path, corpus: CodeCorpus, metrics: list[dict[str, Any]], rows: list[Row], swept: Sweep, seconds: float
) -> dict[str, Any]:
    held_out = [record["held_out"] for record in metrics if "held_out" in record][-1]
    return {
        "finished": True,
        "run_dir": str(folder),
        "source": corpus.source,
        "seconds": round(seconds, 1),
        "held_out": held_out,
        "methods": [asdict(row) for row in rows],
        "identical": all(row.identical == row.prompts for row in rows),
        "best_point": asdict(swept.best),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _report(
    summary: dict[str, Any], metrics: list[dict[str, Any]], rows: list[Row], swept: Sweep, backend: str
) -> Report:
    by_name = {row.method: row for row in rows}
    base, best = by_name[PLAIN], swept.best
    fastest = max((row for row in rows if row.method.startswith("telltale")), key=lambda row: row.tokens_per_cpu_second)

    def times(name: str, other: str = PLAIN) -> str:
        return f"{by_name[name].tokens_per_cpu_second / by_name[other].tokens_per_cpu_second:.1f}x"

    report = Report("telltale: the tour", subtitle=f"trained on {summary['source']}; {summary['seconds']:.0f} s in all")
    report.cards(
        [
            (times(fastest.method), f"{fastest.method}, against plain generate"),
            (times(OURS_PLAIN), "our plain loop, against plain generate"),
            (times(OURS_FIXED, EARLY_EXIT), "our self-speculation, against assistant_early_exit"),
            (f"{sum(r.identical for r in rows)}/{sum(r.prompts for r in rows)}", "outputs identical to plain generate"),
        ]
    )
    report.text(
        "The model was trained so that its early layers already predict what the whole model predicts. They draft a few tokens; "
        "one pass of the remaining layers checks the draft. What is accepted is exactly what the whole model would "
        "have written."
    )
    report.heading("Training: every layer learns to predict")
    report.figure(
        figures.loss_per_exit(metrics),
        caption="Held-out loss if the model stopped at each layer. LayerSkip pulls the early ones down; exit 1 gets no loss of "
        "its own.",
    )
    report.heading("Can the early layers draft?")
    accepted = {p.exit_layer: p.acceptance_rate for p in swept.points if p.draft_length == best.draft_length}
    report.figure(figures.acceptance_by_exit(summary["held_out"]["agreement"], accepted, best.draft_length))
    report.heading("Tokens per second")
    report.figure(figures.tokens_per_second(rows))
    headers = ("method", "tokens/s", "against generate", "drafts accepted", "same tokens")
    report.table(headers, [_cells(row, base) for row in rows], caption="CPU time, one thread, interleaved, median.")
    if OURS_BOTH in by_name:
        report.text(
            "N-gram drafts copy what followed the same words earlier in the text; on code that is often right, and costs nothing. "
            "The last row takes them where they match and the early exit elsewhere."
        )
    report.heading("Which exit layer, how long a draft?")
    report.figure(
        figures.speed_up(swept.points),
        caption=f"Marks are measured, lines the cost model with this machine's pass costs. A pass over 5 tokens costs "
        f"{swept.costs.relative(5):.2f} single ones here. Best: exit {best.exit_layer}, draft length "
        f"{best.draft_length}, {best.speedup:.2f}x our own plain decoding.",
    )
    report.text(f"Backend: {backend}.")
    return report
