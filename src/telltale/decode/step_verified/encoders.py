"""Candidates as vectors, so that they can be compared: pluggable, with a default that needs no model.

SpecGuard (arXiv 2604.15244) takes a sentence-transformer it does not name. Such encoders hardly tell "= 12" from "= 13"; the
default here hashes token n-grams, the multiset of numbers and the whole text.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from telltale.errors import ConfigError, DataError

Encoder = Callable[[Sequence[str]], Tensor]
"""Texts -> (texts, dimensions), rows of length 1."""

ENCODERS: dict[str, Encoder] = {}
DIMENSIONS = 256
"""Of each of the three parts of the hashed encoding."""
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def register_encoder(name: str) -> Callable[[Encoder], Encoder]:
    """Make an encoder available under ``name`` in ``StepVerifiedConfig(encoder=...)``."""

    def keep(encoder: Encoder) -> Encoder:
        ENCODERS[name] = encoder
        return encoder

    return keep


def encoder_named(name: str) -> Encoder:
    """A registered encoder. Raises :class:`~telltale.errors.ConfigError` listing the names there are."""
    if name not in ENCODERS:
        raise ConfigError(f"encoder={name!r} is unknown; expected one of {', '.join(sorted(ENCODERS))}.")
    return ENCODERS[name]


def checked_embeddings(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """``encoder(texts)``, (k, d). Raises :class:`~telltale.errors.DataError` for anything but a row a text."""
    found = encoder(texts)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != len(texts):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"the encoder gave {shape} for {len(texts)} candidates; expected a tensor with a row for each.")
    return found


@register_encoder("hashed")
def hashed(texts: Sequence[str]) -> Tensor:
    """n-grams of one to three words, numbers with their counts, and the text itself: three hashed parts of equal weight."""
    rows = np.zeros((len(texts), 3 * DIMENSIONS))
    for row, text in zip(rows, texts, strict=True):
        parts = _grams(text), _numbers(text), [" ".join(text.split())]
        for part, features in zip(np.split(row, 3), parts, strict=True):
            _add_unit(part, features)
    return torch.from_numpy(rows) / 3**0.5


def _grams(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)] or [""]


def _numbers(text: str) -> list[str]:
    counts: Counter[float] = Counter()
    found = []
    for number in _NUMBER.findall(text.replace(",", "")):
        value = float(number)
        counts[value] += 1
        # The n-th time a number stands is a feature of its own, so that multisets are compared, not sets.
        found.append(f"{value}x{counts[value]}")
    return found or [""]


def _add_unit(part: np.ndarray, features: Sequence[str]) -> None:
    """Hash features into a vector of zeros and scale it to length 1."""
    for feature in features:
        # CRC-32 is the same in every process; Python's own hash is salted.
        code = zlib.crc32(feature.encode())
        part[code % DIMENSIONS] += 1.0 if (code >> 16) & 1 else -1.0
    length = float(np.linalg.norm(part))
    if length == 0:
        # Signs cancelled out: the features still have a direction of their own.
        part[zlib.crc32("".join(features).encode()) % DIMENSIONS] = length = 1.0
    part /= length
