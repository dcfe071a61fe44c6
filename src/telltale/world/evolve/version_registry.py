"""The registry: immutable versions of a model, which of them is active, and the log of how that came about.

``versions/<id>/`` holds a model as :func:`telltale.world.save_model` writes it; the id is the hash of weights, config, code,
parent and evidence. ``log/`` is a :class:`~telltale.world.evolve.chain.ChainedLog`. What is active follows from the log alone:
the founding version, until a promotion or a rollback names another. Nothing is ever written in place.
"""

from __future__ import annotations

import inspect
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, ConfigError, TelltaleError
from telltale.runs.files import PARTIAL_PREFIX
from telltale.world.evolve.chain import ChainedLog, ConflictError, digest, flush_folder
from telltale.world.evolve.receipts import REQUIRED, PromotionRefused, Receipt, check_seal
from telltale.world.models.saving import load_model, open_model, save_model
from telltale.world.verification import Verification

ACTIVATIONS = ("found", "promote", "rollback")


@dataclass(frozen=True)
class Version:
    """One version: its id, folder and document (kind, config, about with code, parent and evidence)."""

    id: str
    path: Path
    document: dict[str, Any] = field(repr=False)

    @property
    def parent(self) -> str | None:
        """Id of the version that it was made from."""
        return self.document["about"].get("parent")

    @property
    def evidence(self) -> list[str]:
        """Ids of the transitions that it was fitted on, 16 characters each."""
        return list(self.document["about"].get("evidence", []))

    def load(self) -> Any:
        """The model. Raises :class:`~telltale.errors.CheckpointError` unless each byte is what was hashed."""
        return load_model(self.path)


