"""What the repository says about itself in several places is the same, and nothing in it is one machine's."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import telltale

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = (ROOT / "requirements-dev.lock").read_text("utf-8")


def test_the_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert telltale.__version__ == PROJECT["version"] == citation.group(1)


def test_the_lock_file_holds_versions_and_nothing_else():
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)] == []
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {re.match(r"[A-Za-z0-9._-]+", line).group(0).lower().replace("_", "-") for line in wanted}
    assert names <= locked


def test_make_installs_the_torch_of_the_lock_file():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"torch==[\d.]+", makefile).group(0) in LOCK.splitlines()
