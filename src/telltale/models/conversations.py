"""Conversations as people and programs write them, read into the one form that chat templates take.

A conversation is a list of messages. A message has a ``role`` and a ``content``: text, a list of parts of the type "text" (their
texts are joined), or null where the caller allows messages without text. The role "developer", which is OpenAI's newer word, is
read as "system". Anything else is an error that names its place, such as ``messages[1].content[0].type``.

Servers, data sets and reward functions all read messages here, so that the same conversation means the same everywhere.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from telltale.errors import DataError

Messages = list[dict[str, str]]
"""Messages with ``role`` and ``content``, and ``name`` where :func:`read_messages` keeps it."""
ROLES = ("system", "user", "assistant", "tool")
Fault = Literal["missing", "type", "value", "unsupported", "unknown"]

_UNSUPPORTED = ("tool_calls", "function_call", "audio", "refusal", "annotations")
"""Fields of OpenAI's messages that are accepted as long as they hold nothing."""
REPEATED = "the prompt stands in the response once more"
"""What :func:`read_exchange` tells of a form that gives its prompt twice."""
_TURNS = re.compile(r"\n\n(Human|Assistant): ?")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_SHORTEST_PROMPT = 16
"""Characters from which a response that begins with its prompt repeats it, and does not just use the same word."""
_SHOWN = 80
"""Characters of an unknown field's name that an error repeats."""


class ConversationError(DataError):
    """A conversation that cannot be used. ``name``: what is wrong, such as ``messages[1].role``; ``problem``: the sentence after
    it; ``fault``: of which kind it is. The text of a message is never repeated."""

    def __init__(self, name: str, problem: str, fault: Fault) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name
        self.problem = problem
        self.fault: Fault = fault


def read_messages(
    value: Any,
    *,
    name: str = "messages",
    roles: Sequence[str] = ROLES,
    strict: bool = False,
    null_content: bool = False,
) -> Messages:
    """Messages in the form of chat templates: each with a role of ``roles`` and a text as content.

    ``name`` is what errors call ``value``. ``strict`` refuses fields that are not known, and keeps a speaker's ``name``; without
    it only role and content are read. ``null_content`` reads a content that is null, or not there, as the empty text.
    Raises :class:`ConversationError`.
    """
    if not isinstance(value, (list, tuple)):
        raise ConversationError(name, f"expected an array of messages, got {json_kind(value)}.", "type")
    if not value:
        raise ConversationError(name, "it is empty; expected at least one message.", "value")
    return [
        _message(message, f"{name}[{index}]", roles, strict=strict, null_content=null_content)
        for index, message in enumerate(value)
    ]


def read_conversation(value: Any, *, name: str = "messages", roles: Sequence[str] = ROLES) -> Messages:
    """Messages that end with the assistant's response to a prompt, as a judge reads them; see :func:`read_messages`."""
    messages = read_messages(value, name=name, roles=roles)
    if messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"{name}[{len(messages) - 1}].role",
            f"the last message is of the role {messages[-1]['role']!r}; expected the assistant's response.",
            "value",
        )
    if len(messages) < 2:
        raise ConversationError(name, "it has a single message; expected a prompt before the response.", "value")
    return messages


def read_prompt(
    value: Any, *, name: str = "prompt", roles: Sequence[str] = ROLES, null_content: bool = False
) -> Messages:
    """A prompt: messages, or a text, which is one message of the user; see :func:`read_messages`."""
    if isinstance(value, str):
        return [{"role": "user", "content": read_text(value, name)}]
    return read_messages(value, name=name, roles=roles, null_content=null_content)


def read_exchange(
    prompt: Any,
    response: Any,
    *,
    name: str = "response",
    prompt_name: str = "prompt",
    null_content: bool = False,
    told: list[str] | None = None,
) -> Messages:
    """A prompt and what follows it as one conversation, which ends with the assistant's response.

    ``prompt``: a text, messages, or None (or no messages) where ``response`` holds everything. ``response``: the assistant's text,
    the messages that follow the prompt, or the whole conversation. A prompt that stands in the response once more is read once,
    and ``told`` gets :data:`REPEATED`. Raises :class:`ConversationError`, also where the two disagree about what was asked.
    """
    before = [] if prompt is None or prompt == [] else read_prompt(prompt, name=prompt_name, null_content=null_content)
    if isinstance(response, str):
        text = _without_prompt(prompt, read_text(response, name))
        if text != response and told is not None:
            told.append(REPEATED)
        return read_conversation([*before, {"role": "assistant", "content": text}], name=name)
    after = read_messages(response, name=name, null_content=null_content)
    if before and after[0]["role"] != "assistant":
        shared = next(
            (size for size in range(min(len(before), len(after)), 0, -1) if before[-size:] == after[:size]), 0
        )
        if not shared:
            raise ConversationError(
                name,
                f"it begins with the {after[0]['role']}'s turn, which is not the end of the prompt; expected the response, or the "
                f"conversation that the prompt begins.",
                "value",
            )
        after = after[shared:]
        if told is not None:
            told.append(REPEATED)
    return read_conversation([*before, *after], name=name)


