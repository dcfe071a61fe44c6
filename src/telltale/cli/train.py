"""``telltale train``: a model on the user's text, from scratch or from a checkpoint, with the LayerSkip recipe or plainly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import (
    INTERRUPTED,
    LAUNCH,
    Json,
    Threads,
    emit,
    is_first_rank,
    require_ranks,
    restarted,
    set_threads,
    under_torchrun,
)
from telltale.config import check_choice, check_integer, parse_overrides, read_yaml, unknown_key
from telltale.errors import ConfigError

if TYPE_CHECKING:
    from telltale.train.layerskip import LayerSkipConfig
    from telltale.train.loop import TrainResult
    from telltale.train.pipeline.plan import Plan
    from telltale.train.run_config import TrainConfig


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train_command)


def train_command(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Option(help="Where metrics, checkpoints and the model go.")],
    text: Annotated[
        Path | None, typer.Option(help="A file or folder of text. Default: Python's standard library.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A local checkpoint to fine-tune, with its tokenizer.")] = None,
    preset: Annotated[str, typer.Option(help="A small model to train from scratch (see telltale list).")] = "tiny",
    recipe: Annotated[str, typer.Option(help="layerskip or none.")] = "layerskip",
    config: Annotated[Path | None, typer.Option(help="YAML with the sections train and layerskip.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, of either section; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --run-dir.")] = False,
    pipeline: Annotated[Path | None, typer.Option(help="A plan of telltale plan: train as a pipeline.")] = None,
    stages: Annotated[
        int | None, typer.Option(help="Without a plan: a straight pipeline of so many even stages under flush.")
    ] = None,
    own_stage: Annotated[
        bool, typer.Option("--own-stage", help="With a pipeline and --model: every rank reads its own stage alone.")
    ] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head weights of its own.")] = False,
    sharpness: Annotated[
        bool, typer.Option("--sharpness", help="Read the edge of stability on the way; see telltale sharpness report.")
    ] = False,
    launch: Annotated[bool, typer.Option(LAUNCH, help="With a pipeline: start torchrun on this machine.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Default: the config's, or 0.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a model; Ctrl-C saves, `--resume` goes on with the same loss curve. Under torchrun it is data-parallel, or the
    pipeline of a plan.

    Example: `telltale train --run-dir runs/mine --text my_project/ --set steps=400 --set layerskip.p_max=0.2`
    """
    check_choice("recipe", recipe, ("layerskip", "none"))
    set_threads(threads)
    from telltale.models.presets import PRESETS
    from telltale.train.pipeline.runtime.collectives import untie as give_own_weights

    check_choice("preset", preset, PRESETS)
    sections = _sections(config, set_ or [], seed, preset if model is None else None)
    train_config, layerskip_config = _configs(sections, recipe, from_scratch=model is None)
    cut = pipeline is not None or stages is not None
    _check_pipeline_options(cut, model, sharpness=sharpness, launch=launch, own_stage=own_stage, untie=untie)
    plan = _plan(pipeline, stages, model, preset, train_config.batch_size)
    if plan is not None:
        _before_ranks(context, plan, train_config, layerskip_config, model, preset, untie=untie, launch=launch)
    network, corpus = _network_and_corpus(model, preset, text, train_config.seed, own_stage=own_stage)
    if untie:
        give_own_weights(network)
    options = {"run_dir": run_dir, "layerskip": layerskip_config, "tokenizer": corpus.tokenizer, "resume": resume}
    if plan is not None:
        options["weights"] = model if own_stage else None
        result = _train_as_pipeline(network, corpus, train_config, plan, options)
    else:
        from telltale.train.loop import train

        result = train(network, corpus, train_config, **options, callbacks=_callbacks(train_config, run_dir, sharpness))
    if plan is None or is_first_rank():
        _report(result, json=json)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _callbacks(config: TrainConfig, run_dir: Path, sharpness: bool) -> list[Any]:
    from telltale.train.display import LiveDisplay
    from telltale.train.sharpness.callbacks import SharpnessCallback
    from telltale.train.sharpness.sharpness_report import one_line

    display = LiveDisplay(config.steps)
    if not sharpness:
        return [display]
    monitor = SharpnessCallback(
        run_dir=run_dir,
        sd_every="auto",
        on_reading=[lambda reading: display.bar.console.print(one_line(reading), highlight=False)],
    )
    return [display, monitor]


