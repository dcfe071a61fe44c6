"""How pixels become bytes: raw patches, one WebP or JPEG sheet of all sent patches, a small image, a filled image, the whole image.

A codec turns an image and the patches to send into a payload and back, at one of its settings (best first). Only sent patches
go in, so a sheet cannot leak others. ``whole`` codecs give the server an image without holes. Register your own with
:func:`register_codec`. NumPy and Pillow; no PyTorch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from telltale.errors import ConfigError, DataError, MissingExtraError

Array = np.ndarray
QUALITIES = (95, 90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 1)
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
"""Sides of the low-resolution image, as shares of the whole."""


class Codec(Protocol):
    """What a codec has: the number of its settings, best first, and how it treats patches."""

    @property
    def uses_patches(self) -> bool:
        """Whether it sends chosen patches."""

    @property
    def whole(self) -> bool:
        """Whether it gives every pixel a value, so that the server works on a whole image."""

    @property
    def settings(self) -> int:
        """How many settings it has."""

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        """Payload of the patches ``indices`` (rising) of ``image`` (height, width, 3) uint8."""

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        """The image (height, width, 3) uint8; pixels that were not sent are 0. Raises DataError for a foreign payload."""


_CODECS: dict[str, tuple[int, Codec]] = {}


def register_codec(name: str, number: int, codec: Codec) -> None:
    """Make a codec known by name and, on the wire, by ``number`` (0..255). Raises ConfigError if either is taken."""
    taken = {kept: known for known, (kept, _) in _CODECS.items()}
    if name in _CODECS or number in taken or not 0 <= number <= 255:
        raise ConfigError(f"codec {name!r} with number {number} is not allowed; expected a new name and a new 0..255.")
    _CODECS[name] = (number, codec)


def codec_names() -> list[str]:
    """Names of all codecs."""
    return list(_CODECS)


def codec_named(name: str) -> Codec:
    """The codec. Raises ConfigError for an unknown name."""
    if name not in _CODECS:
        raise ConfigError(f"codec {name!r} is unknown; expected one of {', '.join(_CODECS)}.")
    return _CODECS[name][1]


def codec_number(name: str) -> int:
    """Its number on the wire."""
    codec_named(name)
    return _CODECS[name][0]


def codec_of_number(number: int) -> str:
    """The name. Raises DataError for a number that no codec has."""
    for name, (known, _) in _CODECS.items():
        if known == number:
            return name
    raise DataError(
        f"codec {number} is unknown; known: {', '.join(f'{n} {name}' for name, (n, _) in _CODECS.items())}."
    )


def cut(image: Array, indices: Sequence[int], patch: int) -> Array:
    """The patches ``indices`` of ``image`` (height, width, 3): (n, patch, patch, 3)."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    tiles = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * columns, patch, patch, 3)[list(indices)]


def paste(tiles: Array, indices: Sequence[int], image: Array) -> None:
    """Put ``tiles`` (n, patch, patch, 3) at the places ``indices`` of ``image``, in place."""
    patch = tiles.shape[1]
    columns = image.shape[1] // patch
    for tile, index in zip(tiles, indices, strict=True):
        row, column = divmod(index, columns)
        image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = tile


@dataclass(frozen=True)
class RawPatches:
    """Patches as they are, ``bits`` (8 or 4) per channel and pixel."""

    bits: int
    uses_patches: bool = True
    whole: bool = False
    settings: int = 1

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        values = cut(image, indices, patch).reshape(-1)
        if self.bits == 8:
            return values.tobytes()
        levels = np.rint(values / 17.0).astype(np.uint8)
        levels = np.append(levels, np.zeros(len(levels) % 2, dtype=np.uint8))
        return (levels[::2] << 4 | levels[1::2]).tobytes()

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        count = len(indices) * patch * patch * 3
        expected = count if self.bits == 8 else (count + 1) // 2
        if len(payload) != expected:
            raise DataError(f"raw patches have {len(payload)} bytes; expected {expected} for {len(indices)} patches.")
        values = np.frombuffer(payload, dtype=np.uint8)
        if self.bits == 4:
            values = np.stack([values >> 4, values & 15], axis=1).reshape(-1)[:count] * np.uint8(17)
        image = np.zeros((*shape, 3), dtype=np.uint8)
        paste(values.reshape(len(indices), patch, patch, 3), indices, image)
        return image


