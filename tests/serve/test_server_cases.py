"""Programs that once got a wrong answer from the server, or none, run as they were written; each ends with exit status 0."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cases"


@pytest.mark.long
@pytest.mark.parametrize("name", ["case_01_repetition_cuts_plain_server", "case_04_n_choices_prefill_n_times"])
def test_a_case_in_this_process(name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert not ended.value.code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of open files")
def test_a_case_in_a_process_of_its_own():
    path = FOLDER / "case_05_slowloris_headers.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