def _plan(path: Path | None, stages: int | None, checkpoint: Path | None, preset: str, batch_size: int) -> Plan | None:
    """The plan of ``--pipeline``, or that of ``--stages``; None: no pipeline."""
    from telltale.train.pipeline.job import straight_plan
    from telltale.train.pipeline.plan import Plan
    from telltale.train.pipeline.split import split

    if stages is None:
        return None if path is None else Plan.load(path)
    if path is not None:
        raise ConfigError("--pipeline and --stages were both given; expected a plan, or a number of stages.")
    check_integer("stages", stages, low=1)
    return straight_plan(len(split(_skeleton(checkpoint, preset)).layers), stages, batch_size)


def _check_pipeline_options(
    cut: bool, checkpoint: Path | None, *, sharpness: bool, launch: bool, own_stage: bool, untie: bool
) -> None:
    if sharpness and cut:
        raise ConfigError("--sharpness reads whole weights, a pipeline's are cut up; leave out one of the two.")
    if launch and not cut:
        raise ConfigError("--launch starts the processes of a plan; give --pipeline plan.json or --stages with it.")
    if own_stage and (not cut or checkpoint is None):
        raise ConfigError("--own-stage reads single stages of a checkpoint; give --model, and --pipeline or --stages.")
    if own_stage and untie:
        raise ConfigError("--own-stage has no weights yet to untie; leave out one of --own-stage and --untie.")


def _before_ranks(
    context: typer.Context,
    plan: Plan,
    config: TrainConfig,
    layerskip: LayerSkipConfig | None,
    checkpoint: Path | None,
    preset: str,
    *,
    untie: bool,
    launch: bool,
) -> None:
    """Outside of torchrun: refuse what cannot work, then launch or say what to type. A plan of one worker needs neither."""
    from telltale.train.pipeline.job import check_job, layered_for_training, minibatches_per_step
    from telltale.train.pipeline.runtime.collectives import untie as give_own_weights

    if under_torchrun():
        return
    skeleton = _skeleton(checkpoint, preset)
    if untie:
        give_own_weights(skeleton)
    if layerskip is not None:
        layerskip = dataclasses.replace(layerskip, total_steps=layerskip.total_steps or config.steps)
    layered = layered_for_training(
        skeleton, precision=config.precision, layerskip=layerskip, per_step=minibatches_per_step(plan)
    )
    check_job(layered, plan, config)
    if plan.processes > 1:
        require_ranks(context, plan.processes, launch=launch)