@dataclass(frozen=True)
class Sheet:
    """All sent patches as tiles of one picture, in raster order, under one header.

    JPEG keeps full chroma for patches below 16 pixels (subsampled chroma would mix neighbouring tiles).
    """

    format: str
    uses_patches: bool = True
    whole: bool = False
    settings: int = len(QUALITIES)

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        tiles = cut(image, indices, patch)
        rows, columns = _sheet_grid(len(tiles))
        # Empty places repeat the last tile: flat black would put an edge into the last blocks.
        filled = np.concatenate([tiles, np.repeat(tiles[-1:], rows * columns - len(tiles), axis=0)])
        sheet = filled.reshape(rows, columns, patch, patch, 3).transpose(0, 2, 1, 3, 4)
        return _compress(
            sheet.reshape(rows * patch, columns * patch, 3), self.format, QUALITIES[setting], fine=patch < 16
        )

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        rows, columns = _sheet_grid(len(indices))
        sheet = _decompress(payload, self.format, (rows * patch, columns * patch))
        image = np.zeros((*shape, 3), dtype=np.uint8)
        paste(cut(sheet, range(len(indices)), patch), indices, image)
        return image


@dataclass(frozen=True)
class WholeImage:
    """The whole image as JPEG or WebP: what patches have to beat."""

    format: str
    uses_patches: bool = False
    whole: bool = True
    settings: int = len(QUALITIES)

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        return _compress(image, self.format, QUALITIES[setting], fine=False)

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        return _decompress(payload, self.format, shape)


@dataclass(frozen=True)
class LowResolution:
    """The whole image made smaller, as WebP of quality 75; a setting is a share of its side."""

    uses_patches: bool = False
    whole: bool = True
    settings: int = len(SHARES)

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        height, width = _small(image.shape[:2], setting)
        return _compress(_resized(image, (height, width), "box"), "WEBP", 75, fine=False)

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        return _resized(_decompress(payload, "WEBP", _small(shape, setting)), shape, "bicubic")


@dataclass(frozen=True)
class FilledImage:
    """Sent patches as a WebP sheet, and for all others their mean colour: one pixel per patch, in a small WebP beside it."""

    uses_patches: bool = True
    whole: bool = True
    settings: int = len(QUALITIES)

    def encode(self, image: Array, indices: Sequence[int], patch: int, setting: int) -> bytes:
        rows, columns = image.shape[0] // patch, image.shape[1] // patch
        means = image.reshape(rows, patch, columns, patch, 3).mean(axis=(1, 3))
        small = _compress(np.rint(means).astype(np.uint8), "WEBP", min(QUALITIES[setting] + 20, 95), fine=False)
        sheet = Sheet("WEBP").encode(image, indices, patch, setting)
        return len(small).to_bytes(2, "little") + small + sheet

    def decode(self, payload: bytes, indices: Sequence[int], shape: tuple[int, int], patch: int, setting: int) -> Array:
        border = 2 + int.from_bytes(payload[:2], "little")
        means = _decompress(payload[2:border], "WEBP", (shape[0] // patch, shape[1] // patch))
        image = means.repeat(patch, axis=0).repeat(patch, axis=1)
        sheet = Sheet("WEBP").decode(payload[border:], indices, shape, patch, setting)
        paste(cut(sheet, indices, patch), indices, image)
        return image


register_codec("raw8", 1, RawPatches(8))
register_codec("raw4", 2, RawPatches(4))
register_codec("mosaic_webp", 3, Sheet("WEBP"))
register_codec("mosaic_jpeg", 4, Sheet("JPEG"))
register_codec("lowres", 5, LowResolution())
register_codec("filled", 6, FilledImage())
register_codec("jpeg", 7, WholeImage("JPEG"))
register_codec("webp", 8, WholeImage("WEBP"))


def _sheet_grid(count: int) -> tuple[int, int]:
    columns = math.isqrt(count - 1) + 1
    return -(-count // columns), columns


def _small(shape: tuple[int, int] | tuple[int, ...], setting: int) -> tuple[int, int]:
    return max(1, round(shape[0] * SHARES[setting])), max(1, round(shape[1] * SHARES[setting]))


def _compress(pixels: Array, format: str, quality: int, *, fine: bool) -> bytes:
    stream = io.BytesIO()
    options: dict[str, Any] = {"quality": quality}
    options |= {"method": 4} if format == "WEBP" else {"optimize": True, "subsampling": 0 if fine else 2}
    _pillow().fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def _decompress(payload: bytes, format: str, shape: tuple[int, int]) -> Array:
    """Decode after a look at the header alone: a picture of another size than ``shape`` is never unpacked."""
    try:
        picture = _pillow().open(io.BytesIO(payload), formats=[format])
        if picture.size != (shape[1], shape[0]):
            raise DataError(f"the picture is {picture.size[1]} x {picture.size[0]}; expected {shape[0]} x {shape[1]}.")
        return np.asarray(picture.convert("RGB"))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the payload is no readable {format} picture: {type(error).__name__}.") from error


def _resized(image: Array, shape: tuple[int, int], kind: str) -> Array:
    pillow = _pillow()
    method = {"box": pillow.Resampling.BOX, "bicubic": pillow.Resampling.BICUBIC}[kind]
    return np.asarray(pillow.fromarray(image).resize((shape[1], shape[0]), method))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("codecs need Pillow: pip install 'telltale[edge]'") from error
    return Image
