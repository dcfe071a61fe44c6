"""What is kept of one evaluated episode, and finished batches of them on disk, so that a stopped evaluation goes on.

A batch's episodes depend on nothing outside it, so an evaluation that goes on ends exactly as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telltale.errors import CheckpointError
from telltale.runs.files import write_atomically
from telltale.world.transitions import as_state
from telltale.world.worlds.base import Episode


@dataclass
class Record:
    """One evaluated episode, with what the model said at each step.

    ``predicted``: the next observation, mean over particles. ``broken``: per step, the share of particles that breaks each law
    in the model's own prediction, before any enforcement. ``plan_value``: the planner's estimate, where it has one.
    """

    episode: Episode
    success: bool = False
    predicted: list[Any] = field(default_factory=list)
    broken: list[dict[str, float]] = field(default_factory=list)
    plan_value: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Records of one batch, and what they cost."""

    records: list[Record]
    model_steps: int
    cpu_seconds: float


class KeptBatches:
    """A folder with one file per finished batch of the evaluation that ``settings`` (JSON values) describe.

    What another evaluation left there is removed.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        name = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        marker = self.folder / "evaluation"
        if self.folder.exists() and not (marker.is_file() and marker.read_text() == name):
            if any(self.folder.iterdir()) and not marker.is_file():
                raise CheckpointError(f"{self.folder} holds other files; give a folder of its own for what is kept.")
            shutil.rmtree(self.folder)
        if not marker.is_file():
            write_atomically(marker, name)

    def load(self, first: int) -> Batch | None:
        """The batch that starts with episode ``first``, if it was finished."""
        path = self._path(first)
        try:
            found = json.loads(path.read_text())
            return Batch([_record(entry) for entry in found["records"]], found["model_steps"], found["cpu_seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Remove {self.folder} to start over.") from error

    def save(self, first: int, batch: Batch) -> None:
        """Write a finished batch."""
        document = {
            "records": [_entry(record) for record in batch.records],
            "model_steps": batch.model_steps, "cpu_seconds": batch.cpu_seconds,
        }  # fmt: skip
        write_atomically(self._path(first), json.dumps(document))

    def _path(self, first: int) -> Path:
        return self.folder / f"batch-{first:06d}.json"


def plain_value(value: Any) -> Any:
    """JSON values that read back exactly: a float32 is written as the double that it equals."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def _entry(record: Record) -> dict[str, Any]:
    episode = record.episode
    return {
        "seed": episode.seed, "source": episode.source, "success": record.success,
        "observations": [_typed(o) for o in episode.observations], "actions": plain_value(episode.actions),
        "rewards": [float(r) for r in episode.rewards], "receipts": plain_value(episode.receipts),
        "terminated": bool(episode.terminated), "truncated": bool(episode.truncated),
        "predicted": [_typed(p) for p in record.predicted], "broken": record.broken, "plan_value": record.plan_value,
    }  # fmt: skip


def _record(entry: dict[str, Any]) -> Record:
    episode = Episode(
        entry["seed"], [_untyped(o) for o in entry["observations"]], entry["actions"], entry["rewards"],
        entry["receipts"], entry["terminated"], entry["truncated"], entry["source"],
    )  # fmt: skip
    predicted = [_untyped(p) for p in entry["predicted"]]
    return Record(episode, entry["success"], predicted, entry["broken"], entry["plan_value"])


def _typed(value: Any) -> Any:
    """An array or tensor with its dtype; a plain state by itself."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return plain_value(value)


def _untyped(value: Any) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict) and "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    return as_state(value)
