"""``telltale world evolve`` and ``telltale world registry``: a model that revises itself, and the versions that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import INTERRUPTED, Json, Seed, Threads, emit, set_threads, tell
from telltale.cli.world_names import (
    FitSettings,
    LifeSettings,
    ModelName,
    Planner,
    PlannerSettings,
    WorldName,
    WorldSettings,
    check_bundle,
    model_of,
    read_json,
    world_of,
)
from telltale.config import parse_overrides
from telltale.errors import ConfigError

DIFFERS = 1
"""Exit code of a registry that does not verify."""

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of telltale world evolve.")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="An id, or the start of one.")]


def register_registry(group: typer.Typer) -> None:
    """Add the commands of the registry."""
    registry = typer.Typer(
        help="The versions of an evolving model: log, diff, promote, decline, roll back.", no_args_is_help=True
    )
    for command in (log, diff, promote, decline, rollback):
        registry.command(command.__name__)(command)
    group.add_typer(registry, name="registry")


def evolve(
    model: ModelName,
    world: WorldName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the life: registry, evidence, rounds.")],
    budget: Annotated[int, typer.Option(help="Steps of the life's stream; probes and gates come on top.")] = 10_000,
    change: Annotated[
        list[str] | None,
        typer.Option(help="Change the world at a step, STEP:key=value, to rehearse; again for more changes."),
    ] = None,
    approval: Annotated[bool, typer.Option(help="Wait for a person before each promotion.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder for the bundle of the whole life, with card and page.")
    ] = None,
    settings: LifeSettings = None,
    planner_set: PlannerSettings = None,
    fit_set: FitSettings = None,
    planner: Planner = None,
    world_set: WorldSettings = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Let a model act, notice that it is wrong, and replace itself through gates; a stopped life goes on with the same command.

    Example: `telltale world evolve runs/program digital/orders --change 2500:migrated=true --budget 6000 -o runs/life`
    """
    set_threads(threads)
    if bundle is not None:
        _check_apart(bundle, out)
    from telltale.world.worlds.changing import Changing
    from telltale.world.worlds.registry import make

    made = world_of(world, world_set)
    changed = phases(change)
    if changed and ".py:" in world:
        raise ConfigError(
            "--change needs a world by id; build your own telltale.world.worlds.changing.Changing in the file."
        )
    if changed:
        usual = parse_overrides(world_set or [])
        made = Changing([(0, made), *((step, make(world, **{**usual, **given})) for step, given in changed)])
    about = Path(model) / "model.json"
    _check_same_model(about, out)
    known = read_json(about).get("about", {}).get("evidence", []) if about.is_file() else []
    chosen = {} if planner is None else {"planner": planner}
    live(
        model_of(model, made), made, out, budget=budget, settings=parse_overrides(settings or []),
        planner={**chosen, **parse_overrides(planner_set or [])}, options=parse_overrides(fit_set or []), evidence=known,
        approval=approval, out=bundle, seed=seed, as_json=json,
    )  # fmt: skip


