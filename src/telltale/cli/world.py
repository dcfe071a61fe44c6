"""``telltale world``: collect experience, fit a model, plan, evaluate, certify, and verify a bundle.

A world is an id of ``telltale world list``, an id of Gymnasium, or ``file.py:function`` that returns a world, a Gymnasium
environment or a simulator. A model is a folder of ``telltale world fit``, ``oracle``, or ``file.py:function``.
"""

from __future__ import annotations

import json as jsonlib
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Json, Seed, Threads, emit, set_threads, tell
from telltale.cli.world_evolve import evolve, register_registry
from telltale.cli.world_names import (
    ModelName,
    Planner,
    Settings,
    WorldName,
    WorldSettings,
    check_bundle,
    laws_of,
    model_of,
    read_json,
    world_of,
)
from telltale.config import parse_overrides
from telltale.errors import ConfigError
from telltale.runs.progress import ProgressBar

NOT_EARNED = 1
"""Exit code of a certificate that was not earned and of a bundle that does not verify; for continuous integration."""

Horizon = Annotated[int | None, typer.Option(help="Steps to plan ahead. Default: the world's.")]
Mode = Annotated[str, typer.Option(help="What laws do in plans: report, penalise, project, reject, shield.")]
Laws = Annotated[Path | None, typer.Option(help="A YAML file of laws. Default: the world's own.")]
Episodes = Annotated[int, typer.Option(help="Paired starts.")]
Reward = Annotated[str, typer.Option(help="known: the world's function where it has one. learned: the model's.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="World models: fit, plan, and earn a level by a certificate that others can replay.", no_args_is_help=True
    )
    group.command("list")(list_worlds)
    for command in (collect, fit, plan, evaluate, certify, verify, evolve):
        group.command(command.__name__)(command)
    register_registry(group)
    app.add_typer(group, name="world")


def list_worlds(json: Json = False) -> None:
    """List worlds, kinds of model, planners and laws.

    Example: `telltale world list`
    """
    from telltale.world.laws.reading import KINDS
    from telltale.world.models.kinds import kinds
    from telltale.world.planners.planning import PLANNERS
    from telltale.world.worlds.registry import names

    found = {"worlds": names(), "models": [*kinds(), "text"], "planners": list(PLANNERS), "laws": list(KINDS)}
    if json:
        emit(found)
        return
    for title, entries in found.items():
        typer.echo(f"{title}:\n  " + "\n  ".join(entries))
    typer.echo("Any Gymnasium environment with Box observations is a world too: give its id, or file.py:function.")


def collect(
    world: WorldName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the transitions.")],
    steps: Annotated[int, typer.Option(help="Environment steps.")] = 1000,
    hold: Annotated[int, typer.Option(help="Steps for which a random action is held; equations need 10 or more.")] = 1,
    seed: Seed = 0,
    world_set: WorldSettings = None,
    json: Json = False,
) -> None:
    """Collect transitions with random actions.

    Example: `telltale world collect digital/orders --steps 300 -o runs/orders`
    """
    from telltale.runs.files import check_writable
    from telltale.world import collection

    check_writable(out / "transitions.json")
    made = world_of(world, world_set)
    with ProgressBar("collect", steps) as bar:
        data = collection.collect(
            made, steps=steps, hold=hold, seed=seed, progress=lambda done, total: bar.update(done)
        )
    data.save(out)
    tell(
        {"out": str(out), "world": made.id, "transitions": len(data), "episodes": int(data.episodes.max()) + 1},
        as_json=json,
    )


def fit(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="ensemble, mlp, sindy, program, tabular, opponent, text.")
    ],
    world: WorldName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
    data: Annotated[
        Path | None, typer.Option(help="Transitions of collect, or an .npz of arrays. Default: learn by interaction.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Environment steps to learn by interaction with.")] = 1200,
    settings: Settings = None,
    world_set: WorldSettings = None,
    planner: Planner = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit a model on transitions, or let it learn by interaction; a stopped interaction goes on with the same command.

    Example: `telltale world fit ensemble physical/Pendulum-v1 --steps 1200 -o runs/pendulum`
    """
    set_threads(threads)
    from telltale.runs.files import check_writable
    from telltale.world.models.saving import save_model
    from telltale.world.transitions import Transitions

    made, options = world_of(world, world_set), parse_overrides(settings or [])
    check_writable(out / "model.json")
    transitions = None if data is None else Transitions.load(data, world=made.id)
    if transitions is not None and transitions.world != made.id:
        raise ConfigError(
            f"{data} holds transitions of {transitions.world}, not of {made.id}; give the data of that world."
        )
    if kind == "text":
        _fit_text(made, transitions, out, steps, seed, options, json)
        return
    model, transitions = _fitted(kind, made, transitions, out, steps, planner, seed, options)
    about = {
        "world": made.id,
        "transitions": len(transitions),
        "seed": seed,
        "interaction": data is None,
        "options": options,
        "evidence": _evidence(transitions),
    }
    identity = save_model(model, out, about=about)
    explanation = model.explain() if hasattr(model, "explain") else None
    tell({"out": str(out), "kind": kind, "id": identity, "transitions": len(transitions)}, as_json=json)
    if explanation and not json:
        typer.echo(explanation)


def _fitted(
    kind: str,
    made: Any,
    transitions: Any,
    out: Path,
    steps: int,
    planner: str | None,
    seed: int,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """The model, and the transitions that it was fitted on: those given, or learned by interaction."""
    from telltale.runs.files import write_json
    from telltale.world import collection
    from telltale.world.models.kinds import check_kind
    from telltale.world.models.kinds import fit as fit_model
    from telltale.world.transitions import Transitions

    check_kind(kind)
    if transitions is not None:
        return fit_model(kind, transitions, world=made, seed=seed, **options), transitions
    kept, settings = out.parent / f"{out.name}.transitions", out.parent / f"{out.name}.transitions.json"
    asked = {
        "task": made.task_hash(),
        "kind": kind,
        "steps": steps,
        "planner": planner,
        "seed": seed,
        "options": options,
    }
    done = None
    # what another command left is of no use to this one
    if kept.exists() and settings.is_file() and read_json(settings) == jsonlib.loads(jsonlib.dumps(asked)):
        done = Transitions.load(kept)
    write_json(settings, asked)

    def keep(model: Any, found: Any) -> None:
        found.save(kept)

    with ProgressBar("learn", steps) as bar:
        return collection.learn(
            made, kind, steps=steps, planner=planner, seed=seed, done=done,
            progress=lambda done, total: bar.update(done), each_round=keep, **options,
        )  # fmt: skip


def _fit_text(
    made: Any, transitions: Any, out: Path, steps: int, seed: int, options: dict[str, Any], as_json: bool
) -> None:
    from telltale.cli.world_text import fit_text
    from telltale.world.collection import collect as collect_transitions

    if transitions is None:
        transitions = collect_transitions(made, steps=steps, seed=seed)
    about = fit_text(transitions, made, out, seed=seed, settings=options)
    tell({"out": str(out), "kind": "text", **about}, as_json=as_json)


def _evidence(transitions: Any) -> list[str]:
    """Short ids of what a model was fitted on, for a certificate to refuse as held-out data."""
    return [name[:16] for name in transitions.ids()]


def plan(
    model: ModelName,
    world: WorldName,
    planner: Planner = None,
    horizon: Horizon = None,
    laws: Laws = None,
    mode: Mode = "project",
    start: Annotated[int, typer.Option(help="Seed of the episode whose first state to plan from.")] = 9000,
    settings: Settings = None,
    world_set: WorldSettings = None,
    reward: Reward = "known",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Plan from the first state of an episode, and print the actions.

    Example: `telltale world plan runs/orders-program digital/orders --mode shield`
    """
    from telltale.world.planners.planning import kind_of
    from telltale.world.planners.planning import plan as make_plan
    from telltale.world.protocol import adapt

    made = world_of(world, world_set)
    chosen = model_of(model, made)
    if kind_of(made) == "policy":
        raise ConfigError(f"{made.id} is a game, whose plan is a policy; use telltale world evaluate.")
    first = made.belief(made.reset(start))
    belief = adapt(chosen).infer(first if made.plain else first.unsqueeze(0))
    found = make_plan(
        chosen, made, belief, planner=planner, horizon=horizon, laws=laws_of(laws, made), mode=mode, reward=reward, seed=seed,
        **parse_overrides(settings or []),
    )  # fmt: skip
    actions = found.actions[0] if isinstance(found.actions, list) else found.actions[0].tolist()
    names = getattr(made, "action_names", None)
    document = {
        "world": made.id, "start": start, "actions": [names[a] for a in actions] if names else actions,
        "value": float(found.value[0]), "found": found.found[0] if found.found else None, "model_steps": found.steps,
    }  # fmt: skip
    tell(document, as_json=json)


