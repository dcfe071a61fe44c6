"""The folder of one job: its config, its metrics line by line, its checkpoints. Killed jobs leave it readable.

Layout: ``config.yaml``, ``metrics.jsonl`` (one record a line), ``checkpoints/step-000123/``, and whatever the job adds.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from telltale.errors import CheckpointError
from telltale.runs.files import JsonLines, atomic_directory, remove_partial_writes, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STEP_FOLDER = re.compile(r"step-(\d+)$")


class RunDir:
    """A run directory, made by :meth:`create` or found by :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self._metrics = JsonLines(self.metrics_path)
        self.checkpoints_path = path / "checkpoints"

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], *, exist_ok: bool = False) -> RunDir:
        """Start a run at ``path`` with ``config`` written as YAML.

        Raises :class:`~telltale.errors.CheckpointError` if a run is there already and ``exist_ok`` is false.
        """
        run = cls(Path(path))
        if (run.path / "config.yaml").exists() and not exist_ok:
            raise CheckpointError(
                f"{run.path} already holds a run. Give another run directory, or resume it (--resume at the CLI)."
            )
        write_atomically(run.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run. Raises :class:`~telltale.errors.CheckpointError` if ``path`` holds none."""
        run = cls(Path(path))
        if not (run.path / "config.yaml").is_file():
            raise CheckpointError(f"{run.path} is not a run directory: it has no config.yaml.")
        return run

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only job in this folder: two would write over each other's checkpoints. The end of a process ends its hold.

        Raises :class:`~telltale.errors.CheckpointError` while another job is at work here. Where a folder cannot be locked (some
        network file systems, Windows) nothing is checked.
        """
        folder = None if fcntl is None else os.open(self.path, os.O_RDONLY)
        try:
            if folder is not None:
                _lock(folder, self.path)
            yield
        finally:
            if folder is not None:
                os.close(folder)

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with."""
        try:
            loaded = yaml.safe_load((self.path / "config.yaml").read_text())
        except yaml.YAMLError as error:
            raise CheckpointError(f"{self.path / 'config.yaml'} is not valid YAML: {error}") from error
        return dict(loaded or {})

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``. Raises :class:`~telltale.errors.CheckpointError` on a full disk."""
        self._metrics.append(record)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut short is left out.

        Raises :class:`~telltale.errors.CheckpointError` for a line that is not JSON.
        """
        return list(self._metrics)

    def truncate_metrics(self, step: int) -> None:
        """Forget the records of steps after ``step``: a resumed run writes them anew."""
        self._metrics.replace([record for record in self.metrics() if record.get("step", 0) <= step])

    def save_checkpoint(self, step: int, writer: Callable[[Path], None], *, keep: int = 2) -> Path:
        """Have ``writer`` fill a folder that becomes ``checkpoints/step-<step>``; keep the newest ``keep``.

        Raises :class:`~telltale.errors.CheckpointError` if it cannot be written; older checkpoints stay as they are.
        """
        remove_partial_writes(self.checkpoints_path)
        target = self.checkpoints_path / f"step-{step:06d}"
        with atomic_directory(target) as aside:
            writer(aside)
        for _, old in self._checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, or None."""
        found = self._checkpoints()
        return found[-1] if found else None

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if not self.checkpoints_path.is_dir():
            return []
        matches = [(_STEP_FOLDER.match(entry.name), entry) for entry in self.checkpoints_path.iterdir()]
        return sorted((int(match.group(1)), entry) for match, entry in matches if match)


def _lock(folder: int, path: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{path} is in use: another process is at work on this run. Wait for it or stop it, or give another run directory."
        ) from error
    except OSError:
        pass  # a file system without locks
