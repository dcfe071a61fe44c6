"""Embeddings of teacher traces: each different one is encoded once, and kept on disk by encoder and text if a file is given."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from telltale.align.oger.encoders import Encoder, encode_checked
from telltale.errors import CheckpointError, DataError

CENTRE_SAMPLES = 1024
"""Traces, spread evenly over the store, whose mean embedding is the centre."""


class TeacherEmbeddings:
    """Vectors by (prompt, text). ``encoded`` counts what the encoder had to compute; a second epoch adds nothing to it.

    cache: an SQLite file, made if it is not there; None keeps vectors in memory only.
    """

    def __init__(self, encoder: Encoder, *, cache: Path | None = None) -> None:
        self.encoder = encoder
        self.encoded = 0
        self._known: dict[bytes, torch.Tensor] = {}
        self._database = None if cache is None else _open(cache)
        self._path = cache

    def of(self, prompts: Sequence[str], texts: Sequence[str], names: Sequence[str]) -> torch.Tensor:
        """Vectors (n, d); ``names`` are for errors."""
        keys = [_key(self.encoder.identity, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        self._read([key for key in keys if key not in self._known])
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        if missing:
            unique = list({keys[index]: index for index in missing}.values())
            vectors = encode_checked(
                self.encoder, *([values[index] for index in unique] for values in (prompts, texts, names))
            )
            self.encoded += len(unique)
            self._write({keys[index]: vector for index, vector in zip(unique, vectors, strict=True)})
        found = [self._known[key] for key in keys]
        for vector in found:
            check_dimensions(self.encoder, vector, found[0])
        return torch.stack(found) if found else torch.zeros(0, 1)

    def centre(self, prompts: Sequence[str], texts: Sequence[str], names: Sequence[str]) -> torch.Tensor | None:
        """The mean vector of at most :data:`CENTRE_SAMPLES` of these traces, evenly spread.

        None if the encoder is not centred, all traces are of one prompt, or they are all alike: taken off from few vectors,
        their mean leaves nothing to compare.
        """
        if not self.encoder.centred or len(set(prompts)) < 2:
            return None
        step = max(len(texts) / CENTRE_SAMPLES, 1.0)
        chosen = [int(index * step) for index in range(min(len(texts), CENTRE_SAMPLES))]
        vectors = self.of(*([values[index] for index in chosen] for values in (prompts, texts, names)))
        return vectors.mean(0) if (vectors != vectors[0]).any() else None

    def _read(self, keys: Sequence[bytes]) -> None:
        if self._database is None:
            return
        for key in keys:
            try:
                row = self._database.execute("SELECT vector FROM embeddings WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                raise CheckpointError(f"no embeddings can be read from {self._path}: {error}. Delete it.") from error
            if row is not None:
                self._known[key] = torch.from_numpy(np.frombuffer(row[0], dtype="<f4").copy())

    def _write(self, vectors: dict[bytes, torch.Tensor]) -> None:
        self._known.update(vectors)
        if self._database is None:
            return
        rows = [(key, vector.numpy().astype("<f4").tobytes()) for key, vector in vectors.items()]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise CheckpointError(f"the embeddings could not be kept in {self._path}: {error}.") from error


def check_dimensions(encoder: Encoder, one: torch.Tensor, other: torch.Tensor) -> None:
    """Raise :class:`~telltale.errors.DataError` unless both hold vectors of one length."""
    if one.shape[-1] != other.shape[-1]:
        raise DataError(
            f"the encoder {encoder.identity} gave vectors of {one.shape[-1]} dimensions and of {other.shape[-1]}; expected one "
            f"number. If its function has changed, change its name too."
        )


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=60)
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
    except (sqlite3.Error, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be used to keep embeddings: {error}. Give another file or delete it."
        ) from error
    return database


def _key(identity: str, prompt: str, text: str) -> bytes:
    return hashlib.sha256("\0".join((identity, prompt, text)).encode()).digest()