class Registry:
    """The registry in ``path``. ``approval`` asks for a person's word before each promotion; it is fixed by the first version."""

    def __init__(self, path: str | Path, *, approval: bool = False) -> None:
        self.path = Path(path)
        self._log = ChainedLog(self.path / "log")
        self._approval = approval

    def log(self) -> list[dict[str, Any]]:
        """All entries: number, kind, body, hash."""
        return list(self._log.entries())

    @property
    def needs_approval(self) -> bool:
        """Whether a promotion waits for :meth:`approve`."""
        entries = self._log.entries()
        return bool(entries[0]["body"]["approval"]) if entries else self._approval

    def add(
        self,
        model: Any,
        *,
        parent: str | None = None,
        evidence: Sequence[str] = (),
        about: dict[str, Any] | None = None,
    ) -> Version:
        """Write a version, and note it in the log; the first one founds the registry and is active at once.

        ``parent`` None takes the active version. ``evidence``: ids of what it was fitted on. Adding what is there already
        changes nothing. Raises :class:`~telltale.errors.ConfigError` for a parent that is not here.
        """
        entries = self._log.entries()
        if parent is None and entries:
            parent = self.active().id
        if parent is not None and not (self.path / "versions" / parent).is_dir():
            raise ConfigError(f"parent {parent[:12]} is no version of {self.path}; add it first.")
        known = {
            **(about or {}),
            "code": code_of(model),
            "parent": parent,
            "evidence": sorted({e[:16] for e in evidence}),
        }
        folder = self.path / "versions"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"
        try:
            name = save_model(model, aside, about=known)
            try:
                if not (folder / name).exists():
                    aside.rename(folder / name)
                    flush_folder(folder)
            except OSError:
                if not (folder / name).is_dir():  # else another process has just written the same version
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if not any(e["kind"] in ("found", "add") and e["body"]["version"] == name for e in self._log.entries()):
            kind = "add" if self._log.entries() else "found"
            body = {"version": name, "parent": parent, "kind": model.describe()["kind"]}
            if kind == "found":
                body["approval"] = self._approval
            self._log.append(kind, body, expected=0 if kind == "found" else None)
        return self.version(name)

    def version(self, name: str) -> Version:
        """The version whose id begins with ``name``. Raises :class:`~telltale.errors.ConfigError` unless exactly one does."""
        folder = self.path / "versions"
        found = [p for p in sorted(folder.glob(f"{name}*")) if p.is_dir()] if name and folder.is_dir() else []
        if len(found) != 1:
            raise ConfigError(f"{name!r} names {len(found)} versions of {self.path}; expected the start of one id.")
        document = open_model(found[0])[1]
        if document["id"] != found[0].name:
            raise CheckpointError(f"{found[0]} holds version {document['id'][:12]}; restore the folder.")
        return Version(found[0].name, found[0], document)

    def versions(self) -> list[str]:
        """Ids in the order in which they were added."""
        return [e["body"]["version"] for e in self._log.entries() if e["kind"] in ("found", "add")]

    def active(self) -> Version:
        """The version that acts. Raises :class:`~telltale.errors.CheckpointError` for an empty registry."""
        return self.version(self._active_id())

    def record(self, receipt: Receipt) -> Receipt:
        """Write a gate's receipt to the log, passed or not. The same one again changes nothing.

        Raises :class:`PromotionRefused` for a broken seal or a trial number that another receipt has.
        """
        check_seal(receipt)
        for entry in self._log.entries():
            if entry["kind"] == "gate" and entry["body"]["trial"] == receipt.trial:
                if entry["body"]["seal"] == receipt.seal:
                    return receipt
                raise PromotionRefused(
                    f"trial {receipt.trial} was taken by another candidate; judge with the next number."
                )
        self._log.append("gate", asdict(receipt))
        return receipt

    def receipts(self) -> list[Receipt]:
        """All receipts, oldest first."""
        return [Receipt.from_json(e["body"]) for e in self._log.entries() if e["kind"] == "gate"]

    def trials(self) -> int:
        """How many candidates a gate has judged."""
        return max((e["body"]["trial"] for e in self._log.entries() if e["kind"] == "gate"), default=0)

    def approve(self, version: str, *, by: str) -> None:
        """A person's word that ``version`` may be promoted."""
        if not by.strip():
            raise ConfigError("by is empty; give the name of the person who approves.")
        self._log.append("approve", {"version": self.version(version).id, "by": by})

    def approved(self, version: str) -> bool:
        """Whether a person approved it."""
        return any(e["kind"] == "approve" and e["body"]["version"] == version for e in self._log.entries())

    def promote(self, version: str, receipt: Receipt | None = None, *, note: str = "") -> Version:
        """Make ``version`` active on the strength of ``receipt``, or of the newest receipt in the log that passes it.

        Raises :class:`PromotionRefused` without a sealed receipt in the log that names this version and the active one as its
        incumbent, passes every check of :data:`REQUIRED` and shares no evidence with the candidate, or without the approval
        that this registry asks for; :class:`~telltale.world.evolve.chain.ConflictError` if another version became active in
        the meantime. A promotion that was made already, and was the last one, is not made twice. ``note`` is kept in the log.
        """
        wanted, count = self.version(version), len(self._log.entries())
        last = self._activations()[-1]
        if receipt is not None and last["kind"] == "promote" and last["body"]["receipt"] == receipt.seal:
            return wanted
        found = receipt if receipt is not None else self._newest_receipt(wanted.id)
        self._check_receipt(wanted, found)
        assert found is not None
        if self.needs_approval and not self.approved(wanted.id):
            raise PromotionRefused(
                f"version {wanted.id[:12]} passed its gate and waits for a person: telltale world registry promote."
            )
        body = {"version": wanted.id, "from": found.incumbent, "receipt": found.seal, "note": note}
        self._log.append("promote", body, expected=count)
        return wanted

    def check(self, version: str) -> Receipt:
        """The receipt on which ``version`` could be promoted now. Raises what :meth:`promote` does, approval apart."""
        wanted = self.version(version)
        found = self._newest_receipt(wanted.id)
        self._check_receipt(wanted, found)
        assert found is not None
        return found

    def _check_receipt(self, wanted: Version, receipt: Receipt | None) -> None:
        if receipt is None:
            raise PromotionRefused(f"version {wanted.id[:12]} has no receipt of a gate that it passed; judge it first.")
        check_seal(receipt)
        logged = {e["body"]["seal"] for e in self._log.entries() if e["kind"] == "gate"}
        missing = [name for name in REQUIRED if name not in receipt.checks]
        shared = set(wanted.evidence) & {name[:16] for name in receipt.evidence}
        problem = None
        if receipt.candidate != wanted.id:
            problem = f"is for {receipt.candidate[:12]}"
        elif receipt.seal not in logged:
            problem = "is not in the log; a gate records it there"
        elif missing:
            problem = f"lacks the checks {', '.join(missing)}"
        elif not receipt.passed:
            problem = f"did not pass: {', '.join(receipt.failed()) or 'checks were not run'}"
        elif shared:
            problem = f"rests on evidence that the candidate was fitted on ({next(iter(shared))})"
        elif self._withdrawn() & set(receipt.batches):
            problem = "rests on evidence that was quarantined since"
        if problem is not None:
            raise PromotionRefused(f"the receipt for version {wanted.id[:12]} {problem}.")
        if receipt.incumbent != self._active_id():
            raise ConflictError(
                f"version {wanted.id[:12]} was judged against {receipt.incumbent[:12]}, but {self._active_id()[:12]} is active "
                f"now; judge it again."
            )

    def rollback(
        self,
        *,
        to: str | None = None,
        reason: str = "asked for",
        quarantine: Sequence[str] = (),
        away_from: str | None = None,
        note: str = "",
    ) -> Version:
        """Make the version that was active before, or ``to``, active again; its bytes are checked first.

        ``quarantine``: keys of evidence batches that are withdrawn with it. ``away_from`` names the version that is given up:
        if it is not active any more, nothing is done. Raises :class:`~telltale.errors.ConfigError` if there is nothing to go
        back to, and :class:`~telltale.errors.CheckpointError` if the version's files are not as they were written.
        """
        count, now = len(self._log.entries()), self._active_id()
        if away_from is not None and now != away_from:
            return self.version(now)
        target = self._before(now) if to is None else self.version(to).id
        if target is None or target not in {e["body"]["version"] for e in self._activations()} or target == now:
            raise ConfigError(f"there is no earlier active version to go back to from {now[:12]}; see the log.")
        found = self.version(target)
        found.load()
        body = {"version": target, "from": now, "reason": reason, "quarantine": sorted(quarantine), "note": note}
        self._log.append("rollback", body, expected=count)
        return found

    def diff(self, first: str, second: str) -> dict[str, Any]:
        """What differs between two versions: kind, config, code, weights (largest change by tensor), evidence, words."""
        a, b = self.version(first), self.version(second)
        one, two = a.load(), b.load()
        changed: dict[str, Any] = {"from": a.id, "to": b.id}
        for key in ("kind", "weights"):
            if a.document[key] != b.document[key]:
                changed[key] = [a.document[key], b.document[key]]
        if a.document["about"].get("code") != b.document["about"].get("code"):
            changed["code"] = [side.document["about"].get("code") for side in (a, b)]
        changed["largest_change"] = _distances(one, two)
        words = [side.explain().splitlines() if hasattr(side, "explain") else [] for side in (one, two)]
        changed["removed"] = [line for line in words[0] if line not in words[1]]
        changed["added"] = [line for line in words[1] if line not in words[0]]
        changed["evidence_added"] = len(set(b.evidence) - set(a.evidence))
        changed["evidence_removed"] = len(set(a.evidence) - set(b.evidence))
        return changed

    def verify(self) -> Verification:
        """Check the chain, every version's bytes, and that every promotion has a receipt that passes."""
        found = Verification()
        for file, problem in self._log.findings():
            found.add(file, problem)
        if not found.ok:
            return found
        fresh = Registry(self.path)
        for name in fresh.versions():
            try:
                fresh.version(name)
            except TelltaleError as error:
                found.add(f"versions/{name[:12]}", str(error))
        active: str | None = None
        seals: dict[str, Receipt] = {}
        for entry in fresh.log():
            body = entry["body"]
            try:
                active = _followed(entry["kind"], body, active, seals)
            except (TelltaleError, KeyError, TypeError) as error:
                found.add(f"log/{entry['number']:08d}.json", str(error))
        return found

    def last_note(self) -> str:
        """The note of the newest promotion or rollback."""
        return str(self._activations()[-1]["body"].get("note", ""))

    def _activations(self) -> list[dict[str, Any]]:
        found = [e for e in self._log.entries() if e["kind"] in ACTIVATIONS]
        if not found:
            raise CheckpointError(f"{self.path} holds no version; add one.")
        return found

    def _active_id(self) -> str:
        return str(self._activations()[-1]["body"]["version"])

    def _before(self, name: str) -> str | None:
        """The version from which ``name`` took over, the last time."""
        for entry in reversed(self._activations()):
            if entry["body"]["version"] == name and entry["kind"] == "promote":
                return str(entry["body"]["from"])
        return None

    def _newest_receipt(self, version: str) -> Receipt | None:
        found = [r for r in self.receipts() if r.candidate == version and r.passed]
        return found[-1] if found else None

    def _withdrawn(self) -> set[str]:
        return {key for e in self._log.entries() if e["kind"] == "rollback" for key in e["body"]["quarantine"]}


