"""Tool calls: what requests say of them, and how an answer's text is read as calls, in the form of the model's own template.

The forms are those of :mod:`telltale.serve.tool_forms`.
"""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from telltale.models.conversations import ConversationError, json_kind, read_messages, read_text
from telltale.serve.http_json import fault
from telltale.serve.tool_forms import CLOSE, LIST, OPEN, ToolForm

ROLES = ("system", "user", "assistant", "tool")
TOOLS = 128
"""Most tools of a request, as OpenAI has it."""
_TOOL_FIELDS = ("tool_calls", "tool_call_id")


@dataclass
class ToolCall:
    """A call as clients get it. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallReader:
    """Parts an answer's text, as it comes, into what is said and calls. ``single``: further calls are dropped."""

    def __init__(self, form: ToolForm, names: Sequence[str], *, single: bool = False) -> None:
        self._form = form
        self._names = set(names)
        self._single = single or form.single
        self._held = ""
        self._said = False
        self._behind_call = False
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What is certain to be said, and the calls that are complete, with this ``text``."""
        self._held += text
        return self._tagged() if self._form.kind == "tags" else self._whole()

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest; the answer is over. What looked like a call and is none is text."""
        held, self._held = self._held, ""
        if self._form.kind == "tags":
            if self._behind_call and not held.strip():
                return "", []
            call = self._call(_value(held.removeprefix(OPEN))) if held.startswith(OPEN) else None
            return ("", self._taken([call])) if call is not None else (held, [])
        values = _listed(held) if self._form.kind == "list" else _objects(held)
        calls = [self._call(one) for one in values]
        if calls and all(call is not None for call in calls):
            return "", self._taken(calls)
        return held, []

    def _tagged(self) -> tuple[str, list[ToolCall]]:
        said, calls = "", []
        while True:
            if self._behind_call:
                # White space between two calls is no text.
                text = self._held.lstrip()
                if OPEN.startswith(text[: len(OPEN)]) and len(text) < len(OPEN):
                    break
                self._behind_call = False
                self._held = text if text.startswith(OPEN) else self._held
            before, found, rest = self._held.partition(OPEN)
            if not found:
                kept = _overlap(self._held, OPEN)
                said += self._held[: len(self._held) - kept]
                self._held = self._held[len(self._held) - kept :]
                break
            said += before
            inner, closed, after = rest.partition(CLOSE)
            self._held = found + rest
            if not closed:
                break
            call = self._call(_value(inner))
            calls += self._taken([call])
            said += "" if call is not None else found + inner + closed
            self._behind_call = call is not None
            self._held = after
        return said, calls

    def _whole(self) -> tuple[str, list[ToolCall]]:
        begun = self._held.lstrip()[:1]
        if not self._said and begun in ("[" if self._form.kind == "list" else "{", ""):
            return "", []
        self._said = True
        said, self._held = self._held, ""
        return said, []

    def _taken(self, calls: Sequence[ToolCall | None]) -> list[ToolCall]:
        found = [call for call in calls if call is not None]
        if self._single:
            found = found[: max(0, 1 - self.count)]
        self.count += len(found)
        return found

    def _call(self, value: Any) -> ToolCall | None:
        # A model writes anything there, lists as well.
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get(self._form.arguments, {})
        if not isinstance(arguments, dict):
            return None
        call = ToolCall(value["name"], json.dumps(arguments))
        if self._form.short_ids:
            call.id = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return call


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The ``tools`` of a request; None for none."""
    if not isinstance(value, list) or len(value) > TOOLS:
        raise fault("invalid_type", f"expected an array of up to {TOOLS} tools.")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise fault("invalid_value", "expected tools of the type function, each with a function.")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
            raise fault("invalid_value", "expected a name of 1 to 64 characters for every function.")
        if parameters is not None and not isinstance(parameters, dict):
            raise fault("invalid_value", "expected the parameters of a function to be a JSON schema.")
        if not isinstance(function.get("description") or "", str):
            raise fault("invalid_value", "expected the description of a function to be text.")
    return value or None


def read_tool_choice(value: Any) -> str | None:
    """``tool_choice``: None for auto, "none", "required", or "function NAME"."""
    if value == "auto":
        return None
    if value in ("none", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return f"function {function['name']}"
    raise fault("invalid_value", "expected none, auto, required, or a function by its name.")


def read_chat(value: Any) -> list[dict[str, Any]]:
    """Messages of a chat, calls and the tools' answers among them. An assistant's content may be null.

    Raises :class:`~telltale.models.conversations.ConversationError`.
    """
    if not isinstance(value, list):
        return list[dict[str, Any]](read_messages(value, roles=ROLES, strict=True))
    plain, calls = [], []
    for place, message in enumerate(value):
        if isinstance(message, dict):
            calls.append(_fields(message, f"messages[{place}]"))
            message = {name: inner for name, inner in message.items() if name not in _TOOL_FIELDS}
            if message.get("role") == "assistant" and message.get("content") is None:
                message["content"] = ""
        else:
            calls.append({})
        plain.append(message)
    found = read_messages(plain, roles=ROLES, strict=True)
    return [message | own for message, own in zip(found, calls, strict=True)]


def _fields(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The calls of an assistant's message as templates take them, or the call that a tool answers."""
    found: dict[str, Any] = {}
    calls, answered = message.get("tool_calls"), message.get("tool_call_id")
    if calls:
        if message.get("role") != "assistant" or not isinstance(calls, list):
            raise ConversationError(f"{name}.tool_calls", "expected an array, in a message of the assistant.", "value")
        found["tool_calls"] = [_past_call(call, f"{name}.tool_calls[{at}]") for at, call in enumerate(calls)]
    if answered is not None:
        if message.get("role") != "tool":
            raise ConversationError(f"{name}.tool_call_id", "expected it in a message of the role tool only.", "value")
        found["tool_call_id"] = read_text(answered, f"{name}.tool_call_id")
    return found


def _past_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(name, f"expected a call with a function, got {json_kind(call)}.", "value")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ConversationError(f"{name}.function.arguments", "expected the text of a JSON object.", "value")
    # Templates write arguments as JSON themselves.
    own = {"name": read_text(function["name"], f"{name}.function.name"), "arguments": arguments}
    given = {"id": read_text(call["id"], f"{name}.id")} if call.get("id") is not None else {}
    return given | {"type": "function", "function": own}


def _value(text: str) -> Any:
    """A JSON value; None for what is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _listed(text: str) -> list[Any]:
    """The values of a JSON list that a text consists of; nothing if it is anything else."""
    found = _value(text.strip().removeprefix(LIST))
    return found if isinstance(found, list) else []


def _objects(text: str) -> list[Any]:
    """The JSON values that a text consists of, one after the other, perhaps with semicolons; nothing if it is anything else."""
    decoder, found, rest = json.JSONDecoder(parse_constant=_no_constant), [], text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
