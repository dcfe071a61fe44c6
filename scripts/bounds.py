"""Print a requirement of ``pyproject.toml``: ``bounds.py lowest torch`` is ``torch==2.9.0``, ``range`` the whole range."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirement(name: str) -> str:
    """The line of ``project.dependencies`` that begins with ``name``."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    return next(line for line in project["dependencies"] if re.match(rf"{re.escape(name)}\W", line))


def lowest(name: str) -> str:
    """The lower bound as an exact version, with a third number if it has two."""
    version = re.search(r">=([\d.]+)", requirement(name)).group(1)
    return f"{name}=={version}" + ".0" * (2 - version.count("."))


if __name__ == "__main__":
    kind, package = sys.argv[1:]
    print({"lowest": lowest, "range": requirement}[kind](package))
