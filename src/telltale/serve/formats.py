"""What an answer has to look like, as clients ask for it: OpenAI's ``response_format``, and the words of vLLM and llama.cpp.

The grammars themselves are made by :mod:`telltale.decode.grammar`; here a request is only read and checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from telltale.errors import ConfigError, MissingExtraError
from telltale.models.conversations import json_kind
from telltale.serve.http_errors import ApiError, refused
from telltale.serve.http_json import fault

if TYPE_CHECKING:
    from telltale.decode.grammar import Grammar, Grammars

CHOICES = 512
"""Most texts to choose from."""
KINDS = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Format:
    """``kind``: one of :data:`KINDS`; ``value``: a schema, a pattern, texts, or rules; ``param``: the field that asks for it."""

    kind: str
    value: Any
    param: str


def compiled(found: Format, grammars: Grammars) -> Grammar:
    """The grammar of a format. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the field."""
    make: dict[str, Callable[[Any], Grammar]] = {
        "json": grammars.json,
        "regex": grammars.regex,
        "choice": grammars.choices,
        "grammar": grammars.lark,
    }
    try:
        return make[found.kind](found.value)
    except ConfigError as error:
        raise refused(found.param, str(error)) from None


def unavailable(error: ConfigError | MissingExtraError, param: str) -> ApiError:
    """The error where a server cannot constrain anything; it names the extra if that is what is missing."""
    return refused(param, str(error), code="unsupported_parameter")


def read_response_format(value: Any) -> Format | None:
    """OpenAI's ``response_format``; None for text."""
    if not isinstance(value, Mapping):
        raise fault("invalid_type", f"expected an object, got {json_kind(value)}.")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Format("json", {"type": "object"}, "response_format")
    if kind != "json_schema":
        raise fault("invalid_value", "expected the type text, json_object or json_schema.")
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping):
        raise fault("invalid_value", "expected json_schema to be an object with a schema.")
    schema = inner.get("schema", {"type": "object"})
    if not isinstance(schema, Mapping):
        # JSON Schema knows true and false as well; llguidance does not.
        raise fault("invalid_value", "expected json_schema.schema to be an object.")
    return Format("json", schema, "response_format")


def read_json(value: Any) -> Format:
    """A JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise fault("invalid_value", "expected a JSON schema; the text is not JSON.") from None
    if not isinstance(value, Mapping):
        raise fault("invalid_type", f"expected a JSON schema, got {json_kind(value)}.")
    return Format("json", value, "guided_json")


def read_regex(value: Any) -> Format:
    """A regular expression."""
    return Format("regex", _text(value), "guided_regex")


def read_choice(value: Any) -> Format:
    """Texts to choose from."""
    if not isinstance(value, list) or not 0 < len(value) <= CHOICES:
        raise fault("invalid_value", f"expected an array of 1 to {CHOICES} texts.")
    return Format("choice", [_text(one) for one in value], "guided_choice")


def read_grammar(value: Any) -> Format:
    """Rules in Lark's form."""
    return Format("grammar", _text(value), "guided_grammar")


def read_structured(value: Any) -> Format | None:
    """vLLM's ``structured_outputs``: an object with one of json, regex, choice, grammar and json_object."""
    if not isinstance(value, Mapping):
        raise fault("invalid_type", f"expected an object, got {json_kind(value)}.")
    given = {name: inner for name, inner in value.items() if inner is not None}
    if not given:
        return None
    if len(given) > 1 or not set(given) <= {*KINDS, "json_object"}:
        raise fault("invalid_value", f"expected one of {', '.join(KINDS)} and json_object.")
    [(name, inner)] = given.items()
    if name == "json_object":
        return Format("json", {"type": "object"}, "structured_outputs") if inner else None
    readers = {"json": read_json, "regex": read_regex, "choice": read_choice, "grammar": read_grammar}
    found = readers[name](inner)
    return Format(found.kind, found.value, "structured_outputs")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise fault("invalid_value", "expected a text that is not empty.")
    return value
