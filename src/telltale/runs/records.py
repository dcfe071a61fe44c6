"""A file of JSON records, one a line, that grows while a job runs. A kill costs at most the line that was being written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError
from telltale.runs.atomic import write_atomically


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
