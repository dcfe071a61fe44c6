"""Published forms of preference files, and what they say against themselves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from telltale.align.judge.countable import countable_ratings
from telltale.align.judge.data import Pair
from telltale.align.judge.importing import FORMS, read_file, read_preferences
from telltale.errors import DataError
from telltale.models.conversations import read_exchange, read_transcript

USER = {"role": "user", "content": "Name a fruit."}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SIDED = {
    "judgebench": {"question": "Name a fruit.", "response_A": "Stone.", "response_B": "Pear.", "label": "B>A"},
    "helpsteer2 preferences": {
        "prompt": "Name a fruit.",
        "response_1": "Stone.",
        "response_2": "Pear.",
        "preference_strength": 2,
    },
    "helpsteer3 preferences": {
        "context": [USER],
        "response1": "Pear.",
        "response2": "Stone.",
        "overall_preference": -1,
        "individual_preference": [{"score": -2}, {"score": -1}, {"score": 1}],
    },
    "pandalm": {
        "instruction": "Name a fruit.",
        "input": "",
        "response1": "Pear.",
        "response2": "Stone.",
        "annotator1": 1,
        "annotator2": 0,
        "annotator3": 1,
    },
    "chatbot arena": {
        "conversation_a": [USER, says("Pear.")],
        "conversation_b": [USER, says("Stone.")],
        "winner": "model_a",
    },
    "llmbar": {"input": "Name a fruit.", "output_1": "Stone.", "output_2": "Pear.", "label": 2},
    "alpacaeval": {"instruction": "Name a fruit.", "output_1": "Stone.", "output_2": "Pear.", "preference": 1.9},
    "preference of b": {
        "prompt": "Name a fruit.",
        "response_a": "Pear.",
        "response_b": "Stone.",
        "preference_for_b": 0.25,
    },
    "votes": {
        "prompt": "Name a fruit.",
        "response_a": "Pear.",
        "response_b": "Stone.",
        "votes_a": 3,
        "votes_b": 1,
        "votes_tie": 2,
    },
    "winner": {"prompt": "Name a fruit.", "response_a": "Pear.", "response_b": "Stone.", "winner": "A"},
}
VOTES = {
    "helpsteer3 preferences": (2.0, 1.0),
    "pandalm": (2.5, 0.5),
    "alpacaeval": (0.9, 0.1),
    "preference of b": (0.75, 0.25),
    "votes": (4.0, 2.0),
}


@pytest.mark.parametrize("form", sorted(SIDED))
def test_two_responses_and_a_verdict_become_a_pair_with_votes(tmp_path: Path, form: str):
    found = read_file(written(tmp_path / "p.jsonl", SIDED[form]))
    assert found.form == form
    [pair] = found.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], "Pear.", "Stone.")
    assert pair.votes == pytest.approx(VOTES.get(form, (1.0, 0.0)))
    assert any("untested" in note for note in found.notes) != FORMS[form].seen


def test_ties_are_half_a_vote_each_and_a_strange_winner_is_refused(tmp_path: Path):
    rows = [SIDED["winner"] | {"winner": told} for told in ("tie", "tie (bothbad)", ["a", "b", "a"])]
    assert [pair.votes for pair in read_file(written(tmp_path / "p.jsonl", *rows)).pairs] == [
        (0.5, 0.5),
        (0.5, 0.5),
        (2.0, 1.0),
    ]
    for told in ("c", True, 0, None):
        with pytest.raises(DataError, match="names the winner"):
            read_file(written(tmp_path / "p.jsonl", SIDED["winner"] | {"winner": told}))


def test_ultrafeedback_gives_ratings_and_pairs_by_the_mean_of_its_aspects(tmp_path: Path):
    def completion(text: str, *ratings: str, overall: float = 5.0) -> dict:
        names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        told = {name: {"Rating": rating} for name, rating in zip(names, ratings, strict=True)}
        return {"response": text, "annotations": told, "overall_score": overall}

    row = {
        "instruction": "Name a fruit.",
        "completions": [
            completion("Stone.", "1", "2", "1", "1", overall=10.0),
            completion("Pear.", "5", "5", "N/A", "5"),
            completion("Plum.", "5", "5", "5", "5"),
        ],
    }
    found = read_file(written(tmp_path / "u.jsonl", row))
    assert [(pair.chosen, pair.rejected, pair.votes) for pair in found.pairs] == [
        ("Pear.", "Stone.", (1.0, 0.0)),
        ("Plum.", "Stone.", (1.0, 0.0)),
        ("Pear.", "Plum.", (0.5, 0.5)),
    ]
    ratings = found.ratings()
    assert ratings.labels[0].tolist() == pytest.approx([0.1, 0.3, 0.1, 0.1])
    assert bool(ratings.labels[1].isnan().tolist()[2])
    assert any("overall_score is 9 or more" in note for note in found.notes)


def test_helpsteer_gives_ratings_and_pairs_by_helpfulness(tmp_path: Path):
    rows = [
        {"prompt": "Name a fruit.", "response": text, "helpfulness": value, "verbosity": 1}
        for text, value in (("Stone.", 0), ("Pear.", 4))
    ]
    found = read_file(written(tmp_path / "h.jsonl", *rows))
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("Pear.", "Stone.")]
    assert found.ratings({"helpfulness": found.scales["helpfulness"], "verbosity": found.scales["verbosity"]}).labels[
        :, 0
    ].tolist() == pytest.approx([0.1, 0.9])


def test_transcripts_packed_by_gzip(tmp_path: Path):
    row = {
        "chosen": "\n\nHuman: Name a fruit.\n\nAssistant: Which?\n\nHuman: Any.\n\nAssistant: Pear.",
        "rejected": "\n\nHuman: Name a fruit.\n\nAssistant: Which?\n\nHuman: Any.\n\nAssistant: Stone.",
    }
    other = row | {"rejected": "\n\nHuman: Name a tree.\n\nAssistant: Oak."}
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(row) + "\n" + json.dumps(other) + "\n").encode()))
    found = read_file(path)
    [pair] = found.pairs
    assert [turn["content"] for turn in pair.prompt] == ["Name a fruit.", "Which?", "Any."]
    assert (pair.chosen, pair.rejected) == ("Pear.", "Stone.")
    assert any("follow different prompts" in note for note in found.notes)
    with pytest.raises(DataError, match="turn of the Human"):
        read_transcript("Assistant: hello")


def test_what_a_file_says_against_itself_is_told(tmp_path: Path):
    row = {"prompt": "Name a fruit.", "chosen": [USER, says("Pear.")], "rejected": [USER, says("Stone.")]}
    rows = [
        row | {"score_chosen": 2.0, "score_rejected": 5.0},
        {"prompt": "Name a fruit.", "chosen": "Stone.", "rejected": "Pear."},
        row | {"score_chosen": 4.0, "score_rejected": 4.0},
    ]
    found = read_file(written(tmp_path / "p.jsonl", *rows))
    assert found.pairs[2].votes == (0.5, 0.5)
    told = " ".join(found.notes)
    for words in ("once more", "has the lower score", "same score", "decided in both ways"):
        assert words in told
    with pytest.raises(DataError, match="not the end of the prompt"):
        read_preferences(written(tmp_path / "q.jsonl", row | {"prompt": "Name a tree."}))
    with pytest.raises(DataError, match=r"line 2 has .* expected the form winner"):
        read_file(written(tmp_path / "w.jsonl", SIDED["winner"], {"prompt": "x", "chosen": "a", "rejected": "b"}))


def test_an_exchange_is_read_alike_in_every_form():
    system = {"role": "system", "content": "Be brief."}
    long = "Name a fruit that grows on a tree."
    whole = [system, USER, says("Pear.")]
    assert read_exchange([system, USER], "Pear.") == whole
    assert read_exchange([system, USER], [says("Pear.")]) == whole
    assert read_exchange([system, USER], [USER, says("Pear.")]) == whole
    assert read_exchange([system, USER], whole) == whole
    assert read_exchange(None, whole) == whole
    assert (
        read_exchange(None, [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "Pear."}])
        == whole[1:]
    )
    told: list[str] = []
    assert read_exchange(long, f"{long}\n\nPear.", told=told)[-1] == says("Pear.")
    assert told
    assert read_exchange("Pear", "Pear tree")[-1] == says("Pear tree")


def test_objectives_are_counted_where_nobody_rated():
    prompt = [{"role": "user", "content": "Explain photosynthesis briefly"}]
    pairs = [
        Pair(
            "a",
            prompt,
            "Photosynthesis turns light into sugar.\n- light\n- water",
            "I'm sorry, but I can't.",
            (3.0, 1.0),
        ),
        Pair("b", prompt, "Light.", "I cannot say.", (1.0, 1.0)),
    ]
    found = countable_ratings(pairs)
    labels = dict(zip(found.objectives, found.labels.T.tolist(), strict=True))
    assert labels["refusal"] == [0.0, 1.0, 0.0, 1.0]
    assert labels["preferred"] == [0.75, 0.25, 0.5, 0.5]
    assert labels["overlap"][0] == pytest.approx(1 / 3)
    assert labels["verbosity"][0] > labels["verbosity"][2]
    assert labels["structure"][0] > labels["structure"][1] == 0.0


AUTO_J = {"prompt": "Name a fruit.", "response 1": "Stone.", "response 2": "Pear."}


def test_auto_j_counts_from_zero_and_two_is_a_tie(tmp_path: Path):
    found = read_file(
        written(tmp_path / "p.jsonl", *({"scenario": "x", "label": told, **AUTO_J} for told in (0, 1, 2)))
    )
    assert found.form == "auto-j"
    assert FORMS["auto-j"].seen
    assert [(pair.chosen, pair.votes) for pair in found.pairs] == [
        ("Stone.", (1.0, 0.0)),
        ("Pear.", (1.0, 0.0)),
        ("Stone.", (0.5, 0.5)),
    ]
    for told in (3, True, "1", [0], None):
        with pytest.raises(DataError, match=r"line 1 has the label .*; expected 0 \(the first\)"):
            read_file(written(tmp_path / "p.jsonl", {"label": told, **AUTO_J}))


def test_a_published_response_that_is_a_bare_true_is_read_as_that_text(tmp_path: Path):
    """As in PandaLM's test set; other forms refuse it."""
    row = SIDED["pandalm"] | {"response1": True, "response2": 44}
    found = read_file(written(tmp_path / "p.jsonl", row, SIDED["pandalm"]))
    assert (found.pairs[0].chosen, found.pairs[0].rejected) == ("true", "44")
    assert any(note.startswith("1 of the rows: a response is a bare true") for note in found.notes)
    with pytest.raises(DataError, match="response_a"):
        read_file(written(tmp_path / "w.jsonl", SIDED["winner"] | {"response_a": True}))


