"""Reading request bodies: 400 for what is not JSON, 422 for JSON of the wrong form, naming the field that is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from telltale.align.judge.templates import ROLES, is_unicode

Messages = list[dict[str, str]]


class BadBody(Exception):
    """A body that cannot be served: HTTP ``status``, and ``location``, the path of keys and indices to what is wrong."""

    def __init__(self, status: int, location: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.status = status
        self.location = location
        self.message = message

    def to_dict(self) -> dict[str, Any]:
        """The form that FastAPI's own 422 has; never repeats the input."""
        return {"detail": [{"loc": ["body", *self.location], "msg": self.message}]}


@dataclass(frozen=True)
class ScoreBody:
    """``POST /score``: conversations, and whether the body held one that was not in a list."""

    conversations: list[Messages]
    single: bool


def parse(raw: bytes) -> Any:
    """The JSON value of a body. Raises :class:`BadBody` (400) if it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadBody(400, (), "the body is not JSON; expected a JSON document in UTF-8") from None


def score_body(value: Any) -> ScoreBody:
    """``{"messages": [message, ...]}`` (one), ``{"messages": [[message, ...], ...]}`` or a list of such (many).

    Raises :class:`BadBody` (422).
    """
    if isinstance(value, list):
        return ScoreBody([_entry(item, (index,)) for index, item in enumerate(value)], single=False)
    if not isinstance(value, dict):
        raise BadBody(422, (), f"expected an object with the field 'messages', or a list; got {_kind(value)}")
    if "messages" not in value:
        raise BadBody(422, ("messages",), "the field 'messages' is missing")
    messages = value["messages"]
    if not isinstance(messages, list):
        raise BadBody(422, ("messages",), f"expected a list of messages, got {_kind(messages)}")
    if not messages or isinstance(messages[0], list):
        found = [conversation(item, ("messages", index)) for index, item in enumerate(messages)]
        return ScoreBody(found, single=False)
    return ScoreBody([conversation(messages, ("messages",))], single=True)


def reward_body(value: Any) -> list[Messages | str | tuple[str, str]]:
    """OpenRLHF's ``{"query": [...], "prompts"?: [...]}``: per query a conversation, a rendered text, or (prompt, response).

    A query text that begins with its entry of ``prompts`` is split there. Raises :class:`BadBody` (422).
    """
    if not isinstance(value, dict):
        raise BadBody(422, (), f"expected an object with the field 'query', got {_kind(value)}")
    if "query" not in value:
        raise BadBody(422, ("query",), "the field 'query' is missing")
    queries, prompts = value["query"], value.get("prompts")
    if not isinstance(queries, list):
        raise BadBody(422, ("query",), f"expected a list, got {_kind(queries)}")
    if prompts is not None:
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise BadBody(422, ("prompts",), "expected a list of strings")
        if len(prompts) != len(queries):
            raise BadBody(422, ("prompts",), f"{len(prompts)} prompts for {len(queries)} queries; expected as many")
    found: list[Messages | str | tuple[str, str]] = []
    for index, query in enumerate(queries):
        if not isinstance(query, str):
            found.append(conversation(query, ("query", index)))
        elif prompts is not None and query.startswith(prompts[index]):
            found.append((prompts[index], query[len(prompts[index]) :]))
        else:
            found.append(query)
    return found


def conversation(value: Any, location: tuple[str | int, ...]) -> Messages:
    """A list of messages that ends with the assistant's. Raises :class:`BadBody` (422)."""
    if not isinstance(value, list):
        raise BadBody(422, location, f"expected a list of messages, got {_kind(value)}")
    if not value:
        raise BadBody(422, location, "expected at least one message, got an empty conversation")
    for index, message in enumerate(value):
        where = (*location, index)
        if not isinstance(message, dict):
            raise BadBody(422, where, f"expected a message with role and content, got {_kind(message)}")
        for field in ("role", "content"):
            if field not in message:
                raise BadBody(422, (*where, field), f"the field {field!r} is missing")
            if not isinstance(message[field], str):
                raise BadBody(422, (*where, field), f"expected a string, got {_kind(message[field])}")
        if not is_unicode(message["content"]):
            raise BadBody(422, (*where, "content"), "half of a surrogate pair; expected text that UTF-8 can write")
        if message["role"] not in ROLES:
            raise BadBody(422, (*where, "role"), f"expected one of {', '.join(ROLES)}")
    if value[-1]["role"] != "assistant":
        raise BadBody(422, (*location, len(value) - 1, "role"), "the last message has to be the assistant's response")
    if len(value) < 2:
        raise BadBody(422, location, "expected a prompt before the response, got a single message")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _entry(item: Any, location: tuple[str | int, ...]) -> Messages:
    if isinstance(item, dict):
        if "messages" not in item:
            raise BadBody(422, (*location, "messages"), "the field 'messages' is missing")
        return conversation(item["messages"], (*location, "messages"))
    return conversation(item, location)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
