"""The tour's chapter on exploration, rehearsed."""

import pytest

from telltale.runs.html_report import Report
from telltale.tour.oger import add_to_report, run_chapter


@pytest.mark.long
def test_the_chapter_runs_keeps_its_work_and_goes_into_the_report(tmp_path):
    pytest.importorskip("plotly")
    summary = run_chapter(tmp_path, quick=True)
    assert list(summary["arms"]) == ["grpo", "default"]
    assert [evaluation["step"] for evaluation in summary["arms"]["default"]] == [1, 2]
    again = run_chapter(tmp_path, quick=True)
    assert again["arms"] == summary["arms"]
    report = Report("tour")
    add_to_report(report, summary)
    assert "never leaves its one route" in report.save(tmp_path / "page.html").read_text()
