"""Tool calls in the form of the model's own chat template: what is shown to the model, and what its answer is read as.

Two forms are known. Qwen, Hermes and SmolLM3 write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them
behind a text; Llama 3 writes ``{"name": ..., "parameters": {...}}`` as its whole answer. Which one a template teaches is read from
what it makes of a tool; a template of neither form, or one that does not show tools at all, is refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from telltale.models.conversations import ConversationError, json_kind, read_messages, read_text
from telltale.serve.http_errors import ApiError, refused
from telltale.serve.http_json import fault

ROLES = ("system", "user", "assistant", "tool")
TOOLS = 128
"""Most tools of a request, as OpenAI has it."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PROBE = "telltale_probe"
_TOOL_FIELDS = ("tool_calls", "tool_call_id")


@dataclass(frozen=True)
class ToolForm:
    """``arguments``: the key of a call's arguments; ``tagged``: whether calls stand between tags; ``variable``: the template's
    name for the tools."""

    arguments: str
    tagged: bool
    variable: str = "tools"

    @classmethod
    def of(cls, tokenizer: Any) -> ToolForm:
        """The form that a tokenizer's chat template teaches. Raises :class:`~telltale.serve.http_errors.ApiError` (400)."""
        asks = [{"role": "user", "content": "?"}]
        probe = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
        tool = {"type": "function", "function": probe}
        for variable in ("tools", "xml_tools"):
            try:
                text = tokenizer.apply_chat_template(
                    asks, add_generation_prompt=True, tokenize=False, **{variable: [tool]}
                )
            except Exception:
                # A template refuses with exceptions of its own; then it does not show tools in this way.
                continue
            if _PROBE not in text:
                continue
            written = tokenizer.get_chat_template(tools=[tool])
            tagged = OPEN in text
            if tagged and '"arguments"' in text and "<function=" not in text and "<arg_key>" not in text:
                if OPEN in getattr(tokenizer, "all_special_tokens", ()):
                    raise _refused(f"the tokenizer hides {OPEN}, so calls cannot be read from text.")
                return cls("arguments", True, variable)
            # A tool's own JSON has parameters as well; what counts is what the template says of calls.
            if not tagged and '{"name"' in written and '"parameters"' in written:
                return cls("parameters", False, variable)
            raise _refused(
                "the model's chat template writes tool calls in a form that is not read here; expected "
                "<tool_call>{JSON}</tool_call> (Qwen, Hermes, SmolLM3) or a JSON object with name and parameters (Llama 3)."
            )
        raise _refused("the model's chat template does not show tools to the model; leave the field out.")

    def grammar(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Rules in Lark's form for exactly one call of one of ``tools``."""
        # Every schema is a document of its own: references in it begin at its root.
        rules, spaced = [], {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        for place, tool in enumerate(tools):
            function = tool["function"]
            parameters = function.get("parameters") or {"type": "object"}
            if "properties" in parameters:
                parameters = {"type": "object"} | parameters
            name = json.dumps(function["name"], ensure_ascii=False)
            opening = json.dumps(f'{{"name": {name}, "{self.arguments}": ', ensure_ascii=False)
            rules.append(f'call_{place}: {opening} arguments_{place} "}}"')
            rules.append(f"arguments_{place}: %json {json.dumps(parameters | {'x-guidance': spaced})}")
        call = " | ".join(f"call_{place}" for place in range(len(tools)))
        start = f'"{OPEN}\\n" call "\\n{CLOSE}"' if self.tagged else "call"
        return "\n".join([f"start: {start}", f"call: {call}", *rules])


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
        self._single = single
        self._held = ""
        self._said = False
        self._behind_call = False
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What is certain to be said, and the calls that are complete, with this ``text``."""
        self._held += text
        return self._tagged() if self._form.tagged else self._bare()

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest; the answer is over. What looked like a call and is none is text."""
        held, self._held = self._held, ""
        if self._form.tagged:
            if self._behind_call and not held.strip():
                return "", []
            call = self._call(held.removeprefix(OPEN)) if held.startswith(OPEN) else None
            return ("", self._taken([call])) if call is not None else (held, [])
        calls = [self._call(one) for one in _objects(held)]
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
            call = self._call(inner)
            calls += self._taken([call])
            said += "" if call is not None else found + inner + closed
            self._behind_call = call is not None
            self._held = after
        return said, calls

    def _bare(self) -> tuple[str, list[ToolCall]]:
        if not self._said and self._held.lstrip()[:1] in ("{", ""):
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

    def _call(self, text: str) -> ToolCall | None:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        # A model writes anything there, lists as well.
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get(self._form.arguments, {})
        return ToolCall(value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


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


def _objects(text: str) -> list[str]:
    """The JSON objects that a text consists of, one after the other, perhaps with semicolons; nothing if it is anything else."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        try:
            _, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(rest[:end])
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)


def _refused(problem: str) -> ApiError:
    return refused("tools", problem, code="unsupported_parameter")
