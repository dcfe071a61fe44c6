"""Files that are written whole or not at all, JSON that any reader takes, and logs of one JSON record a line.

A file is written aside in the same folder, flushed to disk, then renamed. A log grows while a job runs; a kill costs at most the
line that was being written. JSON has no word for NaN and infinity: numbers that are not finite are written as null.
"""

from __future__ import annotations

import dataclasses
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
    with written_aside(target, data) as aside:
        aside.replace(target)


@contextmanager
def written_aside(target: Path, data: str | bytes) -> Iterator[Path]:
    """A flushed file with ``data`` in the folder of ``target``, for the body to put in its place; what is left of it is removed.

    Raises :class:`~telltale.errors.CheckpointError` when the file, or what the body does with it, cannot be written.
    """
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
        yield aside
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
            reason = (
                "the disk is full, or a limit of file sizes was reached" if "unexpected pos" in str(error) else error
            )
            raise CheckpointError(f"could not write {target}: {reason}. The partial folder was removed.") from error
        raise
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def remove_partial_writes(folder: Path) -> None:
    """Clear what a killed process left half-written in ``folder``."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def strict_json(value: Any, *, infinity_as_text: bool = False) -> Any:
    """``value`` of dataclasses, mappings, sequences, numbers and texts as values that any JSON reader takes.

    Numbers that are not finite become null; with ``infinity_as_text`` (the format of calibrations) infinite ones become "inf" and
    "-inf", which ``float`` reads back.
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return str(value) if infinity_as_text and math.isinf(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: strict_json(inner, infinity_as_text=infinity_as_text) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(inner, infinity_as_text=infinity_as_text) for inner in value]
    return value


def write_json(path: str | Path, document: Any) -> None:
    """Write ``document``, made :func:`strict_json`, as :func:`write_atomically` does; one space of indentation."""
    write_atomically(path, json.dumps(strict_json(document), indent=1, allow_nan=False) + "\n")


class JsonLines:
    """The records of one file, one a line. One writer at a time; a last line that a kill cut short is left out, later overwritten.

    ``strict`` writes :func:`strict_json`; without it NaN and infinity are written as Python writes them and read back as numbers.
    """

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        self.path = Path(path)
        self._strict = strict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All whole records, in the order in which they were written.

        Raises :class:`~telltale.errors.CheckpointError` for a file that cannot be read and for a line that is not JSON.
        """
        if not self.path.exists():
            return
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        for number, line in enumerate(lines[:-1], start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"line {number} of {self.path} is damaged, it is not JSON: {error}.") from error

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records at the end. Raises :class:`~telltale.errors.CheckpointError` if they cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self._ends_in_the_middle_of_a_line():
                whole = self.path.read_bytes()
                write_atomically(self.path, whole[: whole.rfind(b"\n") + 1])
            with self.path.open("a") as stream:
                stream.write(self._text(records))
        except OSError as error:
            raise CheckpointError(f"could not append to {self.path}: {error}") from error

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write ``records`` in the place of all that are there, whole or not at all."""
        write_atomically(self.path, self._text(records))

    def _text(self, records: Iterable[Mapping[str, Any]]) -> str:
        if self._strict:
            return "".join(json.dumps(strict_json(record), allow_nan=False) + "\n" for record in records)
        return "".join(json.dumps(record) + "\n" for record in records)

    def _ends_in_the_middle_of_a_line(self) -> bool:
        with self.path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                return False
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"


def _replace_folder(aside: Path, target: Path) -> None:
    """Move ``aside`` to ``target``; an old one steps aside first, so that a kill never leaves half of it under its name."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent)) / "old"
        target.replace(old)
        aside.replace(target)
        shutil.rmtree(old.parent, ignore_errors=True)
    else:
        aside.replace(target)


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
