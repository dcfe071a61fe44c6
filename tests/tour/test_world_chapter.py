"""The chapter on world models, rehearsed: the deaf copy is found out and the bundle replays."""

from __future__ import annotations

import pytest

from telltale.runs.html_report import Report
from telltale.tour.world import world_chapter
from telltale.world import load_model, verify


@pytest.mark.long
def test_the_chapter_certifies_both_and_writes_a_bundle(tmp_path):
    chapter = world_chapter(tmp_path, quick=True)
    arms = chapter.summary()["arms"]
    assert arms["deaf to its actions"]["conditions"]["sensitivity"] == "fail"
    assert verify(chapter.bundle).ok
    assert load_model(tmp_path / "model").config.hidden == 8
    report = Report("Tour")
    chapter.write(report)
    report.save(tmp_path / "page.html")
    assert "deaf to its actions" in (tmp_path / "page.html").read_text()
