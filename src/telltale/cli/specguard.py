"""``telltale specguard``: choose a threshold for a pair of models, and tell whether their signals say anything."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Backend, Dtype, Json, Seed, Threads, emit, set_threads
from telltale.cli.specguard_costs import costs
from telltale.cli.specguard_data import LABELERS, TASKS, Opened, open_models, open_task, stoppable
from telltale.cli.specguard_options import Candidates, Draft, ExitLayer, Fallback, Overrides, Target
from telltale.errors import ConfigError

Data = Annotated[Path | None, typer.Option(help="Problems, a local file. Without one: chains, generated from --seed.")]
Task = Annotated[str | None, typer.Option(help=f"{' or '.join(TASKS)}. Default: gsm8k with --data, chains without.")]
Count = Annotated[int | None, typer.Option("--problems", help="How many problems. Default: 300 chains, all of a file.")]
Labeler = Annotated[str, typer.Option(help=f"Who says which steps are right: {', '.join(LABELERS)}.")]
Rollouts = Annotated[int, typer.Option(help="Continuations for each step with --labeler rollouts.")]
Shots = Annotated[int | None, typer.Option(help="gsm8k: worked examples from the file's top, if there is no template.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample within this probability mass; 1 is all of it.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer. Default: 512, if there is room.")]
Batch = Annotated[int, typer.Option(help="Problems decoded together.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="Step-verified decoding: what it costs, a calibrated threshold, what its signals say.",
        no_args_is_help=True,
    )
    group.command("calibrate")(calibrate)
    group.command("report")(report)
    group.command("costs")(costs)
    app.add_typer(group, name="specguard")


def calibrate(
    target: Target,
    draft: Draft = None,
    exit_layer: ExitLayer = None,
    data: Data = None,
    task: Task = None,
    problems: Count = None,
    alpha: Annotated[float, typer.Option(help="Bound of the risk, in 0..1.")] = 0.05,
    method: Annotated[str, typer.Option(help="crc bounds the expected risk, ltt the risk with --confidence.")] = "crc",
    risk: Annotated[
        str | None, typer.Option(help="steps: accepted and wrong. accuracy-drop: answers lost (ltt, its default).")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of ltt.")] = 0.9,
    loss: Annotated[str, typer.Option(help="Of a problem: mean over its steps, or any.")] = "mean",
    unknown: Annotated[str, typer.Option(help="Steps that cannot be labelled: skip, wrong or right.")] = "skip",
    score: Annotated[str | None, typer.Option(help="ensemble (default), log-probability, grounding, ...")] = None,
    signal_model: Annotated[
        str, typer.Option(help="Whose signals are read: target (recommended) or draft.")
    ] = "target",
    beta: Annotated[str, typer.Option(help="Weight of log-probability in the ensemble, or choose.")] = "choose",
    normaliser: Annotated[str, typer.Option(help="Of the ensemble: minmax or ecdf.")] = "minmax",
    extremes: Annotated[str, typer.Option(help="Of minmax: robust (1% and 99%) or exact.")] = "robust",
    debias: Annotated[str | None, typer.Option(help="position-ecdf: groundings as ranks at their place.")] = None,
    labeler: Labeler = "checker",
    rollouts: Rollouts = 8,
    shots: Shots = None,
    candidates: Candidates = None,
    fallback: Fallback = None,
    overrides: Overrides = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.8,
    max_new_tokens: MaxNewTokens = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the calibration goes.")] = Path("guard.json"),
    run_dir: Annotated[
        Path, typer.Option(help="Where finished problems are kept; an interrupted calibration goes on from there.")
    ] = Path("runs/specguard"),
    batch: Batch = 32,
    seed: Seed = 0,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit a pair's normaliser and choose its threshold, so that accepted steps are wrong no more often than --alpha.

    Example: `telltale specguard calibrate --target big --draft small --data test.jsonl --alpha 0.05 -o guard.json`
    """
    set_threads(threads)
    from telltale.decode.step_verified.calibration.calibrated import strict
    from telltale.decode.step_verified.calibration.choosing import calibrate as choose
    from telltale.decode.step_verified.trials.running import SamplingSettings
    from telltale.decode.step_verified.trials.store import TrialStore
    from telltale.runs.atomic import check_writable

    check_writable(out)  # told now rather than after an hour
    weight = _beta(beta, score)
    options: dict[str, Any] = {
        "score": score,
        "signal_model": signal_model,
        "candidates": candidates,
        "fallback": fallback,
    }
    if isinstance(weight, float):
        options["beta"] = weight
    with stoppable() as stages:
        guard = open_models(
            target, draft, exit_layer, options=options, overrides=overrides, dtype=dtype, backend=backend
        )
        opened = _opened(
            guard, task, data, problems, labeler, rollouts, shots, max_new_tokens, temperature, top_p, seed
        )
        found = choose(
            opened.guard,
            opened.problems,
            opened.labeler,
            alpha=alpha,
            method=method,
            risk=risk,
            confidence=confidence,
            loss=loss,
            unknown=unknown,
            beta=weight,
            normaliser=normaliser,
            extremes=extremes,
            debias=debias,
            sampling=SamplingSettings(opened.max_new_tokens, temperature, _mass(top_p)),
            seed=seed,
            batch=batch,
            encode=opened.encode,
            store=TrialStore(run_dir / "trials"),
            on_problems=stages.tell,
        )
    found.save(out)
    if json:
        emit(strict(found.to_dict()) | {"written": str(out)})
    else:
        _print_calibration(found, out)