def live(
    model: Any,
    world: Any,
    folder: Path,
    *,
    budget: int,
    settings: dict[str, Any],
    planner: dict[str, Any],
    options: dict[str, Any],
    evidence: list[str],
    approval: bool,
    out: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run a life to ``budget`` with a live view; exit code 130 if it was interrupted."""
    from telltale.config import from_mapping
    from telltale.runs.progress import interruptible
    from telltale.world.evolve.evolver import Evolver
    from telltale.world.evolve.gates import GateConfig
    from telltale.world.evolve.life import EvolveConfig
    from telltale.world.evolve.life_bundle import write_life
    from telltale.world.evolve.version_registry import Registry

    gate_fields = GateConfig.__dataclass_fields__
    gate = from_mapping(GateConfig, {k: v for k, v in settings.items() if k in gate_fields})
    config = from_mapping(EvolveConfig, {k: v for k, v in settings.items() if k not in gate_fields})
    evolver = Evolver(
        model, world, Registry(folder, approval=approval), config=config, gate=gate, planner=planner, options=options,
        evidence_of_model=evidence, seed=seed,
    )  # fmt: skip
    with _View(budget, quiet=as_json) as view, interruptible() as stop:
        state = evolver.run(budget, on_round=view.show, interruption=stop)
    written = None if stop.requested else out
    if written is not None:
        write_life(folder, written, world=world)
    document = {
        "folder": str(folder), "world": world.id, "rounds": state.round, "steps": state.steps, "phase": state.phase,
        "active": evolver.registry.active().id, "versions": len(evolver.registry.versions()), "trials": evolver.registry.trials(),
        "probe_steps": state.probe_steps, "gate_steps": state.gate_steps, "bundle": None if written is None else str(written),
    }  # fmt: skip
    tell(document, as_json=as_json)
    if stop.requested:
        raise typer.Exit(INTERRUPTED)


def _check_apart(bundle: Path, folder: Path) -> None:
    """Raise unless a bundle can be written to ``bundle``, beside the life in ``folder``."""
    check_bundle(bundle)
    one, two = bundle.resolve(), folder.resolve()
    if one == two or one in two.parents or two in one.parents:
        raise ConfigError(
            f"--bundle {bundle} and --out {folder} lie in one another; give the bundle a folder of its own."
        )


def _check_same_model(about: Path, folder: Path) -> None:
    """Raise :class:`~telltale.errors.ConfigError` if ``folder`` holds the life of another model than that of ``about``."""
    if not about.is_file() or not (folder / "log").is_dir():
        return
    given, registry = read_json(about), _registry(folder)
    parts = ("kind", "config", "weights")
    for name in registry.versions():
        document = registry.version(name).document
        if all(document[part] == given.get(part) for part in parts):
            return
    raise ConfigError(f"{folder} holds the life of another model than {about.parent}; give a folder of its own.")


class _View:
    """A live table in a terminal; a line a round and an event elsewhere."""

    def __init__(self, budget: int, *, quiet: bool) -> None:
        from rich.console import Console

        self.budget, self.quiet, self.console = budget, quiet, Console(stderr=True)
        self.events: list[tuple[int, str, str]] = []
        self.live: Any = None

    def __enter__(self) -> _View:
        if self.console.is_terminal and not self.quiet:
            from rich.live import Live

            self.live = Live(console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def show(self, done: Any) -> None:
        """One more round."""
        from telltale.world.evolve.life_page import line

        fresh = [(done.number, event["what"], event["words"]) for event in done.events]
        self.events += fresh
        if self.live is not None:
            self.live.update(self._table(done))
        elif not self.quiet:
            for text in (line(done), *(f"    {what}: {words}" for _, what, words in fresh)):
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _table(self, done: Any) -> Any:
        from rich.markup import escape
        from rich.table import Table

        figures = done.figures
        success = f"{figures['success']:.2f}" if "success" in figures else ""
        bar = "#" * min(30, int(2 * figures.get("cusum", 0.0)))
        title = f"step {done.state.steps:,} of {self.budget:,}   version {figures['active'][:8]}   {done.state.phase}"
        table = Table(
            title=title, caption=f"success {success}   CUSUM {figures.get('cusum', 0.0):.1f} {bar}", expand=True
        )
        for column in ("round", "event", "what was found"):
            table.add_column(column)
        for number, what, words in self.events[-12:]:
            table.add_row(str(number), what, escape(words))
        return table

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()


def log(folder: Folder, json: Json = False) -> None:
    """Print the log of versions, receipts, promotions and rollbacks, after checking it; exit code 1 if it does not verify.

    Example: `telltale world registry log runs/life`
    """
    registry = _registry(folder)
    checked = registry.verify()
    if json:
        emit({"entries": registry.log(), "active": registry.active().id, **checked.summary()})
    else:
        for entry in registry.log():
            typer.echo(f"{entry['number']:>4}  {entry['kind']:<9} {_words(entry)}")
        typer.echo(f"active: {registry.active().id}")
        for finding in checked.findings:
            typer.echo(f"{finding.file}: {finding.problem}")
        typer.echo("verified" if checked.ok else "not what was written")
    if not checked.ok:
        raise typer.Exit(DIFFERS)


def diff(folder: Folder, first: VersionName, second: VersionName, json: Json = False) -> None:
    """Print what differs between two versions: rules or equations, weights, code, evidence.

    Example: `telltale world registry diff runs/life 3f2a 9c01`
    """
    found = _registry(folder).diff(first, second)
    if json:
        emit(found)
        return
    for key in ("from", "to", "kind", "weights", "code", "largest_change", "evidence_added", "evidence_removed"):
        if key in found:
            typer.echo(f"{key}: {found[key]}")
    for sign, key in (("-", "removed"), ("+", "added")):
        for text in found[key]:
            typer.echo(f"{sign} {text}")


def promote(
    folder: Folder,
    version: VersionName,
    by: Annotated[str, typer.Option(help="Who approves it; written to the log.")],
    json: Json = False,
) -> None:
    """Approve and promote a version that passed its gate; without such a receipt it is refused.

    Example: `telltale world registry promote runs/life 9c01 --by "R. Franklin"`
    """
    registry = _registry(folder)
    wanted = registry.version(version)
    registry.check(wanted.id)
    if not registry.approved(wanted.id):
        registry.approve(wanted.id, by=by)
    registry.promote(wanted.id)
    tell({"active": registry.active().id, "by": by}, as_json=json)


def decline(
    folder: Folder,
    version: VersionName,
    by: Annotated[str, typer.Option(help="Who declines it; written to the log.")],
    json: Json = False,
) -> None:
    """Say that a version which waits for approval may not act; the life goes on without it.

    Example: `telltale world registry decline runs/life 9c01 --by "R. Franklin"`
    """
    registry = _registry(folder)
    wanted = registry.version(version)
    registry.check(wanted.id)
    registry.decline(wanted.id, by=by)
    tell({"declined": wanted.id, "by": by}, as_json=json)


def rollback(
    folder: Folder,
    to: Annotated[str | None, typer.Option(help="Version to go back to. Default: the one active before.")] = None,
    reason: Annotated[str, typer.Option(help="Written to the log.")] = "asked for",
    json: Json = False,
) -> None:
    """Make an earlier active version active again, bit for bit.

    Example: `telltale world registry rollback runs/life --reason "worse on the night shift"`
    """
    found = _registry(folder).rollback(to=to, reason=reason)
    tell({"active": found.id, "reason": reason}, as_json=json)


def _registry(folder: Path) -> Any:
    from telltale.world.evolve.version_registry import Registry

    if not (folder / "log").is_dir():
        raise ConfigError(f"{folder} holds no registry; give a folder of telltale world evolve.")
    return Registry(folder)


def _words(entry: dict[str, Any]) -> str:
    body = entry["body"]
    name = str(body.get("version", body.get("candidate", "")))[:12]
    if entry["kind"] == "gate":
        failed = [n for n, check in body["checks"].items() if check["status"] == "fail"]
        return f"{name}  trial {body['trial']}: {'passed' if not failed else 'failed ' + ', '.join(failed)}"
    if entry["kind"] == "promote":
        return f"{name}  over {body['from'][:12]}, receipt {body['receipt'][:12]}"
    if entry["kind"] == "rollback":
        return f"{name}  from {body['from'][:12]}: {body['reason']}"
    if entry["kind"] in ("approve", "decline"):
        return f"{name}  by {body['by']}"
    return f"{name}  {body.get('kind', '')}, parent {str(body.get('parent'))[:12]}"


def phases(change: list[str] | None) -> list[tuple[int, dict[str, Any]]]:
    """``STEP:key=value[,key=value]`` as (step, settings). Raises :class:`~telltale.errors.ConfigError` for anything else."""
    found = []
    for item in change or []:
        step, separator, rest = item.partition(":")
        if not separator or not step.strip().isdecimal():
            raise ConfigError(f"change {item!r} is not understood; expected STEP:key=value, such as 3000:gain=-1.")
        found.append((int(step), parse_overrides([part for part in rest.split(",") if part.strip()])))
    return sorted(found, key=lambda pair: pair[0])
