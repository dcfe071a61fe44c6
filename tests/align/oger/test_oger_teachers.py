"""The teacher store: what it reads, what it drops and how often, and what it refuses."""

import json
import math

import pytest
from small_runs import problems, store

from telltale.align.oger import TeacherStore
from telltale.align.oger.tokens import TokenisedTeachers
from telltale.errors import ConfigError, DataError
from telltale.tasks import routes

TOKENIZER = routes.build_tokenizer()
PROMPTS = [{"id": "p", "prompt": "7 * 8 + 12 =", "answer": "68"}, {"id": "q", "prompt": "2 * 3 + 1 =", "answer": "7"}]
RIGHT = {"p": "56 = 68", "q": "6 = 7"}


def files(folder, prompts, teachers):
    paths = folder / "prompts.jsonl", folder / "teachers.jsonl"
    for path, rows in zip(paths, (prompts, teachers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def row(name="p", teacher="t", **fields):
    return {"prompt_id": name, "teacher": teacher, "text": RIGHT.get(name, "6 = 7"), **fields}


def tokens(teachers, **options):
    return TokenisedTeachers(teachers, TOKENIZER, end_ids=[TOKENIZER.eos_token_id], **({"longest": 8} | options))


def test_files_are_read_judged_and_counted(tmp_path):
    rows = [row(), row(text="1 = 68"), row(teacher="u"), row(), row(name="nobody")]
    made = TeacherStore.from_jsonl(*files(tmp_path, PROMPTS, rows), verifier=routes.verify)
    assert [(t.teacher, t.text, t.reward) for t in made.traces("p")] == [("t", "56 = 68", 1.0), ("u", "56 = 68", 1.0)]
    assert made.traces("q") == []
    first, second = made.statistics()
    assert (first["given"], first["correct"], first["kept"]) == (4, 2, 1)
    assert first["dropped"] == {"incorrect": 1, "repeated": 1, "unknown prompt": 1}
    assert second["correctness"] == 1.0
    assert made.dataset()[0] == {"id": "p", "prompt": "7 * 8 + 12 =", "answer": "68"}


def test_the_verifier_gets_every_column_and_its_own_reward_is_kept():
    seen = {}

    def verifier(prompts, completions, answer, level, id):
        seen.update(answer=answer, level=level, id=id)
        return [0.3, None]

    prompts = [("one", PROMPTS[0] | {"level": 2}), ("two", PROMPTS[1])]
    made = TeacherStore.from_rows(prompts, [("a", row("p")), ("b", row("q"))], verifier=verifier)
    assert seen == {"answer": ["68", "7"], "level": [2, None], "id": ["p", "q"]}
    assert [trace.reward for trace in made.traces()] == [0.3]
    assert made.statistics()[0]["dropped"] == {"no verdict": 1}


def test_wrong_traces_can_be_kept_with_their_own_reward_or_raise():
    rows = [("line 1", row(text="1 = 68"))]
    prompts = [("", PROMPTS[0])]
    kept = TeacherStore.from_rows(prompts, rows, verifier=routes.verify, on_incorrect="keep")
    assert kept.traces()[0].reward == 0.0
    with pytest.raises(DataError, match=r"line 1: the verifier gives the trace of teacher 't' the reward 0\.0"):
        TeacherStore.from_rows(prompts, rows, verifier=routes.verify, on_incorrect="raise")


def test_datasets_are_read_as_files_are():
    from datasets import Dataset

    made = TeacherStore.from_datasets(Dataset.from_list(PROMPTS), Dataset.from_list([row()]), verifier=routes.verify)
    assert len(made.traces("p")) == 1


@pytest.mark.parametrize(
    ("prompts", "teachers", "message"),
    [
        ([], [row()], "no prompts"),
        ([{"prompt": "a"}], [], "line 1: id is missing among prompt;"),
        ([{"id": "p"}], [], "neither a prompt"),
        ([PROMPTS[0], PROMPTS[0]], [], "line 2: the id 'p'"),
        ([{"id": "p", "messages": ["hello"]}], [], r"messages\[0\]: expected an object"),
        ([PROMPTS[0] | {"completions": 1}], [], "a field 'completions'"),
        (PROMPTS, [{"prompt_id": "p", "teacher": "t"}], "line 1: text is missing among prompt_id, teacher;"),
        (PROMPTS, [row(text="  ")], "line 1: text is"),
        (PROMPTS, [row(log_probs="none")], "log_probs are none"),
        (PROMPTS, [row(name="x"), row(name="y")], "no teacher's prompt_id is the id of a prompt"),
    ],
)
def test_bad_rows_are_named(tmp_path, prompts, teachers, message):
    with pytest.raises(DataError, match=message):
        TeacherStore.from_jsonl(*files(tmp_path, prompts, teachers), verifier=routes.verify)


def test_bad_files_and_verifiers_are_named(tmp_path):
    prompts, teachers = files(tmp_path, PROMPTS, [row()])
    with pytest.raises(DataError, match="absent"):
        TeacherStore.from_jsonl(tmp_path / "absent", teachers, verifier=routes.verify)
    with pytest.raises(DataError, match="returned 1 rewards for 2 texts"):
        TeacherStore.from_rows([("", PROMPTS[0])], [("", row()), ("", row(teacher="u"))], verifier=lambda **_: [1.0])
    with pytest.raises(DataError, match="failed on the texts 0 to 0, ZeroDivisionError"):
        TeacherStore.from_jsonl(prompts, teachers, verifier=lambda **_: [1 / 0])
    with pytest.raises(ConfigError, match="on_incorrect='ignore'"):
        TeacherStore.from_jsonl(prompts, teachers, verifier=routes.verify, on_incorrect="ignore")
    teachers.write_text("{not json\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        TeacherStore.from_jsonl(prompts, teachers, verifier=routes.verify)

    async def later(**_):
        return []

    with pytest.raises(ConfigError, match="async"):
        TeacherStore.from_jsonl(prompts, teachers, verifier=later)


def test_a_trace_ends_with_one_end_of_sequence_token():
    end = TOKENIZER.eos_token_id
    for text in ("56 = 68", "56 = 68 <eos>", "56 = 68 <eos> "):
        made = TeacherStore.from_rows([("", PROMPTS[0])], [("", row(text=text))], verifier=lambda **_: [1.0])
        (trace,) = tokens(made).of("p")
        assert trace.ids[-1] == end
        assert trace.ids.count(end) == 1
        assert trace.text == "56 = 68"


def test_a_trace_that_is_too_long_is_dropped_and_never_cut():
    teachers = store(8)
    everything, short = tokens(teachers), tokens(teachers, longest=7)
    assert len(everything.all()) == 24
    assert short.all() == []
    assert {name: dict(count) for name, count in short.dropped.items()} == {
        name: {"too long": 8} for name in ("S5", "S10", "D2")
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<|im_start|> 56 = 68", "chat markup"),
        ("7 * 8 + 12 = 56 = 68", "repeats its prompt"),
        ("56 <eos> = 68", "chat markup"),
    ],
)
def test_markup_and_prompts_are_no_part_of_a_trace(text, reason):
    made = TeacherStore.from_rows([("", PROMPTS[0])], [("", row(text=text))], verifier=lambda **_: [1.0])
    dropped = tokens(made, longest=64).dropped["t"]
    assert dict(dropped) == {reason: 1}


def test_what_the_tokenizer_loses_is_judged_again():
    def verifier(prompts, completions, **_):
        return [float("word" in text or "56" in text) for text in completions]

    rows = [("", row(text="word = 68")), ("", row(teacher="u", text="56   = 68"))]
    made = tokens(TeacherStore.from_rows([("", PROMPTS[0])], rows, verifier=verifier))
    assert dict(made.dropped["t"]) == {"changed by the tokenizer": 1}
    assert [trace.text for trace in made.of("p")] == ["56 = 68"]


def test_recorded_log_probabilities_fit_the_tokens():
    def made(log_probs):
        return tokens(
            TeacherStore.from_rows([("", PROMPTS[0])], [("", row(log_probs=log_probs))], verifier=routes.verify)
        )

    assert made([-1, -2, -3, -4]).of("p")[0].log_probs == (-1, -2, -3, -4)
    known = made([-1, -2, -3]).of("p")[0].log_probs
    assert known[:3] == (-1, -2, -3)
    assert math.isnan(known[3])
    with pytest.raises(DataError, match="has 2 log_probs and 4 tokens"):
        made([-1, -2])


def test_conversations_end_as_the_chat_template_has_it():
    tokenizer = routes.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <turn> {% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    prompts = [("", {"id": "p", "messages": [{"role": "user", "content": "7 * 8 + 12 ="}]})]
    teachers = TeacherStore.from_rows(prompts, [("", row())], verifier=routes.verify)
    (trace,) = TokenisedTeachers(teachers, tokenizer, end_ids=[tokenizer.eos_token_id, turn], longest=8).of("p")
    assert trace.ids[-1] == turn
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        TokenisedTeachers(teachers, tokenizer, end_ids=[turn], longest=8)


def test_every_prompt_of_the_small_store_has_its_teachers():
    made = tokens(store(4, ("S5", "D2")))
    for problem in problems(4):
        assert [trace.teacher for trace in made.of(problem.prompt)] == ["S5", "D2"]
