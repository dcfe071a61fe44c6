"""What a body asks for: ``POST /v1/completions`` and ``POST /v1/chat/completions``, read and checked against the server's limits.

Nothing here tokenises or decodes. Errors are 400s that name the field; defaults are OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from telltale.serve.completions import fields as supported
from telltale.serve.completions.errors import refused
from telltale.serve.completions.overrides import Overrides, read_overrides
from telltale.serve.completions.reading import Fields, kind, text

STOPS = 4
"""Stop strings in a request, as OpenAI has it."""
STOP_LENGTH = 256
"""Characters of a stop string: at each token the server reads that much text again."""
COLDEST = 1e-4
"""Smallest temperature above 0: below it, logits leave the range of float32."""
CHOICES = 128
"""Most choices of a prompt, as OpenAI has it."""
COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions where the body gives none, as OpenAI has it."""
ROLES = ("system", "user", "assistant")
Prompts = list[str] | list[list[int]]
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both endpoints have in common.

    ``max_tokens`` None: as many as the model has room for; ``limited_by``: the field that it comes from, for errors.
    """

    model: str
    n: int
    max_tokens: int | None
    limited_by: str = "max_tokens"
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    overrides: Overrides


@dataclass(frozen=True, kw_only=True)
class CompletionAsked(Asked):
    """``prompts``: texts or token ids; ``echo``: whether an answer repeats its prompt."""

    prompts: Prompts
    echo: bool


@dataclass(frozen=True, kw_only=True)
class ChatAsked(Asked):
    """``messages`` as the chat template takes them: role, content and perhaps a name."""

    messages: Messages


def completion_body(value: dict[str, Any]) -> CompletionAsked:
    """The body of ``POST /v1/completions``."""
    fields = Fields(value)
    common = _common(fields)
    limit = fields.integer("max_tokens", low=1)
    found = CompletionAsked(
        **common,
        max_tokens=COMPLETION_TOKENS if limit is None else limit,
        prompts=_prompts(fields.required("prompt")),
        echo=fields.boolean("echo"),
    )
    supported.check_unsupported(fields, supported.COMPLETIONS)
    fields.refuse_unread()
    return found


def chat_body(value: dict[str, Any]) -> ChatAsked:
    """The body of ``POST /v1/chat/completions``."""
    fields = Fields(value)
    common = _common(fields)
    old, new = fields.integer("max_tokens", low=1), fields.integer("max_completion_tokens", low=1)
    if old is not None and new is not None and old != new:
        raise refused("max_tokens", "it differs from max_completion_tokens; give one of them.")
    found = ChatAsked(
        **common,
        max_tokens=old if new is None else new,
        messages=_messages(fields.required("messages")),
        limited_by="max_tokens" if new is None else "max_completion_tokens",
    )
    supported.check_unsupported(fields, supported.CHAT)
    fields.refuse_unread()
    return found


def _common(fields: Fields) -> dict[str, Any]:
    n = fields.integer("n", low=1, high=CHOICES)
    temperature = fields.number("temperature", low=0, high=2)
    if temperature is not None and 0 < temperature < COLDEST:
        raise refused("temperature", f"expected 0 or a number from {COLDEST:g} to 2.")
    stream = fields.boolean("stream")
    return {
        "model": text(fields.required("model"), "model"),
        "n": 1 if n is None else n,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": fields.number("top_p", low=0, high=1, above=True),
        "top_k": fields.integer("top_k", low=0) or None,
        "seed": fields.integer("seed", low=-(2**63), high=2**63 - 1),
        "stop": _stops(fields.get("stop")),
        "stream": stream,
        "include_usage": _include_usage(fields, stream=stream),
        "overrides": read_overrides(fields.inner("telltale")),
    }


def _include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.inner("stream_options")
    if options is None:
        return False
    if not stream:
        raise refused("stream_options", "it is only allowed with stream: true.")
    found = options.boolean("include_usage")
    # It pads chunks against eavesdroppers who measure them; there is nothing to pad on a loopback.
    options.boolean("include_obfuscation")
    options.refuse_unread()
    return found


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        value = [value]
    elif len(value) > STOPS:
        raise refused("stop", f"expected up to {STOPS} strings, got {len(value)}.")
    found = [text(stop, "stop") for stop in value]
    if any(not 0 < len(stop) <= STOP_LENGTH for stop in found):
        raise refused("stop", f"expected strings of 1 to {STOP_LENGTH} characters.")
    return tuple(dict.fromkeys(found))


def _prompts(value: Any) -> Prompts:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refused(
            "prompt", f"expected text, token ids or an array of them, got {kind(value)}.", code="invalid_type"
        )
    if not value:
        raise refused("prompt", "it is empty; expected at least one prompt.")
    if _is_token(value[0]):
        value = [value]
    if isinstance(value[0], str):
        found = [text(prompt, "prompt") for prompt in value]
        if not all(found):
            raise refused("prompt", "a prompt is empty; expected some text.")
        return found
    for ids in value:
        if not isinstance(ids, list) or not all(map(_is_token, ids)):
            raise refused("prompt", "expected one kind of prompt: texts, or arrays of token ids.", code="invalid_type")
        if not ids:
            raise refused("prompt", "a prompt is empty; expected at least one token.")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(value: Any) -> Messages:
    if not isinstance(value, list):
        raise refused("messages", f"expected an array of messages, got {kind(value)}.", code="invalid_type")
    if not value:
        raise refused("messages", "it is empty; expected at least one message.")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise refused(name, f"expected an object with role and content, got {kind(value)}.", code="invalid_type")
    fields = Fields(value, name)
    role = text(fields.required("role"), f"{name}.role")
    # A developer's message is what OpenAI calls a system message now; templates know the old name.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise refused(f"{name}.role", f"expected one of {', '.join(ROLES)} or developer.")
    found = {"role": role, "content": _content(fields.required("content"), f"{name}.content")}
    speaker = fields.get("name")
    if speaker is not None:
        found["name"] = text(speaker, f"{name}.name")
    for unused in ("tool_calls", "function_call", "audio", "refusal", "annotations"):
        if fields.get(unused):
            raise refused(f"{name}.{unused}", "this server does not support it.", code="unsupported_parameter")
    fields.refuse_unread()
    return found


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return text(value, name)
    if not isinstance(value, list):
        raise refused(name, f"expected text or an array of text parts, got {kind(value)}.", code="invalid_type")
    parts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(part, dict):
            raise refused(where, f"expected a text part, got {kind(part)}.", code="invalid_type")
        fields = Fields(part, where)
        if fields.get("type") != "text":
            raise refused(f"{where}.type", "only text parts are supported.", code="unsupported_parameter")
        parts.append(text(fields.required("text"), f"{where}.text"))
        fields.refuse_unread()
    return "".join(parts)