def test_pairs_that_are_repeated_or_turned_around_are_told(tmp_path: Path):
    turned = SIDED["winner"] | {"response_a": "Stone.", "response_b": "Pear."}
    found = read_file(written(tmp_path / "p.jsonl", *[SIDED["winner"]] * 3, turned))
    assert len(found.pairs) == 4
    assert {count for what, count in found.told.items() if "already" in what} == {2}
    assert {count for what, count in found.told.items() if "both ways" in what} == {1}


def test_a_table_is_read_as_the_same_rows_in_json_lines(tmp_path: Path):
    chat = json.dumps([{"role": "system", "content": "Be brief."}, USER])
    text = (
        "\ufeffprompt,response_a,response_b,votes_a,votes_b\r\n"
        '"Name, please,\na ""fruit"".",Pear.,7,3,1\r\n'
        f'"{chat.replace(chr(34), chr(34) * 2)}",Pear.,,1,0\r\n'
    )
    (tmp_path / "p.csv").write_text(text, newline="")
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(text.encode()))
    rows = [
        {"prompt": 'Name, please,\na "fruit".', "response_a": "Pear.", "response_b": "7", "votes_a": 3, "votes_b": 1},
        {"prompt": json.loads(chat), "response_a": "Pear.", "response_b": "", "votes_a": 1, "votes_b": 0},
    ]
    wanted = read_file(written(tmp_path / "p.jsonl", *rows))
    for name in ("p.csv", "p.csv.gz"):
        found = read_file(tmp_path / name)
        assert [(p.prompt, p.chosen, p.rejected, p.votes) for p in found.pairs] == [
            (p.prompt, p.chosen, p.rejected, p.votes) for p in wanted.pairs
        ]
    (tmp_path / "r.tsv").write_text("prompt\tresponse\tratings\nName a fruit.\tPear.\t" + '{"good": 0.5}\n')
    assert read_file(tmp_path / "r.tsv").ratings().labels.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,chosen,rejected\na,b\n", "line 2 has 2 cells; expected 3"),
        ("prompt,chosen,chosen\na,b,c\n", "the column 'chosen' more than once"),
        ("prompt,chosen,rejected\n", "is empty; expected a header and rows"),
        ("", "is empty"),
        ('prompt,chosen,rejected\na,"b" c,d\n', "is no line of a table"),
        ("prompt,response_a,response_b,votes_a,votes_b\na,b,c,many,1\n", "votes_a is 'many'"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, problem: str):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        read_file(tmp_path / "p.csv")


