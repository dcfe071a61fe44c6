"""``verify``: is a bundle what it says? Hashes, statistics computed again, and every episode replayed on the engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, ConfigError, TelltaleError
from telltale.runs.files import strict_json
from telltale.world.card import claim
from telltale.world.certificate import Certificate, Condition
from telltale.world.mrep import MANIFEST, VERSION, coverage_of, file_hash, seal, statistics_of
from telltale.world.records import plain_value
from telltale.world.worlds.base import Episode, World
from telltale.world.worlds.registry import make, names


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the bundle says, and the file in which."""

    file: str
    problem: str


@dataclass
class Verification:
    """``ok`` where nothing was found. ``replayed`` episodes were bit-equal; ``replay`` says what was done or why not."""

    findings: list[Finding] = field(default_factory=list)
    replayed: int = 0
    episodes: int = 0
    replay: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bundle is what it says."""
        return not self.findings

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {"ok": self.ok, "findings": [asdict(f) for f in self.findings], "replayed": self.replayed,
                "episodes": self.episodes, "replay": self.replay}  # fmt: skip

    def add(self, file: str, problem: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(file, problem))


def verify(bundle: str | Path, *, world: World | None = None) -> Verification:
    """Check the bundle's hashes, compute its statistics, its level and its coverage again, and replay its traces.

    ``world`` is needed for a world that :func:`telltale.world.make` cannot build from the manifest (the user's own object); it is
    not stepped itself, but spawned.

    Raises :class:`~telltale.errors.CheckpointError` if ``bundle`` is no bundle at all.
    """
    folder = Path(bundle)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} is no bundle: it has no {MANIFEST}. Write one with telltale world evaluate -o."
        )
    found = Verification()
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sealed = manifest["seal"] == seal(manifest) and manifest["version"] == VERSION
        files, seeds = dict(manifest["files"]), list(manifest["seeds"])
        hard, claimed = list(manifest["laws"]["hard"]), int(manifest["level_claimed"])
        described = {name: manifest["world"][name] for name in _DESCRIBED}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.add(MANIFEST, f"cannot be read: {type(error).__name__}: {error}")
        return found
    if not sealed:
        found.add(MANIFEST, "was changed after it was sealed, or is of another version")
    _check_files(folder, files, found)
    traces = _read_traces(folder, files, seeds, found)
    if traces is None:
        found.replay = "not replayed: the traces cannot be read"
        return found
    _check_statistics(folder, traces, hard, found)
    _check_certificate(folder, files, traces, described["regime"], claimed, found)
    _replay(described, traces, world, found)
    return found


_DESCRIBED = (
    "id", "settings", "regime", "task_hash", "rebuildable", "deterministic", "receipts_deterministic", "engines",
)  # fmt: skip


def _check_files(folder: Path, files: dict[str, str], found: Verification) -> None:
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    for name in sorted(set(files) - there):
        found.add(name, "is missing")
    for name in sorted(there - set(files)):
        found.add(name, "is not in the manifest")
    for name in sorted(there & set(files)):
        if file_hash(folder / name) != files[name]:
            found.add(name, "was changed: its hash is not the manifest's")


Trace = tuple[str, dict[str, Any], list[dict[str, Any]]]


_ROW = ("t", "observation", "action", "predicted", "next", "reward", "terminated", "truncated", "broken", "receipt")


def _read_traces(folder: Path, files: dict[str, str], seeds: list[int], found: Verification) -> list[Trace] | None:
    listed = sorted(name for name in files if name.startswith("traces/"))
    if not listed:
        found.add(MANIFEST, "lists no traces")
        return None
    traces: list[Trace] = []
    for name in listed:
        try:
            head, *rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            if not (isinstance(head, dict) and isinstance(head.get("success"), bool) and "seed" in head):
                raise ValueError("its first line lacks the seed or the success")
            for number, row in enumerate(rows, start=2):
                missing = [key for key in _ROW if not (isinstance(row, dict) and key in row)]
                if missing:
                    raise ValueError(f"line {number} lacks {', '.join(missing)}")
                if not isinstance(row["broken"], dict) or not isinstance(row["reward"], (int, float)):
                    raise ValueError(f"line {number} has a reward or verdicts of the wrong kind")
            traces.append((name, head, rows))
        except (OSError, ValueError) as error:
            found.add(name, f"cannot be read: {error}")
    if len(traces) < len(listed):
        return None
    if [head["seed"] for _, head, _ in traces] != seeds:
        found.add(MANIFEST, "lists other seeds than the traces")
    found.episodes = len(traces)
    return traces


def _loaded(folder: Path, name: str, found: Verification) -> dict[str, Any] | None:
    try:
        document = json.loads((folder / name).read_text())
        if not isinstance(document, dict):
            raise ValueError(f"it holds {type(document).__name__}")
        return document
    except (OSError, ValueError) as error:
        found.add(name, f"cannot be read: {error}")
        return None


def _check_statistics(folder: Path, traces: list[Trace], hard: list[str], found: Verification) -> None:
    try:
        again = statistics_of([rows for _, _, rows in traces], [head["success"] for _, head, _ in traces], hard)
    except (TelltaleError, TypeError) as error:
        found.add(traces[0][0], f"or another trace gives no statistics: {error}")
        return
    stated = _loaded(folder, "stats.json", found)
    if stated is None:
        return
    again = json.loads(json.dumps(strict_json(again)))
    wrong = [key for key in again if stated.get(key) != again[key]]
    if wrong:
        found.add("stats.json", f"does not follow from the traces: {', '.join(wrong)}")


def _check_certificate(
    folder: Path, files: dict[str, str], traces: list[Trace], regime: str, claimed: int, found: Verification
) -> None:
    """What follows from what: the level from the conditions, the coverage from them, failures from the traces, the card's claim."""
    won = [head["success"] for _, head, _ in traces]
    level, requested, statuses, paired = None, None, {}, False
    if "certificate.json" in files:
        document = _loaded(folder, "certificate.json", found)
        if document is None:
            return
        try:
            conditions = {name: Condition(**entry) for name, entry in document["conditions"].items()}
            rebuilt = Certificate("", "", int(document["requested_level"]), conditions)
            level, requested, paired = rebuilt.level, rebuilt.requested, document["oracle_asr"] is not None
            statuses = {name: condition.status for name, condition in conditions.items()}
            if document["level"] != level:
                found.add("certificate.json", f"states level {document['level']}; its conditions give {level}")
            if document["asr"] != sum(won) / len(won):
                found.add(
                    "certificate.json", f"states the ASR {document['asr']}; the traces give {sum(won) / len(won)}"
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.add("certificate.json", f"cannot be read: {type(error).__name__}: {error}")
            return
    if claimed != (level or 0):
        found.add(MANIFEST, f"claims level {claimed}; the conditions give {level or 0}")
    coverage = _loaded(folder, "coverage.json", found)
    if coverage is not None and coverage != coverage_of(regime, statuses, episodes=len(traces), paired=paired):
        found.add("coverage.json", "does not follow from the certificate")
    labels = _loaded(folder, "failures.json", found)
    if labels is not None and labels.get("taxonomy") == "applied":
        lost = [head["seed"] for _, head, _ in traces if not head["success"]]
        if [entry.get("seed") for entry in labels.get("failures", [])] != lost:
            found.add("failures.json", "labels other starts than those that failed")
    card = folder / "card.md"
    if card.is_file() and claim(level, requested) not in card.read_text(errors="replace"):
        found.add("card.md", f"does not say what the certificate does: {claim(level, requested)}")


def _replay(described: dict[str, Any], traces: list[Trace], world: World | None, found: Verification) -> None:
    if not described["deterministic"]:
        found.replay = f"not replayed: {described['id']} did not repeat itself when the bundle was made"
        return
    if world is None and not described["rebuildable"]:
        found.replay = f"not replayed: {described['id']} was built of the user's own objects; give it as world="
        return
    try:
        here = world.spawn() if world is not None else make(described["id"], **described["settings"])
    except (TelltaleError, ImportError) as error:
        found.replay = f"not replayed: {error}"
        if isinstance(error, ConfigError) and described["id"] in names():
            found.add(MANIFEST, f"names a world that cannot be built: {error}")
        return
    except Exception as error:  # settings that no world takes are part of the manifest, and somebody's doing
        found.add(MANIFEST, f"names a world that cannot be built: {type(error).__name__}: {error}")
        return
    try:
        _compare(here, described, traces, found)
    finally:
        here.close()
    found.replay = f"{found.replayed} of {len(traces)} episodes replayed bit for bit"


def _compare(world: World, described: dict[str, Any], traces: list[Trace], found: Verification) -> None:
    engines = world.versions()
    for name, stated in described["engines"].items():
        if engines.get(name) != stated:
            found.add(
                MANIFEST, f"was made with {name} {stated}; here is {engines.get(name)}, so that a replay proves nothing"
            )
    if world.task_hash() != described["task_hash"]:
        found.add(MANIFEST, f"names another task than {world.id} is here (task_hash)")
    for name, head, rows in traces:
        try:
            problem = _replayed(world, head, rows, receipts=described["receipts_deterministic"])
        except Exception as error:  # a trace may hold anything, and so may a user's success predicate
            problem = f"cannot be replayed: {type(error).__name__}: {error}"
        if problem is None:
            found.replayed += 1
        else:
            found.add(name, problem)


def _replayed(world: World, head: dict[str, Any], rows: list[dict[str, Any]], *, receipts: bool) -> str | None:
    """None where every observation, reward and ending is the trace's."""
    observation = world.reset(head["seed"])
    episode = Episode(head["seed"], [observation])
    for row in rows:
        if plain_value(observation) != row["observation"]:
            return (
                f"step {row['t']}: the engine observes {plain_value(observation)}, the trace says {row['observation']}"
            )
        try:
            outcome = world.step(world.checked_action(row["action"]))
        except TelltaleError as error:
            return f"step {row['t']}: the engine refuses the action: {error}"
        observation = outcome.observation
        now = (plain_value(observation), float(outcome.reward), outcome.terminated)
        if now != (row["next"], row["reward"], row["terminated"]):
            return f"step {row['t']}: the engine answers {now}, the trace says {(row['next'], row['reward'], row['terminated'])}"
        if receipts and json.dumps(strict_json(plain_value(outcome.receipt))) != json.dumps(row["receipt"]):
            return f"step {row['t']}: the engine's receipt is {outcome.receipt}, the trace says {row['receipt']}"
        episode.add(row["action"], outcome)
    if bool(world.success(episode)) != head["success"]:
        return f"the task was {'done' if not head['success'] else 'not done'}, the trace says the opposite"
    return None
