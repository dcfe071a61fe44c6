"""Images from a user's folder: one subfolder per class, or images without classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from telltale.config import check_integer, check_seed
from telltale.errors import DataError, MissingExtraError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Images:
    """pixels: (n, height, width, 3) uint8. labels: (n,) indices into the model's labels, or None. files: where they came from."""

    pixels: np.ndarray
    labels: np.ndarray | None
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def split(self, share: float, *, seed: int = 0) -> tuple[Images, Images]:
        """Two parts at random, the first with ``share`` of the images."""
        order = np.random.default_rng(seed).permutation(len(self))
        border = round(share * len(self))
        return self.take(order[:border]), self.take(order[border:])

    def take(self, rows: np.ndarray) -> Images:
        """Some of the images."""
        labels = None if self.labels is None else self.labels[rows]
        return Images(self.pixels[rows], labels, tuple(self.files[row] for row in rows))


def read_folder(
    folder: str | Path, size: tuple[int, int], labels: Sequence[str], *, limit: int | None = None, seed: int = 0
) -> Images:
    """Read images, resized to ``size`` (height, width). Subfolders are classes, with images however deep below,
    named as the models' ``labels`` or by their number.

    limit: at most so many, drawn at random. A folder with images and no subfolders has no labels.

    Raises :class:`~telltale.errors.DataError` for a folder without images, a file that is no image, an unknown class, or a name
    that several labels share.
    """
    root = Path(folder)
    if limit is not None:
        check_integer("limit", limit, low=1)
    check_seed(seed)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give a folder of images, one subfolder per class.")
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    found: list[tuple[Path, int]] = []
    for child in classes:
        # However deep below its class folder: images that are passed over in silence would falsify an accuracy.
        files = _below(child)
        if files:
            number = _class_of(child, labels)
            found += [(file, number) for file in files]
    labelled = bool(found)
    loose = _files(root)
    if labelled and loose:
        raise DataError(f"{root} holds images ({loose[0].name}, ...) beside class folders; move them into one of them.")
    if not labelled:
        found = [(file, -1) for file in loose]
    if not found:
        raise DataError(f"{root} holds no images ({', '.join(ENDINGS[:4])}, ...); give a folder of images.")
    order = np.arange(len(found))
    if limit is not None and limit < len(found):
        order = np.sort(np.random.default_rng(seed).permutation(len(found))[:limit])
    chosen = [found[row] for row in order]
    pixels = np.stack([read_image(file, size) for file, _ in chosen])
    numbers = np.array([label for _, label in chosen], dtype=np.int64) if labelled else None
    return Images(pixels, numbers, tuple(file for file, _ in chosen))


def image_files(folder: str | Path) -> list[Path]:
    """All images below ``folder``, whatever the names of its subfolders, sorted. Raises DataError if there are none."""
    root = Path(folder)
    found = _below(root)
    if not found:
        raise DataError(f"{root} holds no images ({', '.join(ENDINGS[:4])}, ...); give a folder of images.")
    return found


def read_image(file: str | Path, size: tuple[int, int]) -> np.ndarray:
    """One image as (height, width, 3) uint8 of ``size``, bilinear; the first frame of several, upright, on black where transparent.

    Raises DataError if it cannot be read, or holds floating-point or 32-bit pixels, whose range is not known.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError("reading images needs Pillow: pip install 'telltale[edge]'") from error
    height, width = size
    try:
        with Image.open(file) as opened:
            picture: Any = _eight_bit(ImageOps.exif_transpose(opened), file)
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            return np.array(picture)  # a copy that may be written to, as torch asks
    except DataError:
        raise
    except Exception as error:  # a damaged header raises whatever its parser does: TypeError from EXIF, for one
        raise DataError(
            f"{file} cannot be read as an image: {type(error).__name__}; remove it or give another."
        ) from error


def _eight_bit(picture: Any, file: str | Path) -> Any:
    """The picture as 8-bit RGB. Pillow's own conversion would clip 16 bits to white and show what lies under transparent pixels."""
    from PIL import Image

    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if picture.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise DataError(
                f"{file} holds {picture.mode} pixels outside 8 and 16 bits; expected those, convert it to PNG or JPEG."
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture).convert("RGB")
    return picture.convert("RGB")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_image(file) and not file.name.startswith("."))


def _below(root: Path) -> list[Path]:
    return sorted(
        file
        for file in root.rglob("*")
        if _is_image(file) and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and file.is_file()


def _class_of(folder: Path, labels: Sequence[str]) -> int:
    """The label that the folder names. Names are compared in Unicode's composed form: some file systems decompose them."""
    name = normalize("NFC", folder.name)
    same = [number for number, label in enumerate(labels) if normalize("NFC", label) == name]
    if len(same) > 1:
        raise DataError(f"the class folder {folder} names labels {same} alike; rename it to the number that is meant.")
    if not same and name.isdecimal() and int(name) < len(labels):
        same = [int(name)]
    if not same:
        raise DataError(
            f"the class folder {folder} is none of the model's labels ({', '.join(list(labels)[:12])}); rename the folder or "
            "give another checkpoint."
        )
    return same[0]
