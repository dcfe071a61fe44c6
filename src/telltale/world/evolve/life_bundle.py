"""The reproducible package (MREP) of a whole life: registry, evidence, rounds, certificate, card and page, under one manifest.

It holds every version, every receipt with the evidence that it rests on, and for every episode the start, the actions and the hash
of what was observed. :func:`verify_life` checks hashes and chains, computes receipts again, and plays episodes again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, MissingExtraError, TelltaleError
from telltale.runs.files import PARTIAL_PREFIX, atomic_directory, strict_json
from telltale.world.certificate import Certificate
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.gates import OWN_PROBES, GateConfig, probe_starts, random_episodes, recomputed
from telltale.world.evolve.level_three import RULES, recorded, replayed_differently
from telltale.world.evolve.life import LifeLog, Round, contiguous
from telltale.world.evolve.life_page import line, page
from telltale.world.evolve.receipts import Receipt
from telltale.world.evolve.version_registry import FORMAT, Registry, check_format
from telltale.world.mrep import MANIFEST, file_hash, seal
from telltale.world.transitions import Transitions
from telltale.world.verification import Verification
from telltale.world.worlds.base import World
from telltale.world.worlds.changing import Changing
from telltale.world.worlds.registry import make

KIND = "life"
FOLDERS = ("log", "versions", "evidence", "life")


def write_life(path: str | Path, out: str | Path, *, world: World, certificate: Certificate | None = None) -> Path:
    """Write the bundle of the life in ``path`` to ``out``, whole or not at all. The life itself is not touched.

    ``page.html`` needs Plotly; without it the card says so.
    """
    registry, life = Registry(path), LifeLog(Path(path) / "life")
    with atomic_directory(out) as folder:
        for name in (n for n in FOLDERS if (Path(path) / n).is_dir()):  # a short life may have no evidence yet
            shutil.copytree(Path(path) / name, folder / name, ignore=shutil.ignore_patterns(f"{PARTIAL_PREFIX}*"))
        missing = ""
        try:
            page(path, certificate).save(folder / "page.html")
        except MissingExtraError as error:
            missing = f"\nThere is no page.html: {error}\n"
        document = None if certificate is None else strict_json(certificate.summary())
        if document is not None:
            (folder / "certificate.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        (folder / "card.md").write_text(_card(registry, life, document) + missing)
        manifest: dict[str, Any] = {
            "version": FORMAT, "kind": KIND,
            "world": {
                "id": world.id, "settings": world.settings(), "task_hash": world.task_hash(), "engines": world.versions(),
                "rebuildable": all(place.rebuildable() for _, place in getattr(world, "phases", [(0, world)])),
            },
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
    """Check the bundle of a life, and play ``replay`` of its episodes again in ``world`` (the changing one that was lived in);
    None builds it from the bundle, where that is possible.

    Raises :class:`~telltale.errors.CheckpointError` if it is no such bundle, or one of another format.
    """
    folder = Path(bundle)
    if not is_life(folder):
        raise CheckpointError(f"{folder} is no bundle of a life; write one with telltale world evolve --bundle.")
    found, manifest = Verification(), json.loads((folder / MANIFEST).read_text())
    if manifest.get("seal") == seal(manifest):
        check_format(manifest.get("version"), folder)
    else:
        found.add(MANIFEST, "was changed after it was sealed")
    files = manifest.get("files", {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} names no files with their hashes; restore it.")
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    for name in sorted(there ^ set(files)):
        found.add(name, "is missing" if name in files else "is not in the manifest")
    for name in sorted(there & set(files)):
        if file_hash(folder / name) != files[name]:
            found.add(name, "was changed: its hash is not the manifest's")
    found.replay = "not replayed: the records are not whole"
    damaged = LifeLog(folder / "life").findings()
    for file, problem in damaged:
        found.add(file, problem)
    if damaged:
        return found
    try:
        _check_records(folder, manifest, found)
        _replay(folder, manifest["world"], world, replay, found)
    except (TelltaleError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        found.add("life", f"{type(error).__name__}: {error}")
    return found


def _check_records(folder: Path, manifest: dict[str, Any], found: Verification) -> None:
    """Registry, evidence and rounds, each by itself and against one another."""
    registry, evidence, life = Registry(folder), Evidence(folder / "evidence"), LifeLog(folder / "life")
    for place, findings in (("", registry.verify().findings), ("evidence/", evidence.verify().findings)):
        for finding in findings:
            found.add(f"{place}{finding.file}", finding.problem)
    whole = not found.findings
    rounds = life.rounds()
    if not contiguous(rounds):
        found.add("life", "has rounds that do not follow from one another")
    if manifest.get("head") != life.head() or manifest.get("active") != registry.active().id:
        found.add(MANIFEST, "names another end of the life, or another active version")
    for receipt in registry.receipts():
        sides = registry.version(receipt.candidate).load(), registry.version(receipt.incumbent).load()
        if not recomputed(receipt, evidence, *sides):
            found.add("log", f"the receipt of trial {receipt.trial} does not follow from its evidence")
    for problem in disagreements(rounds, registry):
        found.add("life", problem)
    document = _check_claim(folder, manifest, found)
    if document is not None and whole:
        for name, condition in recorded(rounds, registry, evidence).items():
            if document["conditions"].get(name) != strict_json(asdict(condition)):
                found.add("certificate.json", f"states another {name} than follows from the life: {condition.reason}")
    if not (folder / "card.md").read_text().startswith(_card(registry, life, document)):
        found.add("card.md", "tells another story than the life and its certificate")


def _replay(folder: Path, described: dict[str, Any], world: World | None, count: int, found: Verification) -> None:
    """Episodes, and the evidence of the gate, once more on the engine."""
    try:
        here = world if world is not None else _rebuilt(described)
    except (TelltaleError, ImportError) as error:
        found.replay = f"not replayed: {error}"
        return
    if here is None:
        found.replay = "not replayed: the world was built of the user's own objects; give it as world="
        return
    if not here.deterministic:
        found.replay = f"not replayed: {here.id} does not repeat itself"
        return
    if here.task_hash() != described["task_hash"]:
        found.add(MANIFEST, f"names another task than {here.id} is here (task_hash)")
    for name, stated in described.get("engines", {}).items():
        if here.versions().get(name) != stated:
            found.add(MANIFEST, f"was made with {name} {stated}; here is {here.versions().get(name)}")
    registry, evidence, life = Registry(folder), Evidence(folder / "evidence"), LifeLog(folder / "life")
    rounds = life.rounds()
    wrong = replayed_differently(rounds, here, count)
    for seed in wrong:
        found.add("life", f"the engine does not repeat the episode of start {seed}")
    for trial in probes_differ(life, registry, evidence, here):
        found.add("evidence", f"the engine does not give the gate's own evidence of trial {trial}")
    found.episodes = min(count, sum(len(r.episodes) for r in rounds))
    found.replayed = found.episodes - len(wrong)
    found.replay = f"{found.replayed} of {found.episodes} episodes replayed bit for bit"


def _rebuilt(described: dict[str, Any]) -> World | None:
    """The world of a manifest, phase by phase; None where the user's own objects are needed."""
    if not described.get("rebuildable"):
        return None
    phases = described["settings"].get("phases")
    if phases is None:
        return make(described["id"], **described["settings"])
    return Changing([(first, make(described["id"], **settings)) for first, settings in phases])


