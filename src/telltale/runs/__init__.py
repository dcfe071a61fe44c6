"""What a long job leaves behind: run directories, atomic writes, progress and reports."""

from __future__ import annotations

from telltale.runs.files import atomic_directory, write_atomically
from telltale.runs.progress import Interruption, interruptible
from telltale.runs.run_dir import RunDir

__all__ = ["Interruption", "RunDir", "atomic_directory", "interruptible", "write_atomically"]
