"""``telltale pipeline``: measure the links between ranks (probe), a model (profile), and predict a run (simulate).

``telltale plan``: where to cut a model for these machines, how often to replicate each part, and which weight policy.

What ``telltale plan`` and ``telltale pipeline profile`` share: a profile read from a file, or measured on MODEL.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import LAUNCH, Json, config_options, emit, is_first_rank, require_ranks
from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError, PlanError

if TYPE_CHECKING:
    from telltale.train.pipeline.layers import LayeredModel
    from telltale.train.pipeline.plan import Plan
    from telltale.train.pipeline.profile import Profile
    from telltale.train.pipeline.simulation.timeline import Timeline
    from telltale.train.pipeline.topology import ProbeResult, Topology


Model = Annotated[
    str, typer.Argument(help="A local checkpoint, a preset's name, or a profile (JSON or the official text format).")
]


@dataclass(frozen=True)
class ProfileOptions:
    """How to profile a model; checked before anything is loaded."""

    batch_size: int = 8
    """Sequences of one minibatch, to profile with."""
    sequence_length: int = 128
    """Tokens per sequence, to profile with."""
    text: Path | None = None
    """Text to profile on, as for train. Default: random tokens."""
    recipe: str = "none"
    """none or layerskip: what it will be trained with."""
    precision: str = "bfloat16"
    """float32 or bfloat16: what it will be trained in."""
    untie: bool = False
    """Give a tied head weights of its own, which stash needs."""
    repeats: int = 10
    """Rounds of the profile; medians are taken."""
    threads: int = 1
    """CPU threads per worker. torchrun gives its workers one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats", "threads"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("sequence_length", self.sequence_length, low=2)
        check_choice("recipe", self.recipe, ("none", "layerskip"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="Pipeline training: measure links and layers, predict a run. See also telltale plan.", no_args_is_help=True
    )
    group.command("probe")(probe_command)
    group.command("profile")(profile_command)
    group.command("simulate")(simulate_command)
    app.add_typer(group, name="pipeline")
    app.command("plan")(plan_command)


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

    from telltale.train.pipeline.topology import probe

    result = probe(message_bytes=megabytes * 2**20, repeats=repeats, device_memory=memory)
    if is_first_rank():
        result.topology.save(output)
        _show_probe(result, output, json=json)
    dist.barrier()
    dist.destroy_process_group()


@config_options(ProfileOptions, into="options")
def profile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")],
    json: Json = False,
    *,
    options: ProfileOptions,
) -> None:
    """Measure seconds and bytes of every layer of MODEL in place, or convert a profile to our JSON.

    Example: `telltale pipeline profile path/to/checkpoint -o profile.json --batch-size 4`
    """
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
    from telltale.train.pipeline.profile import Profile
    from telltale.train.pipeline.simulation.simulator import simulate
    from telltale.train.pipeline.simulation.timeline import Timeline
    from telltale.train.pipeline.topology import Topology

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


