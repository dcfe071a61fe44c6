"""``verify``: is a bundle what it says? Hashes, statistics computed again, and every episode replayed on the engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError, TelltaleError
from telltale.world.mrep import MANIFEST, VERSION, file_hash, plain_value, seal, statistics_of
from telltale.world.worlds.base import World
from telltale.world.worlds.registry import make


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
    """Check the bundle's hashes, compute its statistics again, and replay its traces.

    ``world`` is needed for a world that :func:`telltale.world.make` cannot build from the manifest (the user's own object).

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
        files = dict(manifest["files"])
        engines = dict(manifest["world"]["engines"])
        seeds = list(manifest["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        found.add(MANIFEST, f"cannot be read: {error}")
        return found
    if not sealed:
        found.add(MANIFEST, "was changed after it was sealed, or is of another version")
    _check_files(folder, files, found)
    traces = _read_traces(folder, files, seeds, found)
    if traces is not None:
        _check_statistics(folder, traces, found)
        _replay(manifest, traces, engines, world, found)
    return found


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


def _read_traces(folder: Path, files: dict[str, str], seeds: list[int], found: Verification) -> list[Trace] | None:
    names = sorted(name for name in files if name.startswith("traces/"))
    traces: list[Trace] = []
    for name in names:
        try:
            head, *rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            if not all("reward" in row and "action" in row for row in rows) or "seed" not in head:
                raise ValueError("a row lacks its fields")
            traces.append((name, head, rows))
        except (OSError, ValueError) as error:
            found.add(name, f"cannot be read: {error}")
            return None
    if [head["seed"] for _, head, _ in traces] != seeds:
        found.add(MANIFEST, "lists other seeds than the traces")
    found.episodes = len(traces)
    return traces


def _check_statistics(folder: Path, traces: list[Trace], found: Verification) -> None:
    again = json.loads(
        json.dumps(statistics_of([rows for _, _, rows in traces], [head["success"] for _, head, _ in traces]))
    )
    try:
        stated = json.loads((folder / "stats.json").read_text())
    except (OSError, ValueError) as error:
        found.add("stats.json", f"cannot be read: {error}")
        return
    wrong = [key for key in again if stated.get(key) != again[key]]
    if wrong:
        found.add("stats.json", f"does not follow from the traces: {', '.join(wrong)}")


def _replay(
    manifest: dict[str, Any], traces: list[Trace], engines: dict[str, str], world: World | None, found: Verification
) -> None:
    described = manifest["world"]
    if not described["deterministic"]:
        found.replay = f"not replayed: {described['id']} is not deterministic"
        return
    if world is None:
        try:
            settings = {
                k: v
                for k, v in described["settings"].items()
                if not (k == "game" and described["id"].startswith("social/"))
            }
            world = make(described["id"], **settings)
        except (TelltaleError, ImportError) as error:
            found.replay = f"not replayed: {error}"
            return
    different = {
        name: (version, world.versions().get(name))
        for name, version in engines.items()
        if world.versions().get(name) != version
    }
    for name, (stated, here) in different.items():
        found.add(MANIFEST, f"was made with {name} {stated}; here is {here}, so that a replay proves nothing")
    if world.task_hash() != described["task_hash"]:
        found.add(MANIFEST, f"names another task than {world.id} is here (task_hash)")
    for name, head, rows in traces:
        problem = _replayed(world, head, rows)
        if problem is None:
            found.replayed += 1
        else:
            found.add(name, problem)
    world.close()
    found.replay = f"{found.replayed} of {len(traces)} episodes replayed bit for bit"


def _replayed(world: World, head: dict[str, Any], rows: list[dict[str, Any]]) -> str | None:
    """None where every observation, reward and ending is the trace's."""
    from telltale.world.worlds.base import Episode

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
        if plain_value(outcome.receipt) != row["receipt"]:
            return f"step {row['t']}: the engine's receipt is {outcome.receipt}, the trace says {row['receipt']}"
        episode.add(row["action"], outcome)
    if bool(world.success(episode)) != head["success"]:
        return f"the task was {'done' if not head['success'] else 'not done'}, the trace says the opposite"
    return None
