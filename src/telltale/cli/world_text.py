"""The text model of ``telltale world``: a byte-level language model trained on transitions, read by telltale's own decoder.

The world wing takes any function from prompts to completions and imports no decoder; this file is where the two meet. A checkpoint
of ``telltale train``, or any Hugging Face folder or GGUF file, is a text model as well.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from telltale.cli.options import INTERRUPTED
from telltale.config import from_mapping, unknown_key
from telltale.errors import ConfigError

if TYPE_CHECKING:
    from telltale.world.models.text import TextModel
    from telltale.world.transitions import Transitions

ABOUT = "world.json"
DEFAULTS: dict[str, Any] = {"steps": 800, "sequence_length": 256, "precision": "float32", "evaluate_every": 400}


def is_language_model(path: Path) -> bool:
    """A Hugging Face folder or a GGUF file, and not one of ``telltale world fit``."""
    return path.suffix == ".gguf" or ((path / "config.json").is_file() and not (path / "model.json").is_file())


def open_text_model(path: Path, world: Any) -> TextModel:
    """The language model of ``path`` as a world model of ``world``, decoded greedily.

    Raises :class:`~telltale.errors.ConfigError` for a world whose states are not text, and what ``telltale.load`` raises.
    """
    from telltale import load
    from telltale.decode import Autoregressive
    from telltale.world.models.text import TextModel

    columns, actions = _names(world)
    model, tokenizer = load(path)
    decoder = Autoregressive(model)
    longest = 8 * len(columns) + 8
    end = tokenizer.eos_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    start = [] if first is None else [first]

    def generate(prompts: Sequence[str]) -> list[str]:
        answers = []
        for prompt in prompts:
            # a line stands where a text begins: after the tokenizer's first token, else after the end of another text
            ids = [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            made = decoder.generate(
                [ids],
                max_new_tokens=longest,
                eos_token_id=[] if end is None else end,
                stop_strings="\n",
                tokenizer=tokenizer,
            )
            answers.append(tokenizer.decode(made.tokens[0, : int(made.lengths[0])], skip_special_tokens=True))
        return answers

    return TextModel(generate, columns=columns, actions=actions)


def fit_text(transitions: Transitions, world: Any, out: Path, *, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a byte-level model from scratch, one line per transition, and leave a Hugging Face folder at ``out``.

    ``settings``: ``preset`` (nano), and fields of the training configuration. A stopped training goes on with the same command.
    """
    from telltale.models.presets import PRESETS, build
    from telltale.tasks.code import CodeCorpus
    from telltale.train.display import LiveDisplay
    from telltale.train.loop import train
    from telltale.train.run_config import TrainConfig
    from telltale.world.models.text import corpus

    _, actions = _names(world)
    preset = settings.pop("preset", "nano")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in settings:
        if key not in names:
            raise ConfigError(unknown_key(key, ["preset", *names]))
    lines = corpus(transitions, actions).splitlines()
    held = max(1, len(lines) // 20)
    text = CodeCorpus.from_texts(lines[:-held], lines[-held:], source="transitions", vocabulary_size=257)
    model = build(preset, vocabulary_size=len(text.tokenizer), seed=seed)
    fields = {"learning_rate": PRESETS[preset].learning_rate, "seed": seed, **DEFAULTS, **settings}
    fields["sequence_length"] = min(fields["sequence_length"], len(text.train) - 1, len(text.held_out) - 1)
    config = from_mapping(TrainConfig, fields)
    run = out.parent / f"{out.name}.training"
    result = train(
        model, text, config, run_dir=run, tokenizer=text.tokenizer, resume=True, callbacks=[LiveDisplay(config.steps)]
    )
    if not result.finished or result.model_path is None:
        raise typer.Exit(INTERRUPTED)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(result.model_path, out)
    shutil.rmtree(run)
    about = {"world": world.id, "transitions": len(transitions), "seed": seed, "options": settings}
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return about


def _names(world: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    columns, actions = tuple(world.columns), tuple(getattr(world, "action_names", ()))
    if not world.plain or not columns or not actions:
        raise ConfigError(
            f"{world.id} has no states of named integers and named actions, which a text model writes; use digital/orders or "
            f"digital/files, or a world of your own with columns and action_names."
        )
    return columns, actions
