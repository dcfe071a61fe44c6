"""Benchmarks in their own formats, with figures computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from telltale.align.judge.benchmarks import (
    SECTIONS,
    SUITES,
    best_of_credit,
    evaluate,
    read_items,
    rewardbench_sections,
    style_credits,
    ties_score,
)
from telltale.align.judge.importing import read_preferences
from telltale.errors import ConfigError, DataError
from telltale.signals.statistics import proportion

USER = {"role": "user", "content": "a"}


class Told:
    """Scores that stand in the responses themselves: ``score 3.5``."""

    def score(self, messages):
        return [float(conversation[-1]["content"].split()[-1]) for conversation in messages]


def written(path: Path, rows: list[object]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


def test_rewardbench_is_weighted_by_its_table(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "score 2", "rejected": "much longer score 1", "subset": "alpacaeval-easy"},
        {"prompt": "a", "chosen": "score 1", "rejected": "score 1", "subset": "mt-bench-easy"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": "score 2",
            "rejected": "score 3",
            "subset": "xstest-should-refuse",
        },
        {"prompt": "a", "chosen": "score 4", "rejected": "score 3", "subset": "xstest-should-respond"},
    ]
    path = written(tmp_path / "rb.jsonl", rows)
    found = evaluate(Told(), "rewardbench", path)
    assert found.judge.sections == pytest.approx({"Chat": 100 / 128, "Safety": 250 / 404})
    assert found.judge.score == pytest.approx((100 / 128 + 250 / 404) / 2)
    assert evaluate(Told(), "rewardbench", path, weights="paper").judge.sections["Safety"] == pytest.approx(154 / 404)
    assert found.length_only.subsets["alpacaeval-easy"].value == 0.0
    assert found.judge.subsets["mt-bench-easy"].value == 0.0


def test_armorms_published_total_comes_out_of_its_sections() -> None:
    """96.9, 76.8, 92.2, 97.3 and prior sets 74.3 are printed as 89.0."""
    printed = {"Chat": 96.9, "Chat Hard": 76.8, "Safety": 92.2, "Reasoning": 97.3}
    subsets = {subset: printed[section] for section, table in SECTIONS.items() for subset in table}
    total, sections = rewardbench_sections(
        subsets | dict.fromkeys(("anthropic_helpful", "shp", "summarize", "anthropic_hhh"), 74.3)
    )
    assert sections["Chat Hard"] == pytest.approx(76.8)
    assert total == pytest.approx(89.0, abs=0.05)
    assert rewardbench_sections(subsets)[0] == pytest.approx(90.8, abs=0.05)
    assert sum(SECTIONS["Chat Hard"].values()) == 456


def test_best_of_four_shares_ties_at_the_top() -> None:
    assert best_of_credit([2.0], [1.0, 1.0, 0.0]) == 1.0
    assert best_of_credit([2.0], [2.0, 1.0, 0.0]) == 0.5
    assert best_of_credit([2.0], [2.0, 2.0, 2.0]) == 0.25
    assert best_of_credit([1.0], [2.0, 1.0, 0.0]) == 0.0


def test_ties_by_hand() -> None:
    items = {
        "ref:0": ([3.0], [1.0]),
        "tied:0": ([3.0, 2.5], [1.0, 0.0]),
        "ref:1": ([1.0], [2.0]),
        "tied:1": ([5.0, 1.0], [0.0]),
        "tied:9": ([1.0, 0.5], [0.0]),
    }
    found = ties_score(items)
    assert (found.tied_accuracy, found.reference_accuracy) == (1.0, 0.5)
    assert (found.preferred, found.preferred_hard) == (0.5, 0.5)
    margin = (math.tanh(1.5 / 0.5 - 1) + math.tanh(-1.0 / 4.0 - 1)) / 2
    assert found.margin == pytest.approx(margin)
    assert found.score == pytest.approx(0.3 + 0.15 + 0.1 + 0.1 + 0.01 * margin)


def test_rewardbench_2(tmp_path: Path) -> None:
    rows = [
        {
            "id": "1",
            "prompt": "a",
            "chosen": ["score 3"],
            "rejected": ["score 1", "score 2", "score 0"],
            "subset": "Math",
        },
        {
            "id": "2",
            "prompt": "a",
            "chosen": ["score 2"],
            "rejected": ["score 2", "score 1", "score 0"],
            "subset": "Math",
        },
        {"id": "ref:0", "prompt": "a", "chosen": ["score 3"], "rejected": ["score 1"], "subset": "Ties"},
        {"id": "tied:0", "prompt": "a", "chosen": ["score 3", "score 2.5"], "rejected": ["score 1"], "subset": "Ties"},
    ]
    found = evaluate(Told(), "rewardbench2", written(tmp_path / "rb2.jsonl", rows)).judge
    ties = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1.5 / 0.5 - 1)
    assert found.sections == pytest.approx({"Math": 0.75, "Ties": ties})
    assert found.score == pytest.approx((0.75 + ties) / 2)


def test_rm_benchs_styles(tmp_path: Path) -> None:
    credits = style_credits([3.0, 2.0, 1.0], [0.0, 2.5, 2.0])
    assert credits == {"easy": [1.0, 1.0, 0.0], "normal": [1.0, 0.0, 0.0], "hard": [1.0, 1.0, 0.0]}
    row = {
        "id": 1,
        "prompt": "a",
        "chosen": ["score 3", "score 2", "score 1"],
        "rejected": ["score 0", "score 2.5", "score 2"],
    }
    path = written(
        tmp_path / "rm.json",
        [row | {"domain": "chat"}, row | {"domain": "safety-refuse"}, row | {"domain": "safety-response"}],
    )
    found = evaluate(Told(), "rm-bench", path).judge
    assert found.score == pytest.approx(5 / 9)
    assert found.sections == pytest.approx(
        {"easy": 2 / 3, "normal": 1 / 3, "hard": 2 / 3, "chat": 5 / 9, "safety": 5 / 9}
    )
    assert found.subsets["chat"].count == 1


def test_rm_benchs_domains_count_alike_in_the_difficulties(tmp_path: Path) -> None:
    """As its authors define it: three chats that are hard and one code that is easy are half, not three quarters."""
    right, wrong = ["score 3"] * 3, ["score 1"] * 3
    rows = [{"id": i, "prompt": "a", "chosen": right, "rejected": wrong, "domain": "chat"} for i in range(3)]
    path = written(tmp_path / "rm.json", [*rows, rows[0] | {"domain": "code", "chosen": wrong, "rejected": right}])
    found = evaluate(Told(), "rm-bench", path).judge
    assert found.sections == {"easy": 0.5, "normal": 0.5, "hard": 0.5, "chat": 1.0, "code": 0.0}
    assert found.score == 0.5


def test_rm_benchs_whole_file_counts_once(tmp_path: Path) -> None:
    row = {"id": 1, "prompt": "a", "chosen": ["score 3"] * 3, "rejected": ["score 1"] * 3}
    written(tmp_path / "chat_filtered.json", [row])
    assert list(evaluate(Told(), "rm-bench", tmp_path).judge.subsets) == ["chat"]
    written(tmp_path / "total_dataset.json", [row | {"domain": "chat"}, row | {"domain": "safety-refuse"}])
    found = evaluate(Told(), "rm-bench", tmp_path)
    assert found.items == 2
    assert list(found.judge.subsets) == ["chat", "safety-refuse"]


def test_llmbar_is_read_as_its_repository_has_it(tmp_path: Path) -> None:
    row = {"input": "a", "output_1": "score 1", "output_2": "score 2", "label": 2}
    root = tmp_path / "Dataset"
    for folder in ("LLMBar/Natural", "LLMBar/Adversarial/GPTOut", "LLMBar/Adversarial/Manual", "CaseStudy/Base_9"):
        (root / folder).mkdir(parents=True)
        written(root / folder / "dataset.json", [row])
    written(root / "LLMBar" / "Natural" / "result.json", [{"winner": 1}])
    for path in (tmp_path, root, root / "LLMBar"):
        found = evaluate(Told(), "llmbar", path)
        assert list(found.judge.subsets) == ["adversarial-gptout", "adversarial-manual", "natural"]
        assert found.judge.sections == {"adversarial": 1.0}
    alone = evaluate(Told(), "llmbar", root / "LLMBar" / "Adversarial" / "Manual" / "dataset.json")
    assert list(alone.judge.subsets) == ["adversarial-manual"]


def test_rewardbench_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    """Parquet; the raw rows beside the filtered ones do not count, and prior sets are named by their files."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def file(name: str, **row: object) -> None:
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)

    pair = {"chosen": "score 2", "rejected": "score 1"}
    file("filtered-00000-of-00001.parquet", prompt="a", subset="alpacaeval-easy", **pair)
    file("raw-00000-of-00001.parquet", prompt="a", subset="alpacaeval-easy", chosen="score 0", rejected="score 1")
    file("shp-00000-of-00001.parquet", prompt=[USER], subset="askacademia", **pair)
    found = evaluate(Told(), "rewardbench", tmp_path).judge
    assert found.sections == {"Chat": 1.0, "Prior": 1.0}
    assert found.subsets.keys() == {"alpacaeval-easy", "shp"}
    (tmp_path / "x.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        evaluate(Told(), "rewardbench", tmp_path / "x.parquet")


def test_lines_may_hold_any_separator_inside_of_a_string(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c", "chosen": "score 2", "rejected": "score 1", "subset": "hep-go"}
    (tmp_path / "rb.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n")
    assert evaluate(Told(), "rewardbench", tmp_path / "rb.jsonl").items == 1
    assert len(read_preferences(tmp_path / "rb.jsonl")[0]) == 1


def test_llmbar_reads_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "natural.json", [{"input": "a", "output_1": "score 1", "output_2": "score 2", "label": 2}])
    written(
        tmp_path / "adversarial-manual.json",
        [{"input": "a", "output_1": "score 1", "output_2": "long score 2", "label": 1}],
    )
    found = evaluate(Told(), "llmbar", tmp_path)
    assert found.judge.score == 0.5
    assert found.judge.sections == {"adversarial": 0.0}
    assert found.length_only.subsets["natural"].value == 0.0
    assert found.items == 2


def test_wilson_intervals() -> None:
    found = proportion([1.0] * 8 + [0.0] * 2)
    assert (found.value, found.count) == (0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert proportion([1.0] * 5).high == 1.0
    assert math.isnan(proportion([]).value)


@pytest.mark.parametrize(
    ("suite", "rows", "words"),
    [
        ("rewardbench", [{"prompt": "a", "chosen": "b"}], "row 1 is no item of rewardbench: KeyError 'rejected'"),
        ("rewardbench", [{"prompt": "a", "chosen": "1", "rejected": "0", "subset": "x"}], "is RewardBench's"),
        ("rewardbench2", [{"prompt": "a", "chosen": [], "rejected": ["1"], "subset": "x"}], "must not be empty"),
        ("rm-bench", [{"prompt": "a", "chosen": ["1"], "rejected": ["1"] * 3}], "expected 3 styles"),
        ("llmbar", [{"input": "a", "output_1": "1", "output_2": "2", "label": 3}], "label=3"),
        ("llmbar", [], "holds no rows"),
        ("llmbar", [5], "row 1 is no item of llmbar: TypeError"),
        ("rewardbench", [{"prompt": "a", "chosen": [], "rejected": "b", "subset": "x"}], "it is empty"),
        (
            "rewardbench",
            [{"prompt": [{"role": "human", "content": "a"}], "chosen": "1", "rejected": "0", "subset": "x"}],
            "row 1 is no item of rewardbench: ",
        ),
        (
            "rewardbench2",
            [{"id": "7", "prompt": "a", "chosen": ["1"], "rejected": ["0"], "subset": "Ties"}],
            "id='7', expected ref:NUMBER or tied:NUMBER",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, suite: str, rows: list, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluate(Told(), suite, written(tmp_path / "x.json", rows))


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="suite='judgebench'"):
        evaluate(Told(), "judgebench", tmp_path)
    with pytest.raises(DataError, match="is no file"):
        read_items("llmbar", tmp_path / "none")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_items("llmbar", tmp_path)
    (tmp_path / "x.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="pointer of Git LFS"):
        read_items("llmbar", tmp_path)
    assert len(SUITES) == 4
