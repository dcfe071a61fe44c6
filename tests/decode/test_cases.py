"""Programs that once decoded wrongly or died, run as they were written; each ends with exit status 0."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cases"
ALONE = ("02", "05", "06")
"""Cases that change the process, or need a compilation of their own."""


def case(number: str) -> Path:
    [path] = FOLDER.glob(f"case_{number}_*.py")
    return path


@pytest.mark.long
@pytest.mark.parametrize("number", ["03", "07", "09", "10", "11"])
def test_a_case_in_this_process(number, monkeypatch):
    if number == "09" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(case(number)), run_name="__main__")
    assert not ended.value.code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="users by number")
@pytest.mark.parametrize("number", ALONE)
def test_a_case_in_a_process_of_its_own(number):
    if number == "02" and os.getuid() != 0:
        pytest.skip("only root can become another user")
    done = subprocess.run([sys.executable, str(case(number))], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
