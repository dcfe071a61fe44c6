"""``telltale plan``: where to cut a model for these machines, how often to replicate each part, and which weight policy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import Json, emit
from telltale.cli.profiling import (
    BatchSize,
    Model,
    Precision,
    Profiled,
    ProfileOptions,
    Recipe,
    Repeats,
    SequenceLength,
    Text,
    Threads,
    Untie,
    profiled,
)
from telltale.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from telltale.train.pipeline.plan import Plan
    from telltale.train.pipeline.profiling.profile import Profile
    from telltale.train.pipeline.profiling.topology import Topology
    from telltale.train.pipeline.simulation.timeline import Timeline


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan_command)


def plan_command(
    model: Model,
    topology: Annotated[Path | None, typer.Option(help="YAML of the machines; see telltale pipeline probe.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of --topology: so many workers, all alike.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="With --workers: 10Gbps, 1.25GB/s.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="stash, vertical, 2bw, flush, gpipe, interleaved, none. Default: chosen.")
    ] = None,
    cost_model: Annotated[str, typer.Option(help="ring, v1, sosp-literal or official-code.")] = "ring",
    memory: Annotated[str | None, typer.Option(help="Memory of one worker: 16GB. Default: the topology's.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Minibatches per update of 2bw, flush, gpipe.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Default: only where nothing fits without.")
    ] = None,
    synchronous: Annotated[bool, typer.Option("--synchronous", help="Only policies without stale weights.")] = False,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 128,
    text: Text = None,
    recipe: Recipe = "none",
    precision: Precision = "bfloat16",
    untie: Untie = False,
    repeats: Repeats = 10,
    threads: Threads = 1,
    profile_out: Annotated[Path | None, typer.Option(help="Write the measured profile here.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Draw the predicted timeline.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the predicted timeline as a page.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write it as a Chrome trace.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here, for train.")] = None,
    json: Json = False,
) -> None:
    """Plan a pipeline for MODEL on these machines: cuts, replicas and weight policy, with the reasons.

    Example: `telltale plan path/to/checkpoint --topology topo.yaml -o plan.json --simulate`
    """
    machines = topology_from(topology, workers, bandwidth)
    options = ProfileOptions(batch_size, sequence_length, text, recipe, precision, untie, repeats, threads)
    measured = profiled(model, options)
    if profile_out is not None:
        measured.profile.save(profile_out)
    planner_options = {
        "cost_model": cost_model,
        "memory": memory,
        "microbatches": microbatches,
        "recompute": recompute,
        "synchronous": synchronous,
    }
    chosen = _planned(measured, machines, policy, planner_options)
    if output is not None:
        chosen.save(output)
    timeline = _timeline(chosen, measured.profile, machines) if simulate or html or trace else None
    if timeline is not None:
        write_timeline(timeline, html=html, trace=trace)
    if json:
        emit(document(chosen, measured.profile, machines, timeline))
        return
    _show(chosen, measured, machines, timeline if simulate else None)
    if output is not None:
        _say_next(model, chosen, options, output, from_model=measured.model is not None)


def topology_from(path: Path | None, workers: int | None, bandwidth: str | None) -> Topology:
    """The machines of ``--topology``, or of ``--workers`` and ``--bandwidth``."""
    from telltale.train.pipeline.profiling.topology import Topology

    if path is not None:
        if workers is not None or bandwidth is not None:
            raise ConfigError("--topology says all about the machines; leave out --workers and --bandwidth.")
        return Topology.load(path)
    if workers is None or bandwidth is None:
        raise ConfigError("the machines are missing; give --topology FILE, or --workers N with --bandwidth 10Gbps.")
    # "10Gbps" are bits and "1GBps" bytes; parse_bytes, which minds no case, reads "10Gbit/s" and "1GB/s".
    rate = re.sub(r"(?<=[kKmMgGtT])([bB])ps$", lambda found: "bit/s" if found[1] == "b" else "B/s", bandwidth.strip())
    return Topology.flat(workers, bandwidth=rate)


def write_timeline(timeline: Timeline, *, html: Path | None, trace: Path | None, other: Timeline | None = None) -> None:
    """Write the page and the Chrome trace that were asked for."""
    from telltale.train.pipeline.simulation import gantt

    if html is not None:
        gantt.html(timeline, html, other=other)
    if trace is not None:
        timeline.save_chrome_trace(trace)


def timeline_figures(timeline: Timeline) -> dict[str, Any]:
    """What a timeline comes to, for machine output."""
    return {
        "label": timeline.label,
        "seconds_per_minibatch": timeline.seconds_per_minibatch,
        "makespan": timeline.makespan,
        "minibatches": len(timeline.minibatches),
        "idle": timeline.bubble_fraction,
    }


def document(plan: Plan, profile: Profile, topology: Topology, timeline: Timeline | None) -> dict[str, Any]:
    """The machine output of ``telltale plan``."""
    return {
        "configuration": plan.describe(),
        "plan": dataclasses.asdict(plan),
        "stages": [dataclasses.asdict(row) for row in _rows(plan, profile, topology)],
        "profile": {"step_seconds": profile.step_seconds, "residual": profile.residual, "threads": profile.threads},
        "simulated": None if timeline is None else timeline_figures(timeline),
    }


def _planned(measured: Profiled, machines: Topology, policy: str | None, options: dict[str, Any]) -> Plan:
    """The planner's choice, which must not tear a tied weight apart under a policy that cannot keep it together."""
    from telltale.train.pipeline.planning.planner import plan
    from telltale.train.pipeline.policies import BY_ROUND
    from telltale.train.pipeline.preparation import tied_across_stages

    chosen = plan(measured.profile, machines, policy=policy, **options)
    tied = tied_across_stages(measured.model, chosen) if measured.model is not None else []
    if not tied or chosen.policy not in BY_ROUND:
        return chosen
    reason = f"{tied[0]} is tied across stages, which {chosen.policy} updates at different times"
    if policy is not None:
        raise PlanError(f"{reason}; add --untie (to plan and train alike), or choose --policy 2bw or flush.")
    try:
        chosen = plan(measured.profile, machines, policy="2bw", **options)
    except PlanError:
        chosen = plan(measured.profile, machines, policy="flush", **options)
    sentence = f"{reason[0].upper()}{reason[1:]}: {chosen.policy} instead; --untie makes stash possible."
    return dataclasses.replace(chosen, reasons=(*chosen.reasons, sentence))


