"""Scenes of handwritten digits among fragments, with one question that needs all of them: which digit is the largest?

Three digits of scikit-learn's ``load_digits`` (8 x 8 pixels) lie on a dark canvas beside pieces of other digits and under
noise. The answer is one label, 0 to 9, and no digit alone settles it, so that a few patches have to cover several places.
Digits for training and for testing are different people's strokes: the two splits share no image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from telltale.config import check_choice, check_integer, check_range, check_seed
from telltale.errors import MissingExtraError
from telltale.runs.files import atomic_directory

SIDE = 8
"""Pixels of a digit's side."""
CLASSES = 10
TRAIN_SHARE = 2 / 3
SPLITS = ("train", "test")


@dataclass(frozen=True)
class SceneConfig:
    """What a scene is made of.

    size: pixels of the square canvas, a multiple of ``grid``. digits: whole digits. fragments: 4 x 4 pieces of other digits.
    noise: standard deviation of the noise, as a share of full brightness. grid: places are multiples of it, pixels.
    """

    size: int = 32
    digits: int = 3
    fragments: int = 6
    noise: float = 0.06
    grid: int = 4

    def __post_init__(self) -> None:
        check_integer("grid", self.grid, low=1, high=SIDE)
        check_integer("size", self.size, low=2 * SIDE, high=512)
        check_integer("digits", self.digits, low=1, high=(self.size // (2 * SIDE)) ** 2)
        check_integer("fragments", self.fragments, low=0, high=64)
        check_range("noise", self.noise, low=0.0, high=1.0)
        check_choice("size modulo grid", self.size % self.grid, [0])


def scenes(
    count: int, *, split: str = "train", seed: int = 0, config: SceneConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` scenes: images (count, size, size, 3) uint8 and labels (count,) int64, the largest digit of each scene.

    Labels are uniform over 0..9: the largest digit is drawn first, the others up to it. The same seed gives the same scenes.
    """
    config = config or SceneConfig()
    check_integer("count", count, low=1)
    check_choice("split", split, SPLITS)
    check_seed(seed)
    generator = np.random.default_rng([seed, SPLITS.index(split)])
    images = np.empty((count, config.size, config.size, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, count)
    for image, label in zip(images, labels, strict=True):
        image[:] = _scene(int(label), config, split, generator)[..., None]
    return images, labels


def batches(
    size: int, *, split: str = "train", seed: int = 0, config: SceneConfig | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of ``size`` fresh scenes, each as :func:`scenes` returns them."""
    number = 0
    while True:
        yield scenes(size, split=split, seed=(seed * 1_000_003 + number) % 2**62, config=config)
        number += 1


def write_folder(
    path: str | Path, count: int, *, split: str = "test", seed: int = 0, config: SceneConfig | None = None
) -> Path:
    """Write ``count`` scenes as PNG files, one subfolder per label, whole or not at all; returns the folder."""
    from PIL import Image

    images, labels = scenes(count, split=split, seed=seed, config=config)
    with atomic_directory(path) as aside:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = aside / str(label)
            folder.mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:05d}.png")
    return Path(path)


def check(answer: int | str, label: int) -> bool:
    """Whether ``answer`` names the largest digit."""
    return str(answer).strip() == str(label)


def _scene(label: int, config: SceneConfig, split: str, generator: np.random.Generator) -> np.ndarray:
    pools = _digits(split)
    canvas = np.zeros((config.size, config.size))
    places = _places(config, generator)
    values = [label, *generator.integers(0, label + 1, config.digits - 1)]
    for value, (top, left) in zip(values, places, strict=True):
        canvas[top : top + SIDE, left : left + SIDE] = _any_of(pools[value], generator)
    free = canvas == 0
    half = SIDE // 2
    for _ in range(config.fragments):
        top, left = generator.integers(0, config.size - half + 1, 2)
        rows, columns = generator.integers(0, SIDE - half + 1, 2)
        piece = _any_of(pools[int(generator.integers(CLASSES))], generator)[
            rows : rows + half, columns : columns + half
        ]
        if _apart(int(top), int(left), places):
            canvas[top : top + half, left : left + half] = piece
    canvas += generator.normal(0.0, config.noise, canvas.shape) * np.where(free, 1.0, 0.5)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)


def _places(config: SceneConfig, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Corners (top, left) of digits that do not touch, drawn uniformly among those that fit and on the grid."""
    steps = (config.size - SIDE) // config.grid + 1
    places: list[tuple[int, int]] = []
    while len(places) < config.digits:
        top, left = (config.grid * generator.integers(0, steps, 2)).tolist()
        if all(abs(top - row) >= SIDE or abs(left - column) >= SIDE for row, column in places):
            places.append((top, left))
        elif generator.random() < 0.01:
            places.clear()
    return places


def _apart(top: int, left: int, places: list[tuple[int, int]]) -> bool:
    half = SIDE // 2
    return all(
        top + half <= row or top >= row + SIDE or left + half <= column or left >= column + SIDE
        for row, column in places
    )


def _any_of(pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return pool[generator.integers(len(pool))]


@cache
def _digits(split: str) -> list[np.ndarray]:
    """The split's digits by class, each (n, 8, 8) with brightness 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scenes are made of scikit-learn's digits: pip install 'telltale[edge]'") from error
    bundle: Any = load_digits()
    pools = []
    for label in range(CLASSES):
        found = bundle.images[bundle.target == label] / 16.0
        border = round(len(found) * TRAIN_SHARE)
        pools.append(found[:border] if split == "train" else found[border:])
    return pools
