"""What ``telltale plan`` and ``telltale pipeline profile`` share: a profile read from a file, or measured on MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.configuration import check_choice, check_integer
from telltale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from telltale.train.pipeline.layered import LayeredModel
    from telltale.train.pipeline.profiling.profile import Profile

Model = Annotated[
    str, typer.Argument(help="A local checkpoint, a preset's name, or a profile (JSON or the official text format).")
]
BatchSize = Annotated[int, typer.Option(help="Sequences of one minibatch, to profile with.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sequence, to profile with.")]
Text = Annotated[Path | None, typer.Option(help="Text to profile on, as for train. Default: random tokens.")]
Recipe = Annotated[str, typer.Option(help="none or layerskip: what it will be trained with.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16: what it will be trained in.")]
Untie = Annotated[bool, typer.Option("--untie", help="Give a tied head weights of its own, which stash needs.")]
Repeats = Annotated[int, typer.Option(help="Rounds of the profile; medians are taken.")]
Threads = Annotated[int, typer.Option(help="CPU threads per worker. torchrun gives its workers one.")]


@dataclass(frozen=True)
class ProfileOptions:
    """How to profile; checked before anything is loaded."""

    batch_size: int
    sequence_length: int
    text: Path | None
    recipe: str
    precision: str
    untie: bool
    repeats: int
    threads: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats", "threads"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("sequence_length", self.sequence_length, low=2)
        check_choice("recipe", self.recipe, ("none", "layerskip"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))


@dataclass(frozen=True)
class Profiled:
    """A profile, and the model that it was measured on; None for a file."""

    profile: Profile
    model: LayeredModel | None


def profiled(model: str, options: ProfileOptions) -> Profiled:
    """The profile in the file ``model``, or that of the checkpoint folder or preset of this name.

    Raises :class:`~telltale.errors.ConfigError` if it is none of them.
    """
    from telltale.models.presets import PRESETS
    from telltale.train.pipeline.profiling.profile import Profile

    path = Path(model)
    if path.is_file():
        return Profiled(Profile.load(path), None)
    if not path.is_dir() and model not in PRESETS:
        raise ConfigError(
            f"{model!r} is no profile file, no checkpoint folder and no preset; expected one of them (presets: "
            f"{', '.join(PRESETS)})."
        )
    return _measured(model, options)


def _measured(model: str, options: ProfileOptions) -> Profiled:
    import torch

    from telltale.train.config import TrainConfig
    from telltale.train.layerskip import LayerSkipConfig
    from telltale.train.loop import adamw
    from telltale.train.pipeline.preparation import layered_for_training
    from telltale.train.pipeline.profiling.profiler import profile
    from telltale.train.pipeline.runtime.ties import untie

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
    from telltale.models.loading import load
    from telltale.models.presets import PRESETS, build
    from telltale.tasks.code import CodeCorpus, read_tokens

    if Path(model).is_dir():
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
