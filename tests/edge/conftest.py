"""A pair of models on digit scenes, trained for seconds, that the tests of audit, sweep, commands and tour share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory):
    from telltale.edge.training import SMALL_EDGE, train_pair

    folder = tmp_path_factory.mktemp("pair")
    small = replace(SMALL_EDGE, steps=80)
    train_pair(folder, edge=small, server=replace(small, width=40, steps=120, seed=7))
    return folder


@pytest.fixture(scope="session")
def pair(pair_folder):
    from telltale.models.vision import load_vision

    return load_vision(pair_folder / "edge"), load_vision(pair_folder / "server")


@pytest.fixture(scope="session")
def scene_images():
    from telltale.edge.images import Images
    from telltale.tasks.scenes import scenes

    pixels, labels = scenes(160, split="test", seed=1)
    return Images(pixels, labels, tuple(Path(f"{number}.png") for number in range(160)))