@config_options(ProfileOptions, into="options", panel="Profiling MODEL")
def plan_command(
    model: Model,
    topology: Annotated[Path | None, typer.Option(help="YAML of the machines; see telltale pipeline probe.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of --topology: so many workers, all alike.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="With --workers: 10Gbps, 1.25GB/s.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="stash, vertical, 2bw, flush, gpipe, interleaved, none. Default: chosen.")
    ] = None,
    cost_model: Annotated[
        str | None,
        typer.Option(help="ring, v1, sosp-literal or official-code: plan by its equations. Not given: by simulation."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one worker: 16GB. Default: the topology's.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Minibatches per update of 2bw, flush, gpipe.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Default: only where nothing fits without.")
    ] = None,
    synchronous: Annotated[bool, typer.Option("--synchronous", help="Only policies without stale weights.")] = False,
    stages: Annotated[int | None, typer.Option(help="Exactly so many stages. Default: as many as are fastest.")] = None,
    straight: Annotated[bool, typer.Option("--straight", help="One replica of every stage.")] = False,
    profile_out: Annotated[Path | None, typer.Option(help="Write the measured profile here.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Draw the predicted timeline.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the predicted timeline as a page.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write it as a Chrome trace.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here, for train.")] = None,
    json: Json = False,
    *,
    options: ProfileOptions,
) -> None:
    """Plan a pipeline for MODEL on these machines: cuts, replicas and weight policy, with the reasons.

    Example: `telltale plan path/to/checkpoint --topology topo.yaml -o plan.json --simulate`
    """
    machines = topology_from(topology, workers, bandwidth)
    measured = profiled(model, options)
    if profile_out is not None:
        measured.profile.save(profile_out)
    planner_options = {
        **({} if cost_model is None else {"cost_model": cost_model}),
        "memory": memory,
        "microbatches": microbatches,
        "recompute": recompute,
        "synchronous": synchronous,
        "stages": stages,
        "straight": straight,
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
    from telltale.train.pipeline.topology import Topology

    if path is not None:
        if workers is not None or bandwidth is not None:
            raise ConfigError("--topology describes the machines; leave out --workers and --bandwidth.")
        return Topology.load(path)
    if workers is None or bandwidth is None:
        raise ConfigError("the machines are missing; give --topology FILE, or --workers N with --bandwidth 10Gbps.")
    # "10Gbps" are bits and "1GBps" bytes; parse_bytes, which minds no case, reads "10Gbit/s" and "1GB/s".
    rate = re.sub(r"(?<=[kKmMgGtT])([bB])ps$", lambda found: "bit/s" if found[1] == "b" else "B/s", bandwidth.strip())
    return Topology.flat(workers, bandwidth=rate)


def write_timeline(timeline: Timeline, *, html: Path | None, trace: Path | None, other: Timeline | None = None) -> None:
    """Write the page and the Chrome trace where options name them."""
    from telltale.train.pipeline.simulation import gantt

    if html is not None:
        gantt.html(timeline, html, other=other)
    if trace is not None:
        timeline.save_chrome_trace(trace)


def timeline_figures(timeline: Timeline) -> dict[str, Any]:
    """Figures of a timeline, for machine output."""
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
    from telltale.train.pipeline.job import tied_across_stages
    from telltale.train.pipeline.planning.planner import plan
    from telltale.train.pipeline.schedule import BY_ROUND

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
    from telltale.train.pipeline.planning.explain import explain

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
    table.add_column("layers", min_width=12, overflow="fold")
    for name in ("replicas", "fwd+bwd\nms", "sync\nms", "cut\nms", "cut\nbytes", "memory\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
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
    if not from_model:
        typer.echo(f"written: {output}", err=True)
        return
    from telltale.train.pipeline.job import minibatches_per_step

    rows = options.batch_size * minibatches_per_step(plan)
    source = f"--model {model}" if Path(model).exists() else f"--preset {model}"
    extra = "".join(
        [
            f" --text {options.text}" if options.text else "",
            " --untie" if options.untie else "",
            " --launch" if plan.processes > 1 else "",
        ]
    )
    typer.echo(
        f"written: {output}. Train with it: telltale train --pipeline {output} {source} --recipe {options.recipe} "
        f"--run-dir runs/mine --set batch_size={rows} --set sequence_length={options.sequence_length} "
        f"--set precision={options.precision}{extra}",
        err=True,
    )


@dataclass(frozen=True)
class Profiled:
    """A profile, and the model that it was measured on; None for a file."""

    profile: Profile
    model: LayeredModel | None


def profiled(model: str, options: ProfileOptions) -> Profiled:
    """The profile in the file ``model``, or that of the checkpoint folder or preset of this name.

    Raises :class:`~telltale.errors.ConfigError` if it is none of them.
    """
    from telltale.models.gguf import is_gguf
    from telltale.models.presets import PRESETS
    from telltale.train.pipeline.profile import Profile

    path = Path(model)
    if path.is_file() and not is_gguf(path):
        return Profiled(Profile.load(path), None)
    if not path.is_dir() and not is_gguf(path) and model not in PRESETS:
        raise ConfigError(
            f"{model!r} is no profile file, no checkpoint folder and no preset; expected one of them (presets: "
            f"{', '.join(PRESETS)})."
        )
    return _measured(model, options)


def _measured(model: str, options: ProfileOptions) -> Profiled:
    import torch

    from telltale.train.layerskip import LayerSkipConfig
    from telltale.train.loop import adamw
    from telltale.train.pipeline.job import layered_for_training
    from telltale.train.pipeline.profiler import profile
    from telltale.train.pipeline.runtime.collectives import untie
    from telltale.train.run_config import TrainConfig

    network, tokens = _network(model, options.text)
    if options.untie:
        untie(network)
    width = options.sequence_length + 1
    most = getattr(network.config, "max_position_embeddings", None)
    if most is not None and width > most:
        raise ConfigError(f"sequence_length={options.sequence_length} is too long; expected at most {most - 1}.")
    layered = layered_for_training(
        network,
        precision=options.precision,
        layerskip=LayerSkipConfig() if options.recipe == "layerskip" else None,
    )
    ids = _minibatch(tokens, network.config.vocab_size, options.batch_size, width)
    config = TrainConfig()
    torch.set_num_threads(options.threads)
    measured = profile(
        layered,
        {"input_ids": ids},
        repeats=options.repeats,
        optimizer=lambda named: adamw([parameter for _, parameter in named], config, learning_rate=0.0),
        threads=options.threads,
    )
    return Profiled(measured, layered)


def _network(model: str, text: Path | None) -> tuple[Any, Any]:
    """The model, and the tokens of ``text`` or None."""
    from telltale.models.gguf import is_gguf
    from telltale.models.loading import load
    from telltale.models.presets import PRESETS, build
    from telltale.tasks.code import CodeCorpus, read_tokens

    if Path(model).is_dir() or is_gguf(model):
        network, tokenizer = load(model, dtype="float32")
        return network, None if text is None else read_tokens(text, tokenizer)
    if text is None:
        return build(model), None
    corpus = CodeCorpus.from_path(text, vocabulary_size=PRESETS[model].vocabulary_size)
    return build(model, vocabulary_size=len(corpus.tokenizer)), corpus.train


def _minibatch(tokens: Any, vocabulary: int, rows: int, width: int) -> Any:
    import torch

    if tokens is None:
        return torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))
    if tokens.numel() < rows * width:
        raise DataError(f"the text has {tokens.numel()} tokens; a minibatch of {rows} x {width} needs more.")
    return tokens[: rows * width].view(rows, width)
