"""Evidence: transitions with who supplied them and what they are for. Append-only, deduplicated, withdrawn but never erased.

Each batch has a ``source`` and a ``role``: ``fit`` (candidates are made of it), ``gate`` (they are judged on it) or
``regression`` (what must stay right). A transition has one role, the first one, for as long as it is not withdrawn. Roles come
from who asked for the evidence and never from a hash of it, because a split by hash spreads a poisoned stream over both of its
sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from telltale.config import check_choice
from telltale.errors import DataError, TelltaleError
from telltale.world.evolve.chain import ChainedLog, ConflictError, digest
from telltale.world.transitions import Transitions
from telltale.world.verification import Verification

ROLES = ("fit", "gate", "regression")
OWN = ("stream", "probe", "gate")
"""Sources of what a life collects itself. Nobody else may supply under these names."""


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
        self._roles: dict[str, Batch] = {}
        self._read = 0

    def add(self, transitions: Transitions, *, source: str, role: str, note: str = "") -> Batch:
        """Keep what is not known yet. The same call again (same transitions, source, role and note) changes nothing.

        What another source gave before is counted as corroborated and stays where it was, unless the life collects for itself
        (:data:`OWN`) what was withdrawn, or what strangers alone supplied in this role. Raises
        :class:`~telltale.errors.ConfigError` for an unknown role and :class:`~telltale.errors.DataError` without a source.
        """
        check_choice("role", role, ROLES)
        if not source.strip():
            raise DataError("evidence has no source; say who supplied it.")
        names = transitions.ids()
        key = digest([source, role, note, names])[:32]
        while True:
            self._refresh()
            count = len(self._log.entries())
            for batch in self.batches():
                if batch.key == key:
                    return batch
            chosen, body = self._new(transitions, names, source, role)
            self._keep(chosen, key)
            body |= {"key": key, "source": source, "role": role, "note": note, "first": self.total()}
            try:
                self._log.append("batch", body, expected=count)
            except ConflictError:  # another process wrote, perhaps some of these transitions
                continue
            self._refresh()
            return next(batch for batch in self.batches() if batch.key == key)

    def _new(
        self, transitions: Transitions, names: list[str], source: str, role: str
    ) -> tuple[Transitions, dict[str, Any]]:
        """What is not known yet, and what the log says of it."""
        out, new, kept, corroborated = self.withdrawn(), [], set(), 0
        for i, name in enumerate(names):
            holder = self._roles.get(name)
            if name in kept or (holder is not None and not _free(holder, source, role, out)):
                corroborated += name not in kept and holder is not None and holder.source != source
                continue
            kept.add(name)
            new.append(i)
        chosen = transitions.select(torch.tensor(new, dtype=torch.int64))
        counts = {"count": len(new), "duplicates": len(names) - len(new), "corroborated": corroborated}
        return chosen, {**counts, "ids": digest(chosen.ids()), "content": _content(chosen)}

    def _keep(self, chosen: Transitions, key: str) -> None:
        """Write the batch; what a killed process left under its name may be of another moment, and is replaced then."""
        folder = self.path / "batches" / key
        if folder.exists():
            try:
                if _content(Transitions.load(folder)) == _content(chosen):
                    return
            except TelltaleError:
                pass
        chosen.save(folder)

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
        found = self._log.verify()
        if not found.ok:
            return found
        fresh = Evidence(self.path)
        seen: dict[str, tuple[str, str]] = {}
        out: set[str] = set()
        for entry in fresh._log.entries():
            body = entry["body"]
            if entry["kind"] == "quarantine":
                out |= set(body["keys"])
            if entry["kind"] != "batch":
                continue
            place = f"batches/{body['key']}"
            try:
                kept = fresh.read(body["key"])
            except Exception as error:
                found.add(place, str(error))
                continue
            names = kept.ids()
            if digest(names) != body["ids"] or body.get("content", _content(kept)) != _content(kept):
                found.add(place, "holds other transitions than were added")
            found.episodes += len(names)
            for name in names:
                role, key = seen.get(name, (body["role"], body["key"]))
                if role != body["role"] and key not in out:
                    found.add(place, f"transition {name[:12]} is {role} evidence already")
                seen[name] = body["role"], body["key"]
        return found

    def _refresh(self) -> None:
        fresh = self._log.entries()[self._read :]
        batches = {batch.key: batch for batch in self.batches()} if fresh else {}
        for entry in fresh:
            if entry["kind"] == "batch":
                body: dict[str, Any] = entry["body"]
                for name in self.read(body["key"]).ids():
                    self._roles[name] = batches[body["key"]]
            self._read += 1


def _free(holder: Batch, source: str, role: str, withdrawn: Collection[str]) -> bool:
    """Whether the life may collect a transition that ``holder`` has. What is withdrawn, or only a stranger's, is nobody's: or else
    whoever offers what is true together with what is false takes the true from the life as well."""
    return source in OWN and (holder.key in withdrawn or (holder.source not in OWN and holder.role == role))


def _content(transitions: Transitions) -> str:
    """A hash of all that a batch says, and not of the ids alone: rewards, ends, and which episode a row is of."""
    rest = [getattr(transitions, name).tolist() for name in ("rewards", "terminated", "episodes")]
    return digest([transitions.ids(), rest])