def report(
    target: Target,
    draft: Draft = None,
    exit_layer: ExitLayer = None,
    data: Data = None,
    task: Task = None,
    problems: Count = None,
    guard: Annotated[Path | None, typer.Option(help="A calibration of this pair: adds the calibrated policy.")] = None,
    scores: Annotated[str, typer.Option(help="Scores on the frontier, comma-separated. Default: three.")] = "",
    acceptances: Annotated[
        str, typer.Option(help="Shares of steps that each score's thresholds accept, comma-separated.")
    ] = "0.9,0.75,0.6,0.4",
    seeds: Annotated[int, typer.Option(help="Sampling seeds for each policy.")] = 1,
    labeler: Labeler = "checker",
    rollouts: Rollouts = 8,
    shots: Shots = None,
    candidates: Candidates = None,
    fallback: Fallback = None,
    overrides: Overrides = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.8,
    max_new_tokens: MaxNewTokens = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.json, report.html and finished problems.")
    ] = Path("runs/specguard-report"),
    batch: Batch = 32,
    seed: Seed = 0,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Does each signal predict correct steps in this pair, at fixed step length, and does accepting by it pay?

    Example: `telltale specguard report --target big --draft small --data test.jsonl --problems 200 -o report`
    """
    set_threads(threads)
    from telltale.configuration import check_integer
    from telltale.decode.step_verified.calibration.calibrated import Calibration
    from telltale.decode.step_verified.report.page import write_page
    from telltale.decode.step_verified.report.protocol import DEFAULT_SCORES, Protocol, measure
    from telltale.decode.step_verified.trials.running import SamplingSettings
    from telltale.decode.step_verified.trials.store import TrialStore
    from telltale.runs.atomic import write_atomically
    from telltale.runs.report import plotly_module

    plotly_module()  # told now rather than after an hour
    check_integer("seeds", seeds, low=1)
    names = tuple(part.strip() for part in scores.split(",") if part.strip()) or DEFAULT_SCORES
    shares = _shares(acceptances)
    calibration = None if guard is None else Calibration.load(guard)
    if calibration is not None and exit_layer is None and draft is None:
        exit_layer = calibration.config.exit_layer
    options = {"candidates": candidates, "fallback": fallback}
    with stoppable() as stages:
        pair = open_models(
            target, draft, exit_layer, options=options, overrides=overrides, dtype=dtype, backend=backend
        )
        if calibration is not None:
            calibration.check(pair)
        opened = _opened(pair, task, data, problems, labeler, rollouts, shots, max_new_tokens, temperature, top_p, seed)
        protocol = Protocol(
            scores=names,
            acceptances=shares,
            seeds=tuple(range(seed, seed + seeds)),
            batch=batch,
            sampling=SamplingSettings(opened.max_new_tokens, temperature, _mass(top_p)),
        )
        document = measure(
            opened.guard,
            opened.problems,
            opened.labeler,
            protocol,
            calibration=calibration,
            encode=opened.encode,
            store=TrialStore(out / "trials"),
            on_problems=stages.tell,
        )
    document["models"] = {"target": target.name, "draft": None if draft is None else draft.name}
    write_atomically(out / "report.json", json_format.dumps(document, indent=1, allow_nan=False) + "\n")
    write_page(document, out / "report.html")
    if json:
        emit(document | {"written": str(out)})
        return
    for sentence in document["findings"]:
        typer.echo(f"- {sentence}")
    typer.echo(f"written: {out / 'report.html'}, {out / 'report.json'}")


def _opened(
    guard: Any,
    task: str | None,
    data: Path | None,
    count: int | None,
    labeler: str,
    rollouts: int,
    shots: int | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> Opened:
    return open_task(
        guard,
        task=task,
        data=data,
        count=count,
        labeler=labeler,
        rollouts=rollouts,
        shots=shots,
        max_new_tokens=max_new_tokens,
        sampling={"temperature": temperature, "top_p": _mass(top_p)},
        seed=seed,
    )


def _beta(beta: str, score: str | None) -> float | str | None:
    if beta == "choose":
        return "choose" if score in (None, "ensemble") else None
    try:
        return float(beta)
    except ValueError:
        raise ConfigError(f"beta={beta!r} is not understood; expected a number in 0..1, or choose.") from None


def _mass(top_p: float) -> float | None:
    return None if top_p == 1 else top_p


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"acceptances={text!r} is not understood; expected numbers separated by commas.") from None
    if not found:
        raise ConfigError("acceptances is empty; expected at least one share.")
    return found


def _print_calibration(found: Any, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.method}, {found.risk}: alpha {found.alpha} on {found.n} problems")
    for name in ("threshold", "accepted", "risk", "bound" if found.method == "crc" else "p-value", ""):
        table.add_column(name, justify="right")
    for one in found.tried:
        shown = one.bound if one.p_value is None else one.p_value
        table.add_row(
            f"{one.threshold:.4g}",
            f"{one.acceptance:.1%}",
            f"{one.risk:.3f}",
            f"{shown:.3f}",
            "passed" if one.passed else "failed",
        )
    console = Console()
    console.print(table)
    if not found.feasible:
        console.print("No threshold: the target writes every step.")
    elif found.realised is not None:
        risk = found.realised
        console.print(
            f"threshold {found.threshold:.4g}, beta {found.config.beta}. On {risk.problems} other problems, accepted and wrong: "
            f"{risk.rate:.3f} ({risk.low:.3f} to {risk.high:.3f}).",
            highlight=False,
        )
    typer.echo(f"written: {out}")
