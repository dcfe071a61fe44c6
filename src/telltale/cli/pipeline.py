"""``telltale pipeline``: measure the links between ranks (probe), a model (profile), and predict a run (simulate)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telltale.cli.options import Json, emit
from telltale.cli.plan import timeline_figures, write_timeline
from telltale.cli.profiling import (
    BatchSize,
    Model,
    Precision,
    ProfileOptions,
    Recipe,
    Repeats,
    SequenceLength,
    Text,
    Threads,
    Untie,
    profiled,
)
from telltale.cli.torchrun import LAUNCH, is_first_rank, require_ranks
from telltale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from telltale.train.pipeline.profiling.probe import ProbeResult
    from telltale.train.pipeline.simulation.timeline import Timeline


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="Pipeline training: measure links and layers, predict a run. See also telltale plan.", no_args_is_help=True
    )
    group.command("probe")(probe_command)
    group.command("profile")(profile_command)
    group.command("simulate")(simulate_command)
    app.add_typer(group, name="pipeline")


def probe_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the topology goes.")] = Path("topo.yaml"),
    workers: Annotated[int, typer.Option(help="Ranks on this machine, for the command to type and --launch.")] = 2,
    megabytes: Annotated[int, typer.Option(help="Size of the messages.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are taken.")] = 9,
    memory: Annotated[
        str | None, typer.Option(help="Memory of one worker, for the topology: 16GB. Default: the GPU's.")
    ] = None,
    launch: Annotated[bool, typer.Option(LAUNCH, help="Start torchrun on this machine.")] = False,
    json: Json = False,
) -> None:
    """Measure bandwidth and latency between the ranks of a torchrun job and write the topology for `telltale plan`.

    Example: `torchrun --nproc-per-node 2 -m telltale pipeline probe -o topo.yaml`
    """
    if workers < 2:
        raise ConfigError(f"workers={workers} is not allowed; expected an integer >= 2.")
    require_ranks(context, workers, launch=launch)
    import torch.distributed as dist

    from telltale.train.pipeline.profiling.probe import probe

    result = probe(message_bytes=megabytes * 2**20, repeats=repeats, device_memory=memory)
    if is_first_rank():
        result.topology.save(output)
        _show_probe(result, output, json=json)
    dist.barrier()
    dist.destroy_process_group()


def profile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")],
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 128,
    text: Text = None,
    recipe: Recipe = "none",
    precision: Precision = "bfloat16",
    untie: Untie = False,
    repeats: Repeats = 10,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Measure seconds and bytes of every layer of MODEL where it stands, or convert a profile to our JSON.

    Example: `telltale pipeline profile path/to/checkpoint -o profile.json --batch-size 4`
    """
    options = ProfileOptions(batch_size, sequence_length, text, recipe, precision, untie, repeats, threads)
    profile = profiled(model, options).profile
    profile.save(output)
    if json:
        emit(dataclasses.asdict(profile) | {"residual": profile.residual})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(output))
    table.add_column("layer")
    for name in ("forward ms", "backward ms", "update ms", "activation bytes", "parameter bytes", "saved bytes"):
        table.add_column(name, justify="right")
    for layer in profile.layers:
        table.add_row(
            layer.name,
            *(f"{1e3 * seconds:.3f}" for seconds in (layer.forward, layer.backward, layer.update)),
            *(f"{size:,.0f}" for size in (layer.activation_bytes, layer.parameter_bytes, layer.saved_bytes)),
        )
    console = Console()
    console.print(table)
    if profile.residual is not None:
        console.print(f"layers sum to {1e3 * profile.compute:.2f} ms, {profile.residual:+.1%} against the whole step")


def simulate_command(
    plan: Annotated[Path, typer.Argument(help="A plan that telltale plan wrote.")],
    profile: Annotated[Path, typer.Argument(help="The profile: our JSON or the official text format.")],
    topology: Annotated[Path, typer.Argument(help="YAML of the machines.")],
    minibatches: Annotated[int | None, typer.Option(help="How many. Default: enough for a steady state.")] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="timeline.json of a run of this plan, to lay the prediction over.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the timeline as a page.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write it as a Chrome trace.")] = None,
    json: Json = False,
) -> None:
    """Predict what every worker does when under a plan, and compare with a recorded run.

    Example: `telltale pipeline simulate plan.json profile.json topo.yaml --recorded runs/mine/timeline.json --html both.html`
    """
    from telltale.train.pipeline.plan import Plan
    from telltale.train.pipeline.profiling.profile import Profile
    from telltale.train.pipeline.profiling.topology import Topology
    from telltale.train.pipeline.simulation.simulator import simulate
    from telltale.train.pipeline.simulation.timeline import Timeline

    chosen = Plan.load(plan)
    run = None if recorded is None else Timeline.load(recorded)
    if run is not None and run.policy != chosen.policy:
        raise DataError(f"{recorded} is of a run under {run.policy!r}; expected one of the plan's {chosen.policy!r}.")
    if minibatches is None and run is not None:
        minibatches = len(run.minibatches)
    predicted = simulate(chosen, Profile.load(profile), Topology.load(topology), minibatches=minibatches)
    write_timeline(predicted, html=html, trace=trace, other=run)
    if json:
        emit(
            {
                "simulated": timeline_figures(predicted),
                "recorded": None if run is None else timeline_figures(run),
                "ratio": None if run is None else predicted.compare(run).seconds_ratio,
            }
        )
        return
    _draw(predicted, run)


def _draw(predicted: Timeline, run: Timeline | None) -> None:
    from rich.console import Console

    from telltale.train.pipeline.simulation import gantt

    console = Console()
    width = max(20, console.width if console.is_terminal else 100)
    typer.echo(gantt.text(predicted, width=width))
    if run is None:
        return
    typer.echo("")
    typer.echo(gantt.text(run, width=width))
    comparison = predicted.compare(run)
    typer.echo(f"\nseconds per minibatch, predicted over recorded: {comparison.seconds_ratio:.3f}")
    for (stage, kind), (mine, theirs) in comparison.medians.items():
        typer.echo(f"  stage {stage} {kind}: predicted {1e3 * mine:.3f} ms, recorded {1e3 * theirs:.3f} ms")


def _show_probe(result: ProbeResult, output: Path, *, json: bool) -> None:
    if json:
        emit(
            {
                "topology": dataclasses.asdict(result.topology),
                "measurements": [dataclasses.asdict(found) for found in result.measurements],
                "output": str(output),
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(output))
    for name in ("level", "what", "ranks", "GB/s", "latency µs"):
        table.add_column(name, justify="right")
    for found in result.measurements:
        table.add_row(
            "between hosts" if found.level else "inside a host",
            found.kind,
            "-".join(map(str, found.ranks)),
            f"{found.bandwidth / 1e9:.3f}",
            f"{1e6 * found.latency:.0f}",
        )
    console = Console()
    console.print(table)
    console.print("The topology has the smaller bandwidth of each level; edit the file to plan with another.")