PLAIN = {"prompt": "Name a fruit.", "response_a": "Pear.", "response_b": "Stone.", "winner": "a"}


@pytest.mark.parametrize(
    "extra",
    [{"annotator": 2}, {"annotator_id": 0}, {"annotator": "bob"}, {"preference_strength": 3}, {"overall_preference": 2},
     {"individual_preference": ["x"]}],
)  # fmt: skip
def test_fields_beside_a_winner_are_no_votes(tmp_path, extra):
    """An annotator's number, or how strong the preference is, once turned the winner around."""
    [pair], _ = read_preferences(written(tmp_path / "p.jsonl", PLAIN | extra))
    assert (pair.chosen, pair.votes) == ("Pear.", (1.0, 0.0))
    asked = {"instruction": "Name a fruit.", "output_1": "Stone.", "output_2": "Pear.", "preference": 2}
    [pair], _ = read_preferences(written(tmp_path / "q.jsonl", asked | {"annotator": 1}))
    assert pair.chosen == "Pear."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "q", "completions": None}, "completions is null"),
        ({"instruction": "q", "completions": [{"response": "a", "annotations": [1]}]}, "a number from 1 to 5"),
        ({"instruction": "q", "completions": [{"response": "a", "annotations": {"honesty": {"Rating": "nan"}}}]}, "1 to 5"),
        ({"instruction": "q", "completions": [{"response": "a", "annotations": {"honesty": {"Rating": 10**400}}}]}, "1 to 5"),
        ({"prompt": "q", "response": "a", "helpfulness": "x"}, "from 0 to 4"),
        ({"prompt": "q", "response": "a", "helpfulness": [1]}, "from 0 to 4"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "votes_a": 10**400, "votes_b": 0}, "a number of votes"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": float("nan")}, "above 0"),
        ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": 1, "individual_preference": ["x"]},
         "above 0"),
        ({"prompt": "q", "chosen": [{"from": ["x"], "value": "a"}], "rejected": "b"}, "it is missing"),
    ],
)  # fmt: skip
def test_odd_records_are_refused_in_a_sentence(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read_file(written(tmp_path / "p.jsonl", row))


def test_scores_that_a_table_wrote_as_texts_count_and_a_system_text_is_told_of(tmp_path):
    row = {
        "prompt": "Name a fruit.",
        "chosen": "Pear.",
        "rejected": "Stone.",
        "score_chosen": "3",
        "score_rejected": "3.0",
    }
    found = read_file(written(tmp_path / "p.jsonl", row | {"system": "You are a pirate."}))
    assert found.pairs[0].votes == (0.5, 0.5)
    assert any("system text" in note for note in found.notes)
