"""Where pipeline checkpoints lie: one folder per step, in it one part per stage, each renamed into place when it is whole.

PlanCost under ``directory``::

    step-000000120/stage-0/   part.json   .metadata   __0_0.distcp
    step-000000120/stage-1/   ...

``part.json`` names the step, the stage, how many stages there are, and every file with its size and CRC-32. A step is
complete when the parts of all stages that one save wrote are there (PipeDream, SOSP'19, section 4: a restart goes on from
the newest checkpoint that every stage has).
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.errors import CheckpointError
from telltale.runs.files import remove_partial_writes

PART_FILE = "part.json"
FORMAT = "telltale-pipeline-part-1"

_STEP_FOLDER = re.compile(r"step-(\d+)$")
_FIELDS = ("minibatch", "stage", "stages", "save", "fingerprint", "plan", "version", "files", "optimizer")


@dataclass(frozen=True)
class Part:
    """What one stage wrote for one step."""

    path: Path
    manifest: dict[str, Any]

    def verify(self) -> None:
        """Raise :class:`~telltale.errors.CheckpointError` naming the first file that is missing or damaged."""
        for name, (size, checksum) in self.manifest["files"].items():
            file = self.path / name
            found = _size(file)
            if found != size:
                raise CheckpointError(f"{file} has {found} bytes; expected {size}. {_advice(self.path)}")
            if crc32(file) != checksum:
                raise CheckpointError(
                    f"{file} is damaged: its CRC-32 is not the {checksum:08x} it was written with. {_advice(self.path)}"
                )


@dataclass(frozen=True)
class Step:
    """A step that every stage has written: the folder, the next minibatch, and the parts in the order of the stages."""

    path: Path
    minibatch: int
    parts: tuple[Part, ...]


def step_folder(directory: str | Path, minibatch: int) -> Path:
    """Folder of the step whose next minibatch is ``minibatch``."""
    return Path(directory) / f"step-{minibatch:09d}"


def newest_complete(directory: str | Path) -> Step | None:
    """The newest step in ``directory`` that all stages have written, or None."""
    found = complete_steps(directory)
    return found[-1] if found else None


def complete_steps(directory: str | Path) -> list[Step]:
    """Every step in ``directory`` that all stages have written, oldest first; leftovers of killed saves are passed over."""
    return [step for step in (_complete(path) for path in _step_folders(directory)) if step is not None]


def open_step(path: str | Path) -> Step:
    """The step in ``path``, a ``step-...`` folder, or the newest one in the folder of steps ``path``.

    Raises :class:`~telltale.errors.CheckpointError` saying which stage's part is missing if there is no complete one.
    """
    folder = Path(path)
    step = _complete(folder) if _STEP_FOLDER.match(folder.name) else newest_complete(folder)
    if step is not None:
        return step
    folders = [folder] if _STEP_FOLDER.match(folder.name) else _step_folders(folder)
    if not folders or not folders[-1].is_dir():
        raise CheckpointError(f"{folder} holds no step; expected step-... folders written by a pipeline run.")
    raise CheckpointError(f"{folders[-1]} is not complete: {_lacking(folders[-1])}")


def remove_leftovers(directory: str | Path) -> None:
    """Clear what killed saves left: partial writes, and steps that not every stage has. No rank may be saving meanwhile."""
    for path in _step_folders(directory):
        if _complete(path) is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            remove_partial_writes(path)


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete steps."""
    for step in complete_steps(directory)[:-keep]:
        shutil.rmtree(step.path, ignore_errors=True)


def describe_files(folder: Path) -> dict[str, tuple[int, int]]:
    """File name -> (bytes, CRC-32) of everything in ``folder``."""
    return {file.name: (file.stat().st_size, crc32(file)) for file in sorted(folder.iterdir()) if file.is_file()}


def crc32(file: Path) -> int:
    """CRC-32 of a file, read in pieces of 4 MiB."""
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def read_part(path: Path) -> Part:
    """The part in ``path``. Raises :class:`~telltale.errors.CheckpointError` if its manifest is missing or not one."""
    file = path / PART_FILE
    try:
        manifest = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}. {_advice(path)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}. {_advice(path)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the manifest of a pipeline checkpoint; expected format {FORMAT!r}.")
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]!r}; expected {', '.join(_FIELDS)}. {_advice(path)}")
    return Part(path, manifest)


def _complete(path: Path) -> Step | None:
    saves: dict[str, dict[int, Part]] = defaultdict(dict)
    for part in _readable_parts(path):
        saves[part.manifest["save"]][part.manifest["stage"]] = part
    for parts in saves.values():
        count = next(iter(parts.values())).manifest["stages"]
        if sorted(parts) == list(range(count)):
            ordered = tuple(parts[stage] for stage in range(count))
            return Step(path, ordered[0].manifest["minibatch"], ordered)
    return None


def _readable_parts(path: Path) -> list[Part]:
    parts = []
    for folder in sorted(path.glob("stage-*")) if path.is_dir() else ():
        try:
            parts.append(read_part(folder))
        except CheckpointError:
            continue
    return parts


def _lacking(path: Path) -> str:
    for folder in sorted(path.glob("stage-*")):
        read_part(folder)
    parts = _readable_parts(path)
    if not parts:
        return "no stage has written its part."
    newest = parts[-1].manifest
    present = {part.manifest["stage"] for part in parts if part.manifest["save"] == newest["save"]}
    missing = [stage for stage in range(newest["stages"]) if stage not in present]
    return f"stage {missing[0]} of {newest['stages']} has no part in it; expected {path / f'stage-{missing[0]}'}."


def _step_folders(directory: str | Path) -> list[Path]:
    folder = Path(directory)
    if not folder.is_dir():
        return []
    matches = [(_STEP_FOLDER.match(entry.name), entry) for entry in folder.iterdir()]
    return [entry for _, entry in sorted((int(match.group(1)), entry) for match, entry in matches if match)]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _advice(part: Path) -> str:
    return f"Delete {part.parent} to go on from the step before."