def read_transcript(text: str, *, name: str = "transcript") -> Messages:
    """Messages of a dialogue written out as ``\\n\\nHuman: ...\\n\\nAssistant: ...``, as in HH-RLHF.

    Raises :class:`ConversationError` for a text that does not begin with the human's turn.
    """
    pieces = _TURNS.split("\n\n" + read_text(text, name).lstrip())
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        raise ConversationError(name, "it does not begin with a turn of the Human.", "value")
    roles = {"Human": "user", "Assistant": "assistant"}
    found: Messages = []
    for who, said in zip(pieces[1::2], pieces[2::2], strict=True):
        if found and found[-1]["role"] == roles[who]:
            found[-1]["content"] += f"\n\n{said.strip()}"  # a turn in two paragraphs, each with the speaker's name
        else:
            found.append({"role": roles[who], "content": said.strip()})
    return found


def read_content(value: Any, name: str, *, strict: bool = False) -> str | None:
    """The text of a message's content: of a text or of text parts; None for null, or for a list without parts.

    Raises :class:`ConversationError` for anything else, parts of another type included.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return read_text(value, name)
    if not isinstance(value, (list, tuple)):
        raise ConversationError(name, f"expected text or an array of text parts, got {json_kind(value)}.", "type")
    texts = [_part(part, f"{name}[{index}]", strict=strict) for index, part in enumerate(value)]
    return "".join(texts) if texts else None


def read_text(value: Any, name: str) -> str:
    """``value`` if it is a text that UTF-8 can write: JSON's escapes can spell half of a surrogate pair, which no tokenizer takes.

    Raises :class:`ConversationError`.
    """
    if not isinstance(value, str):
        raise ConversationError(name, f"expected a string, got {json_kind(value)}.", "type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConversationError(
            name, "the text has half of a surrogate pair; expected text that UTF-8 can write.", "value"
        ) from None
    return value


def json_kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if isinstance(value, bool):
        return "a boolean"
    for kinds, word in _WORDS:
        if isinstance(value, kinds):
            return word
    return type(value).__name__


_WORDS: tuple[tuple[Any, str], ...] = (
    (type(None), "null"),
    (str, "a string"),
    ((int, float), "a number"),
    (Mapping, "an object"),
    ((list, tuple), "an array"),
)


def _message(value: Any, name: str, roles: Sequence[str], *, strict: bool, null_content: bool) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ConversationError(name, f"expected an object with role and content, got {json_kind(value)}.", "type")
    if not strict and "role" not in value and isinstance(value.get("from"), str) and value["from"] in _SHAREGPT:
        value = {"role": _SHAREGPT[value["from"]], "content": value.get("value")}  # ShareGPT's words
    role = _role(value.get("role"), f"{name}.role", roles)
    content = read_content(value.get("content"), f"{name}.content", strict=strict)
    if content is None:
        if not null_content:
            raise ConversationError(f"{name}.content", "it is missing; expected text.", "missing")
        content = ""
    found = {"role": role, "content": content}
    if strict:
        if value.get("name") is not None:
            found["name"] = read_text(value["name"], f"{name}.name")
        _refuse_other_fields(value, name)
    return found


def _without_prompt(prompt: Any, text: str) -> str:
    """``text`` without ``prompt`` in front of it, if that is a text long enough to be no accident."""
    if not isinstance(prompt, str) or len(prompt.strip()) < _SHORTEST_PROMPT or not text.startswith(prompt):
        return text
    rest = text[len(prompt) :]
    return rest.lstrip() if rest.strip() else text


def _role(value: Any, name: str, roles: Sequence[str]) -> str:
    if value is None:
        raise ConversationError(name, f"it is missing; expected one of {', '.join(roles)}.", "missing")
    role = read_text(value, name)
    role = "system" if role == "developer" else role
    if role not in roles:
        raise ConversationError(name, f"expected one of {', '.join(roles)}.", "value")
    return role


def _part(value: Any, name: str, *, strict: bool) -> str:
    if not isinstance(value, Mapping):
        raise ConversationError(name, f"expected a text part, got {json_kind(value)}.", "type")
    if value.get("type") != "text":
        raise ConversationError(f"{name}.type", "only parts of the type 'text' are supported.", "unsupported")
    if value.get("text") is None:
        raise ConversationError(f"{name}.text", "it is missing; expected text.", "missing")
    if strict:
        _refuse_unknown(value, name, ("type", "text"))
    return read_text(value["text"], f"{name}.text")


def _refuse_other_fields(value: Mapping[str, Any], name: str) -> None:
    for field in _UNSUPPORTED:
        if value.get(field):
            raise ConversationError(f"{name}.{field}", "it is not supported; leave the field out.", "unsupported")
    _refuse_unknown(value, name, ("role", "content", "name", *_UNSUPPORTED))


def _refuse_unknown(value: Mapping[str, Any], name: str, known: Sequence[str]) -> None:
    for field in value:
        if field not in known:
            raise ConversationError(
                f"{name}.{str(field)[:_SHOWN]}", f"the field is not known.{_hint(field, known)}", "unknown"
            )


def _hint(field: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(field)[:_SHOWN], known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
