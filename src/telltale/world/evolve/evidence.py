"""Evidence: transitions with who supplied them and what they are for. Append-only, deduplicated, withdrawn but never erased.

Each batch has a ``source`` and a ``role``: ``fit`` (candidates are made of it), ``gate`` (they are judged on it) or
``regression`` (what must stay right). A transition has one role for ever: the first one. Roles come from who asked for the
evidence and never from a hash of it, because a split by hash spreads a poisoned stream over both of its sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from telltale.config import check_choice
from telltale.errors import DataError
from telltale.world.evolve.chain import ChainedLog, digest
from telltale.world.transitions import Transitions
from telltale.world.verification import Verification

ROLES = ("fit", "gate", "regression")


@dataclass(frozen=True)
class Batch:
    """What one call of :meth:`Evidence.add` kept. ``number`` counts from 1; ``duplicates``: given, but known already."""

    key: str
    number: int
    source: str
    role: str
    note: str
    count: int
    duplicates: int
    corroborated: int
    first: int


class Evidence:
    """The store in ``path``: ``log/`` (chained) and ``batches/<key>/`` (transitions as safetensors and JSON)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._log = ChainedLog(self.path / "log")
        self._loaded: dict[str, Transitions] = {}
        self._roles: dict[str, tuple[str, str]] = {}
        self._read = 0

    def add(self, transitions: Transitions, *, source: str, role: str, note: str = "") -> Batch:
        """Keep what is not known yet. The same call again (same transitions, source, role and note) changes nothing.

        What another source gave before is counted as corroborated and stays where it was. Raises
        :class:`~telltale.errors.ConfigError` for an unknown role and :class:`~telltale.errors.DataError` without a source.
        """
        check_choice("role", role, ROLES)
        if not source.strip():
            raise DataError("evidence has no source; say who supplied it.")
        names = transitions.ids()
        key = digest([source, role, note, names])[:32]
        self._refresh()
        for batch in self.batches():
            if batch.key == key:
                return batch
        new, kept, corroborated = [], set(), 0
        for i, name in enumerate(names):
            if name in self._roles or name in kept:
                corroborated += name in self._roles and self._roles[name][1] != source
                continue
            kept.add(name)
            new.append(i)
        folder = self.path / "batches" / key
        chosen = transitions.select(torch.tensor(new, dtype=torch.int64))
        if not folder.exists():
            chosen.save(folder)
        body = {
            "key": key, "source": source, "role": role, "note": note, "count": len(new), "first": self.total(),
            "duplicates": len(names) - len(new), "corroborated": corroborated, "ids": digest(chosen.ids()),
        }  # fmt: skip
        self._log.append("batch", body)
        self._refresh()
        return next(batch for batch in self.batches() if batch.key == key)

    def quarantine(self, keys: Collection[str], *, reason: str) -> None:
        """Withdraw batches: they stay on disk and in the log, and nothing is fitted or judged on them any more."""
        new = sorted(set(keys) - self.withdrawn())
        if new:
            self._log.append("quarantine", {"keys": new, "reason": reason})

    def batches(self) -> list[Batch]:
        """All batches, oldest first."""
        found = [e for e in self._log.entries() if e["kind"] == "batch"]
        wanted = Batch.__dataclass_fields__
        return [
            Batch(**{k: v for k, v in e["body"].items() if k in wanted}, number=number)
            for number, e in enumerate(found, 1)
        ]

    def withdrawn(self) -> set[str]:
        """Keys of the quarantined batches."""
        return {key for e in self._log.entries() if e["kind"] == "quarantine" for key in e["body"]["keys"]}

    def total(self) -> int:
        """Transitions kept."""
        return sum(batch.count for batch in self.batches())

    def chosen(
        self, role: str, *, since: int = 0, sources: Sequence[str] | None = None, keys: Collection[str] | None = None
    ) -> list[Batch]:
        """Batches of a role that are not withdrawn: those after batch number ``since``, of ``sources``, with ``keys``."""
        check_choice("role", role, ROLES)
        out = self.withdrawn()
        return [
            b for b in self.batches()
            if b.role == role and b.key not in out and b.number > since and b.count
            and (sources is None or b.source in sources) and (keys is None or b.key in keys)
        ]  # fmt: skip

    def transitions(self, batches: Sequence[Batch]) -> Transitions | None:
        """The transitions of batches, in order; None where there are none."""
        joined: Transitions | None = None
        for batch in batches:
            part = self.read(batch.key)
            joined = part if joined is None else joined.joined(part)
        return joined

    def read(self, key: str) -> Transitions:
        """One batch, whatever its role."""
        if key not in self._loaded:
            self._loaded[key] = Transitions.load(self.path / "batches" / key)
        return self._loaded[key]

    def verify(self) -> Verification:
        """Check the chain, each batch's content, and that no transition has two roles."""
        found = Verification()
        for file, problem in self._log.findings():
            found.add(file, problem)
        if not found.ok:
            return found
        fresh = Evidence(self.path)
        seen: dict[str, str] = {}
        for entry in fresh._log.entries():
            if entry["kind"] != "batch":
                continue
            body = entry["body"]
            try:
                names = fresh.read(body["key"]).ids()
            except Exception as error:
                found.add(f"batches/{body['key']}", str(error))
                continue
            if digest(names) != body["ids"]:
                found.add(f"batches/{body['key']}", "holds other transitions than were added")
            found.episodes += len(names)
            for name in names:
                if seen.setdefault(name, body["role"]) != body["role"]:
                    found.add(f"batches/{body['key']}", f"transition {name[:12]} is {seen[name]} evidence already")
        return found

    def _refresh(self) -> None:
        for entry in self._log.entries()[self._read :]:
            if entry["kind"] == "batch":
                body: dict[str, Any] = entry["body"]
                for name in self.read(body["key"]).ids():
                    self._roles.setdefault(name, (body["role"], body["source"]))
            self._read += 1
