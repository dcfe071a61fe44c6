"""An append-only log whose entries are chained by hash, one file an entry. Several processes may write; a kill costs nothing.

An entry is written aside, flushed, and then linked under its number. Linking fails if the number is taken, so of two writers
one wins, without a lock that a killed process could leave behind. An entry holds the hash of the one before it: whoever
changes, removes or reorders one breaks the chain there. Entries carry no time of day, so that two runs of one life are equal.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, TelltaleError
from telltale.runs.files import strict_json, written_aside
from telltale.world.verification import Verification

GENESIS = "0" * 64
"""What the first entry has in the place of a hash."""


class ConflictError(TelltaleError):
    """Another process wrote to the log first; what was to be written was decided on an older state."""


class ChainedLog:
    """The entries of ``folder``, oldest first. Whole entries are cached: they never change."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: list[dict[str, Any]] = []

    def entries(self) -> list[dict[str, Any]]:
        """All entries, those that another process has written since included.

        Raises :class:`~telltale.errors.CheckpointError` for one that is no JSON or does not follow from the one before.
        """
        while (path := self._path(len(self._known) + 1)).exists():
            try:
                entry = json.loads(path.read_text())
                whole = entry["hash"] == digest({k: v for k, v in entry.items() if k != "hash"})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
            if not whole or entry["previous"] != self.head() or entry["number"] != len(self._known) + 1:
                raise CheckpointError(f"{path} is not the entry that was written: the chain of hashes breaks there.")
            self._known.append(entry)
        return self._known

    def head(self) -> str:
        """Hash of the newest entry that is known here."""
        return str(self._known[-1]["hash"]) if self._known else GENESIS

    def append(self, kind: str, body: dict[str, Any], *, expected: int | None = None) -> dict[str, Any]:
        """Write one entry; with ``expected``, only if the log still has that many.

        Raises :class:`ConflictError` if it has more, and :class:`~telltale.errors.CheckpointError` if nothing can be written.
        """
        clean = json.loads(json.dumps(strict_json(body), allow_nan=False))
        while True:
            count = len(self.entries())
            if expected is not None and count != expected:
                raise ConflictError(f"{self.folder} has {count} entries, not the {expected} that this was decided on.")
            entry: dict[str, Any] = {"number": count + 1, "previous": self.head(), "kind": kind, "body": clean}
            entry["hash"] = digest(entry)
            if self._linked(self._path(count + 1), json.dumps(entry, sort_keys=True) + "\n"):
                self._known.append(entry)
                return entry

    def findings(self) -> list[tuple[str, str]]:
        """(file, problem) of all that is wrong, read anew from disk: damaged entries, and numbers that are missing."""
        fresh = ChainedLog(self.folder)
        try:
            count = len(fresh.entries())
        except CheckpointError as error:
            return [(self.folder.name, str(error))]
        there = sorted(path.name for path in self.folder.glob("*.json")) if self.folder.is_dir() else []
        beyond = [name for name in there if name > self._path(count).name] if count else there
        return [(f"{self.folder.name}/{name}", "stands behind a gap: an entry before it is missing") for name in beyond]

    def verify(self) -> Verification:
        """The same, as the beginning of a check of what the entries speak of."""
        found = Verification()
        for file, problem in self.findings():
            found.add(file, problem)
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.json"

    def _linked(self, target: Path, text: str) -> bool:
        """Whether ``target`` is this text now; False if another was there first."""
        with written_aside(target, text) as aside:
            try:
                os.link(aside, target)
            except FileExistsError:
                return False
            flush_folder(self.folder)
            return True


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Make names that were just given durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