def evaluate(
    model: ModelName,
    world: WorldName,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the bundle.")] = None,
    planner: Planner = None,
    episodes: Episodes = 30,
    horizon: Horizon = None,
    laws: Laws = None,
    mode: Mode = "project",
    reward: Reward = "known",
    settings: Settings = None,
    world_set: WorldSettings = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Let a planner act through the model on the real engine; write a bundle that others can replay. With `-o`, a stopped
    evaluation goes on with the same command.

    Example: `telltale world evaluate runs/pendulum physical/Pendulum-v1 -o runs/pendulum-bundle`
    """
    set_threads(threads)
    from telltale.world import evaluation

    made, kept = world_of(world, world_set), _kept(out)
    chosen = model_of(model, made)
    with ProgressBar("evaluate", episodes, unit="episode") as bar:
        found = evaluation.evaluate(
            chosen, made, planner=planner, episodes=episodes, horizon=horizon, laws=laws_of(laws, made), mode=mode,
            reward=reward, seed=seed, kept=kept,
            progress=lambda done, total: bar.update(done), **parse_overrides(settings or []),
        )  # fmt: skip
    if out is not None:
        found.save(out, model=chosen)
        _forget(kept)
    tell({**found.summary(), "bundle": None if out is None else str(out)}, as_json=json)


def certify(
    model: ModelName,
    world: WorldName,
    level: Annotated[int, typer.Option(help="1: one-step prediction. 2: a simulator to plan in.")] = 2,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the bundle, with card and page.")] = None,
    planner: Planner = None,
    episodes: Episodes = 30,
    horizon: Horizon = None,
    laws: Laws = None,
    mode: Mode = "project",
    reward: Reward = "known",
    held_out: Annotated[
        Path | None, typer.Option(help="Transitions that the model was not fitted on. Default: random ones.")
    ] = None,
    settings: Settings = None,
    world_set: WorldSettings = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Test whether the model earns a level; exit code 1 if it does not. With `-o`, a stopped test goes on with the same command.

    Example: `telltale world certify runs/pendulum physical/Pendulum-v1 --level 2 -o runs/pendulum-certificate`
    """
    set_threads(threads)
    from telltale.world.certificate import certify as test
    from telltale.world.transitions import Transitions

    if out is not None and level == 1:
        raise ConfigError("--out keeps the episodes of level 2; level 1 has none. Leave it out, or certify level 2.")
    made, kept = world_of(world, world_set), _kept(out)
    chosen = model_of(model, made)
    evidence = None if held_out is None else Transitions.load(held_out, world=made.id)
    if evidence is not None:
        _check_held_out(model, evidence, held_out)
    arms = 2 if made.oracle() is not None else 1
    with ProgressBar("certify", arms * episodes, unit="episode") as bar:
        found = test(
            chosen, made, level, planner=planner, episodes=episodes, horizon=horizon, laws=laws_of(laws, made), mode=mode,
            reward=reward, held_out=evidence, seed=seed, resume=kept,
            progress=lambda stage, done, total: bar.update(done + (total if stage == "oracle" else 0), stage),
            **parse_overrides(settings or []),
        )  # fmt: skip
    written = out if found.evaluation is not None else None
    if written is not None:
        found.save(written, model=chosen)
    _forget(kept)
    if json:
        emit({**found.summary(), "bundle": None if written is None else str(written)})
    else:
        for name, condition in found.conditions.items():
            typer.echo(f"level {condition.level}  {name:<12} {condition.status:<13} {condition.reason}")
        typer.echo(
            f"{found.model} in {found.world}: level {found.level}"
            + ("" if found.passed else f", level {level} not earned")
        )
        if out is not None:
            typer.echo(f"bundle: {written or 'none, since nothing could be planned in the model'}")
    if not found.passed:
        raise typer.Exit(NOT_EARNED)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder of evaluate or certify.")],
    world: Annotated[
        str | None, typer.Option(help="file.py:function, for a world that the bundle cannot rebuild.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a bundle: hashes, statistics computed again, every episode replayed on the engine; exit code 1 if it differs.

    Example: `telltale world verify runs/pendulum-bundle`
    """
    from telltale.world.evolve.life_bundle import is_life, verify_life
    from telltale.world.verification import verify as check

    chosen = verify_life if is_life(bundle) else check
    found = chosen(bundle, world=None if world is None else world_of(world, None))
    if json:
        emit(found.summary())
    else:
        for finding in found.findings:
            typer.echo(f"{finding.file}: {finding.problem}")
        typer.echo(f"{bundle}: {'as it says' if found.ok else 'not what it says'}; {found.replay}")
    if not found.ok:
        raise typer.Exit(NOT_EARNED)


def _check_held_out(model: str, evidence: Any, path: Path | None) -> None:
    """Raise :class:`~telltale.errors.ConfigError` if the model's folder says that it was fitted on one of the transitions."""
    file = Path(model) / "model.json"
    if evidence.plain or not file.is_file():
        return
    known = set(read_json(file).get("about", {}).get("evidence", []))
    for number, name in enumerate(_evidence(evidence)):
        if name in known:
            raise ConfigError(
                f"transition {number} of {path} was fitted on by {model}; give transitions that were not."
            )


def _kept(out: Path | None) -> Path | None:
    """Where finished episodes of an unfinished command are kept."""
    if out is None:
        return None
    check_bundle(out)
    return out.parent / f"{out.name}.partial"


def _forget(kept: Path | None) -> None:
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
