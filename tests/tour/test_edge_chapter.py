from telltale.runs.html_report import Report
from telltale.tour.edge import BUDGETS, edge_chapter


def test_the_chapter_shows_one_image_at_three_budgets(tmp_path):
    chapter = edge_chapter(tmp_path / "pair", quick=True)
    summary = chapter.summary()
    assert [row["patches"] for row in summary["budgets"]] == list(BUDGETS)
    sizes = [row["bytes"] for row in summary["budgets"]]
    assert sizes == sorted(sizes)
    assert len(chapter.pictures) == 1 + len(BUDGETS)
    assert "B: server" in summary["pictures"][1]
    report = Report("tour")
    chapter.write(report)
    page = report.save(tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 4
    assert edge_chapter(tmp_path / "pair", quick=True).audit == chapter.audit
