"""Every tracked file of the package is in the wheel: ``check_wheel_content.py WHEEL``; exit code 1 names what is missing."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
SUFFIXES = (".py", ".cpp", ".h", ".typed", ".html", ".json", ".yaml")


def missing(wheel: str) -> list[str]:
    """Files of the source tree that the wheel has not."""
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = [path for path in (SOURCE / "telltale").rglob("*") if path.suffix in SUFFIXES]
    return sorted({path.relative_to(SOURCE).as_posix() for path in files} - packed)


if __name__ == "__main__":
    if left_out := missing(sys.argv[1]):
        sys.exit("not in the wheel: " + ", ".join(left_out))
