"""The reproducible package (MREP) of a whole life: registry, evidence, rounds, certificate, card and page, under one manifest.

It holds every version, every receipt with the evidence that it rests on, and for every episode the start, the actions and the hash
of what was observed. :func:`verify_life` checks hashes and chains, computes receipts again, and plays episodes again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, MissingExtraError, TelltaleError
from telltale.runs.files import PARTIAL_PREFIX, atomic_directory, strict_json
from telltale.world.certificate import Certificate
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.gates import recomputed
from telltale.world.evolve.level_three import RULES, replayed_differently
from telltale.world.evolve.life import LifeLog, contiguous
from telltale.world.evolve.life_page import line, page
from telltale.world.evolve.version_registry import Registry
from telltale.world.mrep import MANIFEST, file_hash, seal
from telltale.world.verification import Verification
from telltale.world.worlds.base import World

KIND = "life"
FOLDERS = ("log", "versions", "evidence", "life")


def write_life(path: str | Path, out: str | Path, *, world: World, certificate: Certificate | None = None) -> Path:
    """Write the bundle of the life in ``path`` to ``out``, whole or not at all. The life itself is not touched.

    ``page.html`` needs Plotly; without it the card says so.
    """
    registry, life = Registry(path), LifeLog(Path(path) / "life")
    with atomic_directory(out) as folder:
        for name in FOLDERS:
            shutil.copytree(Path(path) / name, folder / name, ignore=shutil.ignore_patterns(f"{PARTIAL_PREFIX}*"))
        missing = ""
        try:
            page(path, certificate).save(folder / "page.html")
        except MissingExtraError as error:
            missing = f"\nThere is no page.html: {error}\n"
        if certificate is not None:
            document = strict_json(certificate.summary())
            (folder / "certificate.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        (folder / "card.md").write_text(_card(registry, life, certificate) + missing)
        manifest: dict[str, Any] = {
            "version": 1, "kind": KIND,
            "world": {"id": world.id, "settings": world.settings(), "task_hash": world.task_hash(), "engines": world.versions()},
            "packages": {name: importlib.metadata.version(name) for name in ("telltale", "torch", "numpy")},
            "python": platform.python_version(), "head": life.head(), "active": registry.active().id,
            "level_claimed": certificate.level if certificate is not None else 0,
        }  # fmt: skip
        manifest["files"] = {str(f.relative_to(folder)): file_hash(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        manifest["seal"] = seal(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Path(out)


def is_life(bundle: str | Path) -> bool:
    """Whether a folder is the bundle of a life."""
    try:
        return bool(json.loads((Path(bundle) / MANIFEST).read_text()).get("kind") == KIND)
    except (OSError, ValueError, AttributeError):
        return False


def verify_life(bundle: str | Path, *, world: World | None = None, replay: int = 20) -> Verification:
    """Check the bundle of a life; with ``world`` (the changing one that was lived in) ``replay`` episodes are played again.

    Raises :class:`~telltale.errors.CheckpointError` if it is no such bundle.
    """
    folder = Path(bundle)
    if not is_life(folder):
        raise CheckpointError(f"{folder} is no bundle of a life; write one with telltale world evolve -o.")
    found, manifest = Verification(), json.loads((folder / MANIFEST).read_text())
    if manifest.get("seal") != seal(manifest):
        found.add(MANIFEST, "was changed after it was sealed")
    files = dict(manifest.get("files", {}))
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    for name in sorted(there ^ set(files)):
        found.add(name, "is missing" if name in files else "is not in the manifest")
    for name in sorted(there & set(files)):
        if file_hash(folder / name) != files[name]:
            found.add(name, "was changed: its hash is not the manifest's")
    registry, evidence, life = Registry(folder), Evidence(folder / "evidence"), LifeLog(folder / "life")
    try:
        for part in (registry.verify(), evidence.verify()):
            for finding in part.findings:
                found.add(finding.file, finding.problem)
        rounds = life.rounds()
        if not contiguous(rounds):
            found.add("life", "has rounds that do not follow from one another")
        if manifest.get("head") != life.head() or manifest.get("active") != registry.active().id:
            found.add(MANIFEST, "names another end of the life, or another active version")
        for receipt in registry.receipts():
            sides = registry.version(receipt.candidate).load(), registry.version(receipt.incumbent).load()
            if receipt.checks["gain"].figures and not recomputed(receipt, evidence, *sides):
                found.add("log", f"the receipt of trial {receipt.trial} does not follow from its evidence")
    except (TelltaleError, KeyError, TypeError) as error:
        found.add("life", str(error))
        return found
    _check_claim(folder, manifest, found)
    found.replay = "not replayed: pass the world that was lived in"
    if world is not None and world.deterministic:
        wrong = replayed_differently(rounds, world, replay)
        for seed in wrong:
            found.add("life", f"the engine does not repeat the episode of start {seed}")
        found.episodes = min(replay, sum(len(r.episodes) for r in rounds))
        found.replayed = found.episodes - len(wrong)
        found.replay = f"{found.replayed} of {found.episodes} episodes replayed bit for bit"
    return found


def _check_claim(folder: Path, manifest: dict[str, Any], found: Verification) -> None:
    level = 0
    if (folder / "certificate.json").is_file():
        document = json.loads((folder / "certificate.json").read_text())
        statuses = {c["level"]: [] for c in document["conditions"].values()}  # type: dict[int, list[str]]
        for condition in document["conditions"].values():
            statuses[condition["level"]].append(condition["status"])
        while statuses.get(level + 1) and all(status == "pass" for status in statuses[level + 1]):
            level += 1
        if document["level"] != level:
            found.add("certificate.json", f"states level {document['level']}; its conditions give {level}")
    if manifest.get("level_claimed") != level:
        found.add(MANIFEST, f"claims level {manifest.get('level_claimed')}; the conditions give {level}")


def _card(registry: Registry, life: LifeLog, certificate: Certificate | None) -> str:
    rounds = life.rounds()
    claim = "Not certified: no level is claimed." if certificate is None else f"**Level {certificate.level}** of 3."
    lines = [f"# A life in {life.about()['world']}", "", claim, "", f"Active version: `{registry.active().id}`", ""]
    if certificate is not None:
        lines += ["| level | condition | status | why |", "|---|---|---|---|"]
        lines += [f"| {c.level} | {name} | {c.status} | {c.reason} |" for name, c in certificate.conditions.items()]
        lines += ["", "## Rules of level 3", "", *(f"* {name}: {rule}" for name, rule in RULES.items()), ""]
    lines += ["## Rounds", ""]
    for done in rounds:
        lines.append(f"* {line(done)}")
        lines += [f"    * {event['what']}: {event['words']}" for event in done.events]
    settings = asdict(rounds[-1].state) if rounds else {}
    lines += ["", f"Steps of probes and gates: {settings.get('probe_steps', 0)} and {settings.get('gate_steps', 0)}."]
    return "\n".join(lines) + "\n"