def _timeline(plan: Plan, profile: Profile, topology: Topology) -> Timeline:
    from telltale.train.pipeline.simulation.simulator import simulate

    return simulate(plan, profile, topology)


def _rows(plan: Plan, profile: Profile, topology: Topology) -> list[Any]:
    from telltale.train.pipeline.planning.explanation import explain

    return list(explain(plan, profile, topology))


def _show(plan: Plan, measured: Profiled, machines: Topology, timeline: Timeline | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    m = f", {plan.microbatches} minibatches per update" if plan.microbatches > 1 else ""
    recomputed = ", activations recomputed" if plan.recompute else ""
    title = f"configuration {plan.describe()}, policy {plan.policy}{m}{recomputed}"
    table = Table(title=title, caption="* sets the pace", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", justify="right")
    table.add_column("layers", min_width=24, overflow="fold")
    for name in ("replicas", "fwd+bwd\nms", "sync\nms", "cut\nms", "cut\nbytes", "memory\nMB"):
        table.add_column(name, justify="right")
    for row in _rows(plan, measured.profile, machines):
        marks = {kind: "*" if row.bottleneck == kind else "" for kind in ("compute", "synchronisation", "cut")}
        layers = row.first if row.n_layers == 1 else f"{row.first} to {row.last} ({row.n_layers} layers)"
        table.add_row(
            str(row.stage),
            layers,
            str(row.replicas),
            f"{1e3 * row.compute:.2f}{marks['compute']}",
            f"{1e3 * row.synchronisation:.2f}{marks['synchronisation']}",
            f"{1e3 * row.cut:.2f}{marks['cut']}",
            f"{row.cut_bytes:,.0f}",
            "" if row.memory is None else f"{row.memory / 1e6:,.1f}",
        )
    console = Console()
    console.print(table)
    console.print("Times are per minibatch, shared by a stage's replicas.", highlight=False)
    if measured.profile.residual is not None:
        console.print(
            f"Profile: {1e3 * measured.profile.compute:.2f} ms over the layers, {measured.profile.residual:+.1%} against the "
            f"whole step.",
            highlight=False,
        )
    for reason in plan.reasons:
        console.print(f"- {reason}", highlight=False, markup=False)
    if timeline is not None:
        from telltale.train.pipeline.simulation import gantt

        # Wider than a terminal is drawn as wide as the terminal; a pipe gets the same 100 columns everywhere.
        width = console.width if console.is_terminal else 100
        typer.echo(gantt.text(timeline, width=max(20, width)))


def _say_next(model: str, plan: Plan, options: ProfileOptions, output: Path, *, from_model: bool) -> None:
    """The command that trains with this plan, on minibatches of the size that was profiled."""
    if not from_model or plan.policy == "interleaved":
        typer.echo(f"written: {output}", err=True)
        return
    from telltale.train.pipeline.preparation import minibatches_per_step

    rows = options.batch_size * minibatches_per_step(plan)
    source = f"--model {model}" if Path(model).is_dir() else f"--preset {model}"
    extra = "".join(
        [
            f" --text {options.text}" if options.text else "",
            " --untie" if options.untie else "",
            " --launch" if plan.workers > 1 else "",
        ]
    )
    typer.echo(
        f"written: {output}. Train with it: telltale train --pipeline {output} {source} --recipe {options.recipe} "
        f"--run-dir runs/mine --set batch_size={rows} --set sequence_length={options.sequence_length} "
        f"--set precision={options.precision}{extra}",
        err=True,
    )