def _skeleton(checkpoint: Path | None, preset: str) -> Any:
    """A model of the right shape without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from telltale.models.loading import load_config
    from telltale.models.presets import build

    with torch.device("meta"):
        return build(preset) if checkpoint is None else AutoModelForCausalLM.from_config(load_config(checkpoint))


def _network_and_corpus(
    checkpoint: Path | None, preset: str, text: Path | None, seed: int, *, own_stage: bool
) -> tuple[Any, Any]:
    """The model to train (without weights for ``own_stage``) and its text; a preset's vocabulary is the one that was fitted to the
    text."""
    from telltale.models.loading import check_fit, load, load_tokenizer
    from telltale.models.presets import PRESETS, build
    from telltale.tasks.code import CodeCorpus

    network, tokenizer = None, None
    if checkpoint is not None and own_stage:
        from telltale.train.pipeline.stage_weights import without_weights

        network, tokenizer = without_weights(checkpoint), load_tokenizer(checkpoint)
        check_fit(tokenizer, network, checkpoint)
    elif checkpoint is not None:
        network, tokenizer = load(checkpoint, dtype="float32")
    size = PRESETS[preset].vocabulary_size
    if text is None:
        corpus = CodeCorpus.from_standard_library(tokenizer=tokenizer, vocabulary_size=size)
    else:
        corpus = CodeCorpus.from_path(text, tokenizer=tokenizer, vocabulary_size=size)
    if network is None:
        network = build(preset, vocabulary_size=len(corpus.tokenizer), seed=seed)
    return network, corpus


def _train_as_pipeline(
    network: Any, corpus: Any, config: TrainConfig, plan: Plan, options: dict[str, Any]
) -> TrainResult:
    import torch.distributed as dist

    from telltale.train.display import LiveWatcher
    from telltale.train.pipeline.job import train_pipeline

    options["resume"] = options["resume"] or restarted()
    watcher = LiveWatcher(config.steps) if is_first_rank() else None
    result = train_pipeline(network, corpus, config, plan, **options, watcher=watcher)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _sections(
    config: Path | None, overrides: list[str], seed: int | None, preset: str | None
) -> dict[str, dict[str, Any]]:
    """The two configs as mappings: defaults of the preset, then the YAML file, then ``--set``."""
    from telltale.models.presets import PRESETS
    from telltale.train.layerskip import LayerSkipConfig
    from telltale.train.run_config import TrainConfig

    kinds = {"train": TrainConfig, "layerskip": LayerSkipConfig}
    names = {section: [field.name for field in dataclasses.fields(kind)] for section, kind in kinds.items()}
    sections: dict[str, dict[str, Any]] = {"train": {}, "layerskip": {}}
    if preset is not None:
        sections["train"]["learning_rate"] = PRESETS[preset].learning_rate
    given = read_yaml(config) if config is not None else {}
    for section, values in given.items():
        if section not in kinds or not isinstance(values, dict):
            raise ConfigError(f"config file {config} has {section!r}; expected the sections train and layerskip.")
        sections[section] |= values
    if seed is not None:
        for values in sections.values():
            values["seed"] = seed
    for key, value in parse_overrides(overrides).items():
        section, dot, field = key.partition(".")
        if dot and section in kinds:
            sections[section][field] = value
            continue
        owners = [section for section in kinds if key in names[section] and key != "seed"]
        if key == "seed":
            owners = ["train", "layerskip"]
        if not owners:
            raise ConfigError(unknown_key(key, [*names["train"], *names["layerskip"]]))
        for section in owners:
            sections[section][key] = value
    return sections


def _configs(sections: dict[str, dict[str, Any]], recipe: str, *, from_scratch: bool) -> tuple[Any, Any]:
    from telltale.train.layerskip import LayerSkipConfig
    from telltale.train.run_config import TrainConfig

    if from_scratch:
        sections["layerskip"].setdefault("time_schedule", "exp")
    else:
        sections["train"].setdefault("learning_rate", 2e-4)
    train_config = TrainConfig.from_dict(sections["train"])
    return train_config, LayerSkipConfig.from_dict(sections["layerskip"]) if recipe == "layerskip" else None


def _report(result: Any, *, json: bool) -> None:
    if json:
        emit(
            {
                "finished": result.finished,
                "step": result.step,
                "run_dir": str(result.run_path),
                "model": str(result.model_path) if result.model_path else None,
                "seconds": round(result.seconds, 1),
                "held_out_losses": result.quality.losses if result.quality else None,
                "agreement": result.quality.agreement if result.quality else None,
            }
        )
    elif result.finished:
        typer.echo(f"trained to step {result.step}; the model is in {result.model_path}", err=True)
    else:
        typer.echo(f"stopped and saved at step {result.step}; add --resume to go on", err=True)
