"""Every way to write a conversation reaches one form; what is not one is refused by the name of what is wrong."""

from __future__ import annotations

import pytest

from telltale.errors import DataError
from telltale.models.conversations import (
    ConversationError,
    json_kind,
    read_content,
    read_conversation,
    read_messages,
    read_prompt,
)

ASKED = {"role": "user", "content": "two"}
ANSWERED = {"role": "assistant", "content": "five"}
HALF = "\ud800"


def part(text):
    return {"type": "text", "text": text}


def test_every_form_of_a_message_is_read_as_the_same():
    forms = [
        ASKED,
        {"role": "user", "content": [part("two")]},
        {"role": "user", "content": [part("t"), part(""), part("wo")]},
        {"role": "user", "content": ({"type": "text", "text": "two", "image_url": None},)},
        {"role": "user", "content": "two", "tool_calls": None, "weight": 1},
    ]
    for form in forms:
        assert read_messages([form]) == read_messages((form,)) == [ASKED]
    assert read_prompt("two") == [ASKED]
    assert read_prompt(forms[:2]) == [ASKED, ASKED]


def test_what_is_read_is_a_copy():
    given = [dict(ASKED)]
    read_messages(given)[0]["content"] = "other"
    assert given == [ASKED]


def test_a_developers_message_is_a_systems():
    assert read_messages([{"role": "developer", "content": "short"}]) == [{"role": "system", "content": "short"}]


def test_roles_are_the_callers():
    tool = {"role": "tool", "content": "5"}
    assert read_messages([tool]) == [tool]
    with pytest.raises(ConversationError, match=r"^messages\[0\].role: expected one of user, assistant\.$"):
        read_messages([tool], roles=("user", "assistant"))


def test_null_is_no_text_unless_the_caller_takes_it():
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert (
        read_messages([called, {"role": "assistant"}], null_content=True) == [{"role": "assistant", "content": ""}] * 2
    )
    assert read_content(None, "content") is None
    assert read_content([], "content") is None
    assert read_content("", "content") == read_content([part("")], "content") == ""
    for content in (None, []):
        with pytest.raises(ConversationError) as refusal:
            read_messages([{"role": "assistant", "content": content}])
        assert (refusal.value.name, refusal.value.fault) == ("messages[0].content", "missing")


def test_a_name_is_kept_where_fields_are_checked():
    named = ASKED | {"name": "Ada"}
    assert read_messages([named], strict=True) == [named]
    assert read_messages([named]) == [ASKED]
    empty = {"refusal": None, "tool_calls": [], "annotations": [], "audio": None}
    assert read_messages([ASKED | empty], strict=True) == [ASKED]


@pytest.mark.parametrize(
    ("value", "name", "fault"),
    [
        (None, "messages", "type"),
        ("two", "messages", "type"),
        ({"role": "user"}, "messages", "type"),
        ([], "messages", "value"),
        (["two"], "messages[0]", "type"),
        ([ASKED, None], "messages[1]", "type"),
        ([{"content": "two"}], "messages[0].role", "missing"),
        ([{"role": 5, "content": "two"}], "messages[0].role", "type"),
        ([{"role": "robot", "content": "two"}], "messages[0].role", "value"),
        ([{"role": HALF, "content": "two"}], "messages[0].role", "value"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": 5}], "messages[0].content", "type"),
        ([{"role": "user", "content": {}}], "messages[0].content", "type"),
        ([{"role": "user", "content": HALF}], "messages[0].content", "value"),
        ([{"role": "user", "content": ["two"]}], "messages[0].content[0]", "type"),
        ([{"role": "user", "content": [{"text": "two"}]}], "messages[0].content[0].type", "unsupported"),
        ([{"role": "user", "content": [part("a"), {"type": "image"}]}], "messages[0].content[1].type", "unsupported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "missing"),
        ([{"role": "user", "content": [part(5)]}], "messages[0].content[0].text", "type"),
        ([{"role": "user", "content": [part(HALF)]}], "messages[0].content[0].text", "value"),
    ],
)
def test_what_is_refused_is_named(value, name, fault):
    for strict in (False, True):
        with pytest.raises(ConversationError) as refusal:
            read_messages(value, strict=strict, null_content=False)
        assert (refusal.value.name, refusal.value.fault) == (name, fault)
        assert str(refusal.value) == f"{name}: {refusal.value.problem}"
        assert isinstance(refusal.value, DataError)


@pytest.mark.parametrize(
    ("field", "name", "fault"),
    [
        ({"tool_calls": [1]}, "messages[0].tool_calls", "unsupported"),
        ({"audio": {"id": "1"}}, "messages[0].audio", "unsupported"),
        ({"colour": None}, "messages[0].colour", "unknown"),
        ({"x" * 200: 1}, "messages[0]." + "x" * 80, "unknown"),
        ({"name": 5}, "messages[0].name", "type"),
        ({"content": [part("two") | {"colour": 1}]}, "messages[0].content[0].colour", "unknown"),
    ],
)
def test_strict_reading_refuses_what_it_would_leave_out(field, name, fault):
    with pytest.raises(ConversationError) as refusal:
        read_messages([ASKED | field], strict=True)
    assert (refusal.value.name, refusal.value.fault) == (name, fault)


def test_the_nearest_field_is_named():
    with pytest.raises(ConversationError, match=r"Did you mean content\?$"):
        read_messages([ASKED | {"contents": "two"}], strict=True)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([ASKED], "row 3[0].role"),
        ([ANSWERED, ASKED], "row 3[1].role"),
        ([ANSWERED], "row 3"),
        ([], "row 3"),
    ],
)
def test_a_judged_conversation_ends_with_the_response(value, name):
    assert read_conversation([ASKED, ANSWERED]) == [ASKED, ANSWERED]
    with pytest.raises(ConversationError) as refusal:
        read_conversation(value, name="row 3")
    assert refusal.value.name == name


def test_no_error_repeats_a_text():
    secret = "the-secret"
    for message in ({"role": "user", "content": [{"type": secret}]}, {"role": secret, "content": secret}):
        with pytest.raises(ConversationError) as refusal:
            read_messages([message])
        assert secret not in str(refusal.value)


def test_values_have_names_in_jsons_words():
    values = [None, True, 1, 1.5, "", {}, [], (), object()]
    assert [json_kind(value) for value in values] == [
        "null",
        "a boolean",
        "a number",
        "a number",
        "a string",
        "an object",
        "an array",
        "an array",
        "object",
    ]
