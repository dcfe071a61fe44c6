"""Small programs that once trained a pipeline wrongly, or stopped with a Python error; each exits 0 where the fault is gone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("case_*.py"))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.stem, marks=[pytest.mark.slow] * (case.stem[5:7] in ("04", "05"))) for case in CASES],
)
def test_the_fault_is_gone(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(case)])
    monkeypatch.setattr(sys, "path", [str(case.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(case), run_name="__main__")
    assert not ended.value.code
