"""``telltale train``: a model on the user's text, from scratch or from a checkpoint, with the LayerSkip recipe or plainly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli import INTERRUPTED
from telltale.cli.options import Json, Threads, emit, set_threads
from telltale.configuration import check_choice, parse_overrides, read_yaml, unknown_key
from telltale.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train_command)


def train_command(
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
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Default: the config's, or 0.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a model; Ctrl-C saves, `--resume` goes on with the same loss curve. Under torchrun it is data-parallel.

    Example: `telltale train --run-dir runs/mine --text my_project/ --set steps=400 --set layerskip.p_max=0.2`
    """
    check_choice("recipe", recipe, ("layerskip", "none"))
    set_threads(threads)
    from telltale.models.loading import load
    from telltale.models.presets import PRESETS, build
    from telltale.tasks.code import CodeCorpus
    from telltale.train.display import LiveDisplay
    from telltale.train.loop import train

    check_choice("preset", preset, PRESETS)
    sections = _sections(config, set_ or [], seed, preset if model is None else None)
    train_config, layerskip_config = _configs(sections, recipe, from_scratch=model is None)
    if model is not None:
        network, tokenizer = load(model, dtype="float32")
    else:
        network, tokenizer = None, None
    size = PRESETS[preset].vocabulary_size
    if text is None:
        corpus = (
            CodeCorpus.from_standard_library(vocabulary_size=size)
            if tokenizer is None
            else CodeCorpus.from_standard_library(tokenizer=tokenizer)
        )
    else:
        corpus = CodeCorpus.from_path(text, tokenizer=tokenizer, vocabulary_size=size)
    if network is None:
        network = build(preset, vocabulary_size=len(corpus.tokenizer), seed=train_config.seed)
    result = train(
        network,
        corpus,
        train_config,
        run_dir=run_dir,
        layerskip=layerskip_config,
        tokenizer=corpus.tokenizer,
        resume=resume,
        callbacks=[LiveDisplay(train_config.steps)],
    )
    _report(result, json=json)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _sections(
    config: Path | None, overrides: list[str], seed: int | None, preset: str | None
) -> dict[str, dict[str, Any]]:
    """The two configs as mappings: defaults of the preset, then the YAML file, then ``--set``."""
    from telltale.models.presets import PRESETS
    from telltale.train.config import TrainConfig
    from telltale.train.layerskip import LayerSkipConfig

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
    from telltale.train.config import TrainConfig
    from telltale.train.layerskip import LayerSkipConfig

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