def disagreements(rounds: Sequence[Round], registry: Registry) -> list[str]:
    """Where what the rounds tell is not what the registry's log or their episodes hold: a promotion or rollback of one only, a
    candidate that was judged on fewer regression cases than there were, a rate of success that is another, a stranger who acted."""
    receipts = {r.seal: r for r in registry.receipts()}
    log = [(e["kind"], e["body"]) for e in registry.log() if e["kind"] in ("promote", "rollback")]
    kept = {(kind, body["version"], body.get("receipt", body["note"])) for kind, body in log}
    own = {(k, body["version"], body.get("receipt", body["note"])) for k, body in log if body["note"]}
    told, cases, found, versions = set(), 0, [], set(registry.versions())
    for done in rounds:
        wins = [episode["success"] for episode in done.episodes]
        if wins and done.figures.get("success") != sum(wins) / len(wins):
            found.append(f"round {done.number} states a success that its episodes do not have")
        if {episode["by"] for episode in done.episodes} - versions:
            found.append(f"an episode of round {done.number} was played by no version of the registry")
        for event in done.events:
            if event["what"] in ("promotion", "rollback"):
                kind = "promote" if event["what"] == "promotion" else "rollback"
                told.add((kind, event["version"], event.get("receipt", f"round {done.number}")))
            if event["what"] == "gate":
                found += _dropped(receipts.get(event["receipt"]), cases)
        cases += sum(bool(case["actions"]) for event in done.events for case in event.get("cases", []))
    for kind, version, _ in sorted((told - kept) | (own - told)):
        found.append(f"a {kind} of version {version[:12]} stands in the life alone, or in the registry alone")
    return found


