"""Files of long jobs: run directories, atomic writes and JSON; progress and interruption; reports."""

from __future__ import annotations

from telltale.runs.files import JsonLines, atomic_directory, strict_json, write_atomically, write_json
from telltale.runs.progress import Interruption, interruptible
from telltale.runs.run_dir import RunDir

__all__ = [
    "Interruption",
    "JsonLines",
    "RunDir",
    "atomic_directory",
    "interruptible",
    "strict_json",
    "write_atomically",
    "write_json",
]
