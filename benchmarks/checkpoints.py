"""The checkpoints that the benchmarks measure on, trained here if they are not there yet (resumable).

``python benchmarks/checkpoints.py tiny`` trains the four arms of the recipe comparison, three seeds each;
``small`` the 44M-parameter model, ``narrow`` its fine-tuning on one kind of text. They go to ``runs/benchmarks``.
"""

from __future__ import annotations

import argparse
import encodings
from pathlib import Path
from typing import Any

import torch

from telltale.models import load
from telltale.models.presets import PRESETS, build
from telltale.tasks.code import CodeCorpus
from telltale.train import TrainConfig, train
from telltale.train.layerskip import LayerSkipConfig

FOLDER = Path("runs/benchmarks")
ARMS = ("none", "dropout", "exits", "both")
SEEDS = (0, 1, 2)
TINY = TrainConfig(steps=500, learning_rate=3e-3, evaluate_every=100, checkpoint_every=100, data_seed=0)
"""Seeds differ in initial weights and dropout masks; every arm and seed sees the same batches in the same order."""
SMALL = TrainConfig(
    steps=1400, batch_size=8, learning_rate=1e-3, evaluate_every=100, checkpoint_every=50, evaluation_tokens=8192
)

NARROW = TrainConfig(
    steps=300, batch_size=8, learning_rate=5e-4, evaluate_every=50, checkpoint_every=50, evaluation_tokens=4096
)


def recipe(arm: str, *, seed: int = 0, rotation: int = 4) -> LayerSkipConfig | None:
    """The LayerSkip settings of one arm: layer dropout, exit loss, both or neither, as for training from scratch."""
    if arm == "none":
        return None
    return LayerSkipConfig(
        p_max=0.1 if arm in ("dropout", "both") else 0.0,
        e_scale=1.0 if arm in ("exits", "both") else 0.0,
        time_schedule="exp",
        rotation=rotation,
        seed=seed,
    )


def corpus(vocabulary_size: int) -> CodeCorpus:
    """The standard library corpus with a tokenizer of this size, kept between benchmarks."""
    path = FOLDER / f"corpus-{vocabulary_size}"
    if not path.exists():
        CodeCorpus.from_standard_library(vocabulary_size=vocabulary_size).save(path)
    return CodeCorpus.load(path)


def tiny(arm: str, *, seed: int = 0) -> Path:
    """Path of the tiny model (1.7M parameters) trained with ``arm`` of the recipe."""
    return _trained(f"tiny-{arm}-{seed}", "tiny", TINY, recipe(arm, seed=seed), seed)


def small(arm: str = "both") -> Path:
    """Path of the 44M-parameter model trained with the recipe."""
    return _trained(f"small-{arm}-0", "small", SMALL, recipe(arm, rotation=8), 0)


def small_narrow() -> Path:
    """The 44M-parameter model fine-tuned on one narrow kind of text, the standard library's ``encodings`` tables, with the
    recipe of the paper's task fine-tuning (TOPv2: p_max .2, e_scale 1, gradual curriculum, S(t) = 1)."""
    path = FOLDER / "small-narrow-0"
    if not (path / "model").exists():
        model, tokenizer = load(small(), dtype="float32")
        result = train(
            model,
            narrow_corpus(tokenizer),
            NARROW,
            run_dir=path,
            layerskip=LayerSkipConfig(p_max=0.2, e_scale=1.0, curriculum="gradual"),
            tokenizer=tokenizer,
            resume=True,
        )
        if not result.finished:
            raise SystemExit(f"small-narrow-0 was interrupted at step {result.step}; run the command again to go on.")
    return path / "model"


def narrow_corpus(tokenizer: Any) -> CodeCorpus:
    """The ``encodings`` package of the standard library: a hundred files of character tables."""
    return CodeCorpus.from_path(Path(encodings.__file__).parent, tokenizer=tokenizer, held_out_fraction=0.1)


def _trained(name: str, preset: str, config: TrainConfig, layerskip: LayerSkipConfig | None, seed: int) -> Path:
    path = FOLDER / name
    if not (path / "model").exists():
        data = corpus(PRESETS[preset].vocabulary_size)
        settings = TrainConfig.from_dict(config.to_dict() | {"seed": seed})
        model = build(preset, vocabulary_size=len(data.tokenizer), seed=seed)
        result = train(model, data, settings, run_dir=path, layerskip=layerskip, tokenizer=data.tokenizer, resume=True)
        if not result.finished:
            raise SystemExit(f"{name} was interrupted at step {result.step}; run the command again to go on.")
        assert result.quality is not None
        print(name, f"{result.seconds:.0f} s", [round(loss, 3) for loss in result.quality.losses], flush=True)
    return path / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("tiny", "small", "narrow"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.which != "tiny":
        small() if arguments.which == "small" else small_narrow()
        return
    for seed in SEEDS:
        for arm in reversed(ARMS):
            tiny(arm, seed=seed)


if __name__ == "__main__":
    main()
