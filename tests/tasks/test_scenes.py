import numpy as np
import pytest

from telltale.errors import ConfigError
from telltale.tasks.scenes import SceneConfig, batches, check, scenes, write_folder


def test_scenes_are_reproducible_and_balanced():
    images, labels = scenes(400, seed=3)
    again, same = scenes(400, seed=3)
    assert (images == again).all()
    assert (labels == same).all()
    assert images.shape == (400, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).min() > 15
    other, _ = scenes(400, seed=4)
    assert (images != other).any()
    test, _ = scenes(400, split="test", seed=3)
    assert (images != test).any()


def test_the_answer_is_the_largest_digit_that_is_there():
    """Without fragments and noise a scene is its digits: take them out and name each by the digits that it was made of."""
    from sklearn.datasets import load_digits

    known = {
        np.rint(255 * image / 16).astype(np.uint8).tobytes(): int(label)
        for image, label in zip(*_digits(load_digits), strict=True)
    }
    images, labels = scenes(60, split="test", config=SceneConfig(fragments=0, noise=0.0))
    for image, label in zip(images[..., 0], labels, strict=True):
        found = []
        for top in range(0, 25, 4):
            for left in range(0, 25, 4):
                tile = np.ascontiguousarray(image[top : top + 8, left : left + 8])
                if tile.tobytes() in known:
                    found.append(known[tile.tobytes()])
        assert len(found) == 3
        assert max(found) == label
        assert check(str(max(found)), label)
    assert not check(3, 4)


def _digits(load):
    bundle = load()
    return bundle.images, bundle.target


def test_batches_differ_and_folders_hold_classes(tmp_path):
    stream = batches(4, seed=1)
    first, second = next(stream), next(stream)
    assert (first[0] != second[0]).any()
    folder = write_folder(tmp_path / "scenes", 12, seed=2)
    files = list(folder.glob("*/*.png"))
    assert len(files) == 12
    _, labels = scenes(12, split="test", seed=2)
    assert sorted(int(file.parent.name) for file in files) == sorted(labels.tolist())


@pytest.mark.parametrize(
    ("values", "words"),
    [({"size": 33}, "modulo"), ({"digits": 5}, "digits"), ({"noise": 2.0}, "noise"), ({"grid": 0}, "grid")],
)
def test_bad_scenes_are_told(values, words):
    with pytest.raises(ConfigError, match=words):
        SceneConfig(**values)
    with pytest.raises(ConfigError, match="split"):
        scenes(3, split="validation")
