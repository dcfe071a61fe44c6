"""How a chat template writes a tool call. It is asked: a probe's call is put into a chat, and read where the template wrote it.

Three forms are known. Qwen, Hermes and Granite 4 write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of
them behind a text; Llama 3 writes ``{"name": ..., "parameters": {...}}`` as its whole answer; Mistral (Nemo, 7B v0.3, Small 3.1)
writes a list of calls behind a token ``[TOOL_CALLS]``. Where a template shows tools but leaves past calls out (SmolLM3), the first
form is also taken from its instructions. Any other is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from telltale.serve.http_errors import ApiError, refused

OPEN, CLOSE = "<tool_call>", "</tool_call>"
LIST = "[TOOL_CALLS]"
_PROBE, _ARGUMENT = "telltale_probe", {"telltale_argument": 1}
_ASKS = {"role": "user", "content": "?"}
_FUNCTION = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
_LONG_ID, _SHORT_ID = "call_telltale0telltale0telltale", "telltale0"
_INSTRUCTION = re.compile(rf'{OPEN}\s*\{{"name": [^{{}}"]+, "arguments": [^{{}}"]+\}}\s*{CLOSE}')


@dataclass(frozen=True)
class ToolForm:
    """``kind``: "tags" (each call between tags), "whole" (the answer is one object, or several), "list" (the answer is a list)."""

    kind: str
    variable: str = "tools"
    """The template's name for the tools."""
    before: str = ""
    """What stands before the first call, without a special token."""
    after: str = ""
    """What stands behind the last call, up to the end of the turn."""
    opening: int | None = None
    """The special token before a list; no text shows it."""
    with_id: bool = False
    """Whether a call has its id in it."""
    short_ids: bool = False
    """Whether the template takes ids of nine letters and digits only."""
    single: bool = False
    """Whether the template refuses an answer with several calls."""
    fills: bool = False
    """Whether the template takes no tool without a description and parameters, which a request may leave out."""

    @property
    def arguments(self) -> str:
        """The key of a call's arguments."""
        return "parameters" if self.kind == "whole" else "arguments"

    @classmethod
    def of(cls, tokenizer: Any) -> ToolForm:
        """The form of a tokenizer's chat template. Raises :class:`~telltale.serve.http_errors.ApiError` (400)."""
        for variable in ("tools", "xml_tools"):
            shown = _rendered(tokenizer, [_ASKS], variable, ends=True)
            if shown is not None and _PROBE in shown:
                bare = _rendered(tokenizer, [_ASKS], variable, ends=True, function={"name": _PROBE})
                return replace(_read(tokenizer, variable, shown), fills=bare is None)
        raise _refused("the model's chat template does not show tools to the model; leave the field out.")

    def shown(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``tools`` as the template is given them."""
        empty = {"description": "", "parameters": {"type": "object", "properties": {}}} if self.fills else {}
        return [dict(tool) | {"function": empty | dict(tool["function"])} for tool in tools]

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
            ending = '", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"}"' if self.with_id else '"}"'
            rules.append(f"call_{place}: {opening} arguments_{place} {ending}")
            rules.append(f"arguments_{place}: %json {json.dumps(parameters | {'x-guidance': spaced})}")
        call = " | ".join(f"call_{place}" for place in range(len(tools)))
        token = [] if self.opening is None else [f"<[{self.opening}]>"]
        before, after = ([json.dumps(text)] if text else [] for text in (self.before, self.after))
        return "\n".join([f"start: {' '.join([*token, *before, 'call', *after])}", f"call: {call}", *rules])


def _rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    variable: str,
    *,
    ends: bool,
    function: Mapping[str, Any] = _FUNCTION,
) -> str | None:
    """What the template makes of a chat with the probe's tool; None if it refuses. ``ends``: with the beginning of an answer."""
    tool = {"type": "function", "function": dict(function)}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=ends, tokenize=False, **{variable: [tool]}
            )
        )
    except Exception:
        # A template refuses with exceptions of its own.
        return None


def _read(tokenizer: Any, variable: str, shown: str) -> ToolForm:
    def called(name: str, count: int) -> str | None:
        call = {"id": name, "type": "function", "function": {"name": _PROBE, "arguments": _ARGUMENT}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call] * count}
        return _rendered(tokenizer, [_ASKS, answer], variable, ends=False)

    written, short = called(_LONG_ID, 1), False
    if written is None:
        written, short = called(_SHORT_ID, 1), True
    found = None if written is None else _call_in(written)
    if written is None or found is None:
        # It leaves calls out; what it says of them is all there is.
        silent = written is None or json.dumps(_ARGUMENT)[1:-1] not in written
        if silent and _INSTRUCTION.search(shown):
            return _readable(tokenizer, ToolForm("tags", variable, f"{OPEN}\n", f"\n{CLOSE}"))
        raise _unknown()
    start, end, call = found
    several = called(_SHORT_ID if short else _LONG_ID, 2) is not None
    whole = ToolForm("whole", variable, short_ids=short, with_id="id" in call, single=not several)
    before, after = written[:start], written[end:]
    opened, closed = re.search(rf"{OPEN}\s*$", before), re.match(rf"\s*{CLOSE}", after)
    if opened and closed and "arguments" in call:
        return _readable(tokenizer, replace(whole, kind="tags", before=opened[0], after=closed[0]))
    # A call that is the whole answer begins where the answer begins.
    turn = before[len(shown) :] if before.startswith(shown) else None
    if turn is not None and not turn.strip() and "parameters" in call and not short:
        return whole
    inner = None if turn is None else turn.strip().removeprefix(LIST).lstrip()
    if turn is not None and inner == "[" and after.startswith("]") and "arguments" in call:
        tokens = tokenizer.convert_tokens_to_ids(LIST) if LIST in turn else None
        hidden = tokens if LIST in getattr(tokenizer, "all_special_tokens", ()) else None
        text = turn.partition(LIST)[2] if hidden is not None else turn
        return replace(whole, kind="list", before=text, after="]", opening=hidden)
    raise _unknown()


def _call_in(text: str) -> tuple[int, int, dict[str, Any]] | None:
    """Where the probe's last call stands as a JSON object, and the object."""
    decoder, last = json.JSONDecoder(), text.rfind(f'"{_PROBE}"')
    for start in (place for place in range(last, -1, -1) if text[place] == "{"):
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if end > last:
            own = isinstance(found, dict) and found.get("name") == _PROBE
            right = own and _ARGUMENT in (found.get("arguments"), found.get("parameters"))
            return (start, end, found) if right else None
    return None


def _readable(tokenizer: Any, form: ToolForm) -> ToolForm:
    if OPEN in getattr(tokenizer, "all_special_tokens", ()):
        raise _refused(f"the tokenizer hides {OPEN}, so calls cannot be read from text.")
    return form


def _unknown() -> ApiError:
    return _refused(
        "the model's chat template writes tool calls in a form that is not read here; expected <tool_call>{JSON}</tool_call> "
        "(Qwen, Hermes), a JSON object with name and parameters (Llama 3), or a list behind [TOOL_CALLS] (Mistral)."
    )


def _refused(problem: str) -> ApiError:
    return refused("tools", problem, code="unsupported_parameter")
