"""Edge and server models for the accuracy figures of SAGE: trained once, in pieces, and kept in a folder outside the repository.

Digit scenes and CIFAR-10 (a local folder of images, ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``), three edge seeds and
two server seeds each, and one CIFAR-10 server trained on random subsets. ``--seconds`` stops after that long with exit code 3;
the next call goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from telltale.edge.training import Batches, ClassifierConfig, ClassifierTraining
from telltale.tasks import scenes

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SCENE = {"mean": 0.1, "std": 0.3}
CIFAR = {"labels": CIFAR_CLASSES, "mean": 0.47, "std": 0.25}
SCENE_POOL = 40_000
"""Scenes that are drawn once for all models: drawing fresh ones costs as much as a step."""


def configs() -> dict[str, ClassifierConfig]:
    """Every model by name, the cheapest data set first; servers are wider, deeper and trained longer than edges."""
    found: dict[str, ClassifierConfig] = {}
    for seed in range(3):
        found[f"scenes-edge-{seed}"] = ClassifierConfig(width=48, layers=2, steps=350, seed=seed, **SCENE)
    for seed in range(2):
        found[f"scenes-server-{seed}"] = ClassifierConfig(width=64, layers=4, steps=800, seed=100 + seed, **SCENE)
    seen = {"width": 32, "layers": 2, "batch_size": 64, "learning_rate": 3e-3, **CIFAR}
    for seed in range(3):
        found[f"cifar-edge-{seed}"] = ClassifierConfig(steps=1500, seed=seed, **seen)
    served = {"width": 64, "layers": 4, "batch_size": 64, "learning_rate": 2e-3, **CIFAR}
    for seed in range(2):
        found[f"cifar-server-{seed}"] = ClassifierConfig(steps=3000, seed=100 + seed, **served)
    found["cifar-server-subsets"] = ClassifierConfig(steps=1500, seed=110, dropped=0.9, **served)
    return found


def cifar(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's images (n, 32, 32, 3) uint8 and labels (n,), kept as one .npz beside the folder."""
    packed = folder / f"{split}.npz"
    if not packed.exists():
        from PIL import Image

        files = [
            (path, label)
            for label, name in enumerate(CIFAR_CLASSES)
            for path in sorted((folder / split / name).glob("*.jpg"))
        ]
        images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
        aside = folder / f".{split}.npz"
        with aside.open("wb") as stream:
            np.savez(stream, images=images, labels=np.array([label for _, label in files]))
        aside.replace(packed)
    with np.load(packed) as kept:
        return kept["images"], kept["labels"]


def cifar_batches(folder: Path, config: ClassifierConfig, start: int) -> Batches:
    """Random training images, mirrored with probability 1/2 and shifted by up to 2 pixels; batch ``start`` comes first."""
    images, labels = cifar(folder, "train")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")

    def drawn() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        number = start
        while True:
            generator = np.random.default_rng([config.seed, number])
            chosen = generator.integers(0, len(images), config.batch_size)
            top, left = generator.integers(0, 5, 2)
            batch = padded[chosen, top : top + 32, left : left + 32]
            mirrored = generator.random(config.batch_size) < 0.5
            batch[mirrored] = batch[mirrored, :, ::-1]
            yield np.ascontiguousarray(batch), labels[chosen]
            number += 1

    return drawn()


def scene_batches(cache: Path, config: ClassifierConfig, start: int) -> Batches:
    """Random scenes of the pool; those of one step are the same whenever it is reached."""
    packed = cache / "scenes.npz"
    if not packed.exists():
        images, labels = scenes.scenes(SCENE_POOL, seed=1)
        aside = cache / ".scenes.npz"
        with aside.open("wb") as stream:
            np.savez(stream, images=images[..., 0], labels=labels)
        aside.replace(packed)
    with np.load(packed) as kept:
        images, labels = kept["images"], kept["labels"]

    def drawn() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        number = start
        while True:
            chosen = np.random.default_rng([config.seed, number]).integers(0, len(images), config.batch_size)
            yield np.repeat(images[chosen, ..., None], 3, axis=3), labels[chosen]
            number += 1

    return drawn()


def train(name: str, config: ClassifierConfig, *, cache: Path, folder: Path, seconds: float) -> bool:
    """Go on with one model for ``seconds``; whether it is finished."""
    training = ClassifierTraining(config)
    state = cache / f"{name}.state"
    if state.exists():
        training.restore(torch.load(state))
    start = training.done
    batches = scene_batches(cache, config, start) if name.startswith("scenes") else cifar_batches(folder, config, start)
    losses: list[float] = []
    finished = training.run(batches, seconds=seconds, tell=lambda step, loss: losses.append(loss))
    print(f"{name}: step {training.done} of {config.steps}, loss {np.mean(losses[-50:]):.3f}", flush=True)
    if finished:
        training.save(cache / name)
        state.unlink(missing_ok=True)
    else:
        aside = cache / f".{name}.state"
        torch.save(training.state(), aside)
        aside.replace(state)
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="where models are kept, outside the repository")
    parser.add_argument("--cifar", type=Path, required=True, help="local folder of CIFAR-10 images")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after that long")
    parser.add_argument("--only", default="", help="names that begin so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    for name, config in configs().items():
        if name.startswith(arguments.only) and not (arguments.cache / name).exists():
            seconds = end - time.monotonic()
            if seconds <= 0 or not train(name, config, cache=arguments.cache, folder=arguments.cifar, seconds=seconds):
                sys.exit(3)
            print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