def _dropped(receipt: Receipt | None, cases: int) -> list[str]:
    if receipt is None:
        return ["a candidate was judged whose receipt is not in the registry"]
    figures = receipt.checks["regression"].figures
    judged = figures["cases"] + figures["retired"] if figures else cases
    return [] if judged == cases else [f"trial {receipt.trial} was judged on {judged} regression cases of {cases}"]


def probes_differ(life: LifeLog, registry: Registry, evidence: Evidence, world: World) -> list[int]:
    """Trials of the promotions whose evidence, said to be the gate's own, the engine does not give when it is collected again."""
    about, rounds = life.about(), life.rounds()
    config, batches = GateConfig(**about["gate"]), {b.key: b for b in evidence.batches()}
    receipts, wrong = {r.seal: r for r in registry.receipts()}, []
    judged = {e["receipt"]: r.number for r in rounds for e in r.events if e["what"] == "gate"}
    for name in sorted(e["receipt"] for r in rounds for e in r.events if e["what"] == "promotion"):
        receipt, number = receipts[name], judged[name]
        if hasattr(world, "clock"):
            world.clock = rounds[number - 2].state.steps if number > 1 else 0
        given: set[str] = set()
        for batch in (batches[key] for key in receipt.batches if batches[key].source == OWN_PROBES):
            starts = probe_starts(config, about["seed"], int(batch.note.removeprefix("trial ")))
            again = Transitions.from_episodes(world, random_episodes(world, starts, config.length))
            own = {n[:16] for n in evidence.read(batch.key).ids()}
            given |= own - {n[:16] for n in again.ids()}
        if given & set(receipt.evidence):
            wrong.append(receipt.trial)
    return wrong


def _check_claim(folder: Path, manifest: dict[str, Any], found: Verification) -> dict[str, Any] | None:
    """The certificate's document, if there is one, and whether its level is what its conditions give."""
    level, document = 0, None
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
    return document


def _card(registry: Registry, life: LifeLog, certificate: dict[str, Any] | None) -> str:
    """The card; ``certificate`` is its document, as a bundle keeps it."""
    rounds = life.rounds()
    claim = "Not certified: no level is claimed." if certificate is None else f"**Level {certificate['level']}** of 3."
    lines = [f"# A life in {life.about()['world']}", "", claim, "", f"Active version: `{registry.active().id}`", ""]
    if certificate is not None:
        lines += ["| level | condition | status | why |", "|---|---|---|---|"]
        for name, c in certificate["conditions"].items():
            lines.append(f"| {c['level']} | {name} | {c['status']} | {c['reason']} |")
        lines += ["", "## Rules of level 3", "", *(f"* {name}: {rule}" for name, rule in RULES.items()), ""]
    lines += ["## Rounds", ""]
    for done in rounds:
        lines.append(f"* {line(done)}")
        lines += [f"    * {event['what']}: {event['words']}" for event in done.events]
    settings = asdict(rounds[-1].state) if rounds else {}
    lines += ["", f"Steps of probes and gates: {settings.get('probe_steps', 0)} and {settings.get('gate_steps', 0)}."]
    return "\n".join(lines) + "\n"