def _followed(kind: str, body: dict[str, Any], active: str | None, seals: dict[str, Receipt]) -> str | None:
    """The active version after one entry. Raises :class:`PromotionRefused` for a promotion that its receipts do not carry."""
    if kind == "gate":
        receipt = Receipt.from_json(body)
        seals[receipt.seal] = receipt
    elif kind == "promote":
        receipt = seals[body["receipt"]]
        right = receipt.candidate == body["version"] and receipt.incumbent == active and receipt.passed
        if not right or [name for name in REQUIRED if name not in receipt.checks]:
            raise PromotionRefused(f"version {body['version'][:12]} became active without a receipt that passes it.")
    return str(body["version"]) if kind in ACTIVATIONS else active


def code_of(model: Any) -> str:
    """SHA-256 of the source of the model's module: other code is another version."""
    module = inspect.getmodule(type(model))
    try:
        return digest(inspect.getsource(module)) if module is not None else ""
    except (OSError, TypeError):
        return f"{type(model).__module__}.{type(model).__qualname__}"


def _distances(one: Any, two: Any) -> dict[str, float | None]:
    def numbers(model: Any) -> dict[str, Any]:
        return dict(model.state_dict() if hasattr(model, "state_dict") else getattr(model, "tensors", dict)())

    a, b = numbers(one), numbers(two)
    return {
        name: float((a[name].double() - b[name].double()).abs().max())
        if name in b and a[name].shape == b[name].shape
        else None
        for name in a
    }
