"""Writes that either happen whole or not at all: aside in the same folder, flushed to disk, then renamed.

A file of JSON records, one a line, that grows while a job runs. A kill costs at most the line that was being written.

Reports as JSON has them: a number that is not defined is null, since JSON has no word for NaN.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError

PARTIAL_PREFIX = ".partial-"


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Raises :class:`~telltale.errors.CheckpointError` when the file cannot be written (full disk, no permission); the
    partial file is removed then.
    """
    target = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=target.parent)
        aside = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        aside.chmod(0o644)
        aside.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}. Nothing was changed there.") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise :class:`~telltale.errors.CheckpointError` if no file can be written at ``path``: for a long job to learn at once."""
    target = Path(path)
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if target.is_dir():
        reason = "it is a folder"
    elif not folder.is_dir():
        reason = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} may not be written to"
    else:
        return
    raise CheckpointError(f"could not write {target}: {reason}.")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    An existing ``path`` is replaced. Raises :class:`~telltale.errors.CheckpointError` for any ``OSError`` in the block.
    """
    target = Path(path)
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent))
        yield aside
        for written in aside.rglob("*"):
            if written.is_file():
                _flush(written)
        aside.chmod(0o755)
        _replace_folder(aside, target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}. The partial folder was removed.") from error
    except Exception as error:
        if _is_write_failure(error):
            raise CheckpointError(f"could not write {target}: {error}. The partial folder was removed.") from error
        raise
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _replace_folder(aside: Path, target: Path) -> None:
    """Move ``aside`` to ``target``; an old one steps aside first, so that a kill never leaves half of it under its name."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent)) / "old"
        target.replace(old)
        aside.replace(target)
        shutil.rmtree(old.parent, ignore_errors=True)
    else:
        aside.replace(target)


def remove_partial_writes(folder: Path) -> None:
    """Clear what a killed process left half-written in ``folder``."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_write_failure(error: Exception) -> bool:
    """Safetensors and torch.save report a full disk as errors of their own kinds, with the system's words inside."""
    words = str(error).lower()
    telling = ("no space left", "file too large", "os error", "disk quota", "unexpected pos", "file write failed")
    return any(phrase in words for phrase in telling)


class Records:
    """The records of one file. One writer at a time; a last line that a kill cut short is left out, and mended on append."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._whole = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All whole records, in the order in which they were written."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        for line in lines[:-1]:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{self.path} is damaged: a line is not JSON ({error}). Delete it.") from error

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records at the end. Raises :class:`~telltale.errors.CheckpointError` if they cannot be written."""
        self._mend()
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(text)
        except OSError as error:
            self._whole = False
            raise CheckpointError(f"could not append to {self.path}: {error}") from error

    def _mend(self) -> None:
        if self._whole or not self.path.exists():
            self._whole = True
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            write_atomically(self.path, data[: data.rfind(b"\n") + 1])
        self._whole = True


def plain(value: Any) -> Any:
    """``value`` of mappings, lists, tuples and numbers with null for every float that is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
