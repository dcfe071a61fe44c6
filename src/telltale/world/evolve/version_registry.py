"""The registry: immutable versions of a model, which of them is active, and the log of how that came about.

``versions/<id>/`` holds a model as :func:`telltale.world.save_model` writes it; the id is the hash of weights, config, code,
parent and evidence. ``log/`` is a :class:`~telltale.world.evolve.chain.ChainedLog`. What is active follows from the log alone:
the founding version, until a promotion or a rollback names another. Nothing is ever written in place.
"""

from __future__ import annotations

import inspect
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, ConfigError, TelltaleError, UnsupportedModelError
from telltale.runs.files import PARTIAL_PREFIX
from telltale.world.evolve.chain import ChainedLog, ConflictError, digest, flush_folder
from telltale.world.evolve.receipts import REQUIRED, ApprovalMissing, PromotionRefused, Receipt, check_seal, overspent
from telltale.world.models.saving import load_model, open_model, save_model
from telltale.world.verification import Verification

ACTIVATIONS = ("found", "promote", "rollback")
WORDS = ("approve", "decline")
KINDS = (*ACTIVATIONS, "add", "gate", *WORDS)
FORMAT = 2
"""What the entries of a life's registry and rounds mean, and how its receipts and alarms are computed. 2: gains by Hall's bound on
sixty episodes, success by paired starts, blocks watched in random order."""


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
    """The registry in ``path``. ``approval`` asks for a person's word before each promotion; it is fixed by the first version.

    Raises :class:`~telltale.errors.ConfigError` if ``approval`` is asked of a registry that was founded without.
    """

    def __init__(self, path: str | Path, *, approval: bool = False) -> None:
        self.path = Path(path)
        self._log = ChainedLog(self.path / "log")
        self._approval = approval
        self._read = 0
        if approval and not self.needs_approval:
            raise ConfigError(f"{self.path} was founded without approval; found a registry of its own with it.")

    def log(self) -> list[dict[str, Any]]:
        """All entries: number, kind, body, hash."""
        return list(self._entries())

    def _entries(self) -> list[dict[str, Any]]:
        """The log, if this telltale knows what each entry means: an unknown one could have changed what is active."""
        entries = self._log.entries()
        for entry in entries[self._read :]:
            if entry["number"] == 1:
                check_format(entry["body"].get("format"), self.path)
            if entry["kind"] not in KINDS:
                raise CheckpointError(f"{self.path} is a registry of a newer telltale; this one reads format {FORMAT}.")
            self._read += 1
        return entries

    @property
    def needs_approval(self) -> bool:
        """Whether a promotion waits for :meth:`approve`."""
        entries = self._entries()
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
        changes nothing. Raises :class:`~telltale.errors.ConfigError` for a parent that is not here, and
        :class:`~telltale.errors.UnsupportedModelError` for a model that could not be read back.
        """
        entries = self._entries()
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not write {folder}: {error}.") from error
        aside = folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"
        try:
            name = save_model(model, aside, about=known)
            try:
                open_model(aside)
            except CheckpointError as error:
                words = str(error).replace(str(aside), "its folder")
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be kept in a registry, because it cannot be read back: {words}"
                ) from error
            try:
                if not (folder / name).exists():
                    aside.rename(folder / name)
                    flush_folder(folder)
            except OSError:
                if not (folder / name).is_dir():  # else another process has just written the same version
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if not any(e["kind"] in ("found", "add") and e["body"]["version"] == name for e in self._entries()):
            kind = "add" if self._entries() else "found"
            body = {"version": name, "parent": parent, "kind": model.describe()["kind"]}
            if kind == "found":
                body |= {"approval": self._approval, "format": FORMAT}
            self._log.append(kind, body, expected=0 if kind == "found" else None)
        return self.version(name)

    def version(self, name: str) -> Version:
        """The version whose id begins with ``name``. Raises :class:`~telltale.errors.ConfigError` unless exactly one does."""
        folder = self.path / "versions"
        known = folder.is_dir() and re.fullmatch("[0-9a-f]+", name)
        found = [p for p in sorted(folder.glob(f"{name}*")) if p.is_dir()] if known else []
        if len(found) != 1:
            raise ConfigError(f"{name!r} names {len(found)} versions of {self.path}; expected the start of one id.")
        document = open_model(found[0])[1]
        if document["id"] != found[0].name:
            raise CheckpointError(f"{found[0]} holds version {document['id'][:12]}; restore the folder.")
        return Version(found[0].name, found[0], document)

    def versions(self) -> list[str]:
        """Ids in the order in which they were added."""
        return [e["body"]["version"] for e in self._entries() if e["kind"] in ("found", "add")]

    def active(self) -> Version:
        """The version that acts. Raises :class:`~telltale.errors.CheckpointError` for an empty registry."""
        return self.version(self._active_id())

    def record(self, receipt: Receipt) -> Receipt:
        """Write a gate's receipt to the log, passed or not. The same one again changes nothing.

        Raises :class:`PromotionRefused` for a broken seal or a trial number that another receipt has.
        """
        check_seal(receipt)
        while True:
            entries = self._entries()
            for entry in entries:
                if entry["kind"] == "gate" and entry["body"]["trial"] == receipt.trial:
                    if entry["body"]["seal"] == receipt.seal:
                        return receipt
                    raise PromotionRefused(
                        f"trial {receipt.trial} was taken by another candidate; judge with the next number."
                    )
            try:
                self._log.append("gate", asdict(receipt), expected=len(entries))
            except ConflictError:  # another process wrote, perhaps a receipt with this number
                continue
            return receipt

    def receipts(self) -> list[Receipt]:
        """All receipts, oldest first."""
        return [Receipt.from_json(e["body"]) for e in self._entries() if e["kind"] == "gate"]

    def trials(self) -> int:
        """How many candidates a gate has judged."""
        return max((e["body"]["trial"] for e in self._entries() if e["kind"] == "gate"), default=0)

    def next_trial(self, after: int, *, life_round: int | None = None) -> int:
        """The first number beyond ``after`` that no other candidate took. Those of the versions that ``life_round`` of a life made
        are its own: a process that was killed in this round had come so far."""
        taken = {
            r.trial
            for r in self.receipts()
            if r.trial > after and self.version(r.candidate).document["about"].get("round", -1) != life_round
        }
        return next(n for n in count(after + 1) if n not in taken)

    def approve(self, version: str, *, by: str) -> None:
        """A person's word that ``version`` may be promoted."""
        self._say("approve", version, by)

    def decline(self, version: str, *, by: str) -> None:
        """A person's word that it may not: a life that waits for it goes on without."""
        self._say("decline", version, by)

    def _say(self, kind: str, version: str, by: str) -> None:
        if not by.strip():
            raise ConfigError("by is empty; give the name of the person who decides.")
        self._log.append(kind, {"version": self.version(version).id, "by": by})

    def word(self, version: str) -> str | None:
        """The last word, ``approve`` or ``decline``, that a person gave since the present version became active: one given before
        was on another case."""
        said = [e["kind"] for e in self._since_activation() if e["kind"] in WORDS and e["body"]["version"] == version]
        return said[-1] if said else None

    def approved(self, version: str) -> bool:
        """Whether a person's last word on it is that it may be promoted."""
        return self.word(version) == "approve"

    def promote(self, version: str, receipt: Receipt | None = None, *, note: str = "") -> Version:
        """Make ``version`` active on the strength of ``receipt``, or of the newest receipt in the log that passes it.

        Raises :class:`PromotionRefused` without a sealed receipt in the log that names this version and the active one as its
        incumbent, passes every check of :data:`REQUIRED`, shares no evidence with the candidate and was given since the
        incumbent became active (a receipt serves once: what was rolled back is judged again), or without the approval
        that this registry asks for; :class:`~telltale.world.evolve.chain.ConflictError` if another version became active in
        the meantime. A promotion that was made already, and was the last one, is not made twice. ``note`` is kept in the log.
        """
        wanted = self.version(version)
        while True:
            length, last = len(self._entries()), self._activations()[-1]
            if receipt is not None and last["kind"] == "promote" and last["body"]["receipt"] == receipt.seal:
                return wanted
            found = receipt if receipt is not None else self._newest_receipt(wanted.id)
            self._check_receipt(wanted, found)
            assert found is not None
            if self.needs_approval and not self.approved(wanted.id):
                raise ApprovalMissing(
                    f"version {wanted.id[:12]} passed its gate and waits for a person: telltale world registry promote."
                )
            body = {"version": wanted.id, "from": found.incumbent, "receipt": found.seal, "note": note}
            try:
                self._log.append("promote", body, expected=length)
            except ConflictError:  # another process wrote: the receipt is checked against what holds now
                continue
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
        logged = {e["body"]["seal"] for e in self._entries() if e["kind"] == "gate"}
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
        elif overspent(receipt):
            problem = f"spends {receipt.alpha:.2g}, more than trial {receipt.trial} may"
        elif self._withdrawn() & set(receipt.batches):
            problem = "rests on evidence that was quarantined since"
        if problem is not None:
            raise PromotionRefused(f"the receipt for version {wanted.id[:12]} {problem}.")
        if receipt.incumbent != self._active_id():
            raise ConflictError(
                f"version {wanted.id[:12]} was judged against {receipt.incumbent[:12]}, but {self._active_id()[:12]} is active "
                f"now; judge it again."
            )
        if receipt.seal not in {e["body"]["seal"] for e in self._since_activation() if e["kind"] == "gate"}:
            raise PromotionRefused(
                f"the receipt for version {wanted.id[:12]} is older than the last promotion or rollback; judge it again."
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
        length, now = len(self._entries()), self._active_id()
        if away_from is not None and now != away_from:
            return self.version(now)
        target = self._before(now) if to is None else self.version(to).id
        if target is None or target not in {e["body"]["version"] for e in self._activations()} or target == now:
            raise ConfigError(f"there is no earlier active version to go back to from {now[:12]}; see the log.")
        found = self.version(target)
        found.load()
        body = {"version": target, "from": now, "reason": reason, "quarantine": sorted(quarantine), "note": note}
        self._log.append("rollback", body, expected=length)
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
        found = self._log.verify()
        if not found.ok:
            return found
        fresh = Registry(self.path)
        for name in fresh.versions():
            try:
                fresh.version(name)
            except TelltaleError as error:
                found.add(f"versions/{name[:12]}", str(error))
        history = _History()
        for entry in fresh.log():
            try:
                history.follow(entry)
            except (TelltaleError, KeyError, TypeError) as error:
                found.add(f"log/{entry['number']:08d}.json", str(error))
        return found

    def last_note(self) -> str:
        """The note of the newest promotion or rollback."""
        return str(self._activations()[-1]["body"].get("note", ""))

    def _since_activation(self) -> list[dict[str, Any]]:
        """Entries after the one by which the active version became active."""
        entries = self._entries()
        last = max((n for n, e in enumerate(entries) if e["kind"] in ACTIVATIONS), default=-1)
        return entries[last + 1 :]

    def _activations(self) -> list[dict[str, Any]]:
        found = [e for e in self._entries() if e["kind"] in ACTIVATIONS]
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
        return {key for e in self._entries() if e["kind"] == "rollback" for key in e["body"]["quarantine"]}


class _History:
    """The log followed from its beginning, as a registry would have written it."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.earlier: set[str] = set()
        self.asks = False
        self.approved: set[str] = set()
        self.trials: set[int] = set()
        self.receipts: dict[str, Receipt] = {}

    def follow(self, entry: dict[str, Any]) -> None:
        """Take one entry. Raises :class:`PromotionRefused` for one that no registry writes."""
        kind, body = entry["kind"], entry["body"]
        if kind == "gate":
            receipt = Receipt.from_json(body)
            if receipt.trial in self.trials or overspent(receipt):
                raise PromotionRefused(f"trial {receipt.trial} is taken twice, or spends more than it may.")
            self.trials.add(receipt.trial)
            self.receipts[receipt.seal] = receipt
        elif kind == "approve":
            self.approved.add(body["version"])
        elif kind == "decline":
            self.approved.discard(body["version"])
        if kind not in ACTIVATIONS:
            return
        version = str(body["version"])
        problem = self._objection(kind, entry["number"], version, body)
        # a forged activation counts all the same: it is what a reader of the log would act by
        self.active = version
        self.earlier.add(version)
        self.asks = bool(body["approval"]) if kind == "found" else self.asks
        self.approved, self.receipts = set(), {}
        if problem:
            raise PromotionRefused(f"version {version[:12]} became active {problem}.")

    def _objection(self, kind: str, number: int, version: str, body: dict[str, Any]) -> str:
        if kind == "found":
            return "" if number == 1 else "by a second founding"
        if kind == "rollback":
            right = body["from"] == self.active and version in self.earlier and version != self.active
            return "" if right else "by a rollback to what was not active before"
        receipt = self.receipts.get(body["receipt"])
        if receipt is None or (receipt.candidate, receipt.incumbent) != (version, self.active) or not receipt.passed:
            return "without a receipt that passes it"
        if [name for name in REQUIRED if name not in receipt.checks]:
            return "without a receipt that passes it"
        return "without the approval that is asked for" if self.asks and version not in self.approved else ""


def check_format(stated: Any, what: str | Path) -> None:
    """Raise :class:`~telltale.errors.CheckpointError` unless a life was written in the format that is read here: by other rules it
    would look forged."""
    if stated != FORMAT:
        raise CheckpointError(f"{what} was written by format {stated}; this version of telltale reads format {FORMAT}.")


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
