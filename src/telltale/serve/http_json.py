"""JSON over HTTP, for both applications: bodies are parsed, checked by pydantic models, and refused in one sentence.

A field that is given twice is refused, since JSON leaves open which one counts. ``null`` reads like a field that is not there.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from telltale.errors import MissingExtraError
from telltale.models.conversations import ConversationError, json_kind
from telltale.serve.http_errors import MISSING_EXTRA, ApiError, no_such_path, refused, refused_conversation

try:
    from fastapi import FastAPI, Request, Response
    from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
    from pydantic_core import PydanticCustomError
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError(MISSING_EXTRA) from error

DEPTH = 64
"""Arrays and objects within each other in a body."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
"""A string, or the rest of the text if it does not end: so that no place is looked at twice."""
SHOWN = 80
"""Characters of an unknown field's name that an error repeats."""

Model = TypeVar("Model", bound="Body")


def _nullable(schema: dict[str, Any]) -> None:
    """What may be left out may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(BaseModel):
    """An object of a body. Values are not converted: a string is no number, a number no boolean."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: inner for key, inner in value.items() if inner is not None or key not in cls.model_fields}


class Strict(Body):
    """A body of which no field may be ignored."""

    model_config = ConfigDict(extra="forbid")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


WHOLE = BeforeValidator(_whole)
"""For integers: 5.0 is one, in JSON."""
NUMBER = BeforeValidator(_number)
"""For numbers: an integer beyond every float is out of range, not of another type."""


def fault(code: str, problem: str) -> PydanticCustomError:
    """What a validator raises; ``problem`` goes on after the field's name."""
    return PydanticCustomError(code, "{problem}", {"problem": problem})


def parse(raw: bytes) -> Any:
    """The JSON value of a body. Raises :class:`~telltale.serve.http_errors.ApiError` (400) if it is none."""
    if _depth(raw) > DEPTH:
        raise ApiError(400, f"the body is nested more than {DEPTH} levels deep.", code="invalid_json")
    try:
        return json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON; expected a JSON document in UTF-8.", code="invalid_json") from None


def validated(kind: type[Model], value: Any, *, status: int = 400, name: str = "") -> Model:
    """``value`` as the model ``kind``. ``name`` is its path in the body, "" for the body itself.

    Raises :class:`~telltale.serve.http_errors.ApiError` with ``status`` for the first field that is wrong.
    """
    if not isinstance(value, dict):
        if name:
            raise refused(name, f"expected an object, got {json_kind(value)}.", code="invalid_type", status=status)
        problem = f"the body is {json_kind(value)}; expected a JSON object."
        raise ApiError(status, problem, code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _translated(kind, error, status, name) from None


@functools.cache
def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model, without references: those of pydantic would point elsewhere in an OpenAPI document."""
    whole = kind.model_json_schema()
    definitions = whole.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inlined(definitions[value["$ref"].rpartition("/")[2]])
            return {key: inlined(inner) for key, inner in value.items()}
        return [inlined(inner) for inner in value] if isinstance(value, list) else value

    found: dict[str, Any] = inlined(whole)
    return found


def openapi_body(schema: dict[str, Any], *, example: dict[str, Any]) -> dict[str, Any]:
    """The request body of a path in the OpenAPI document."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def message_schema(roles: Sequence[str], *, strict: bool) -> dict[str, Any]:
    """The JSON schema of what :func:`~telltale.models.conversations.read_messages` reads as a message."""
    part: dict[str, Any] = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    properties: dict[str, Any] = {
        "role": {"enum": [*roles, "developer"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]},
    }
    if strict:
        part["additionalProperties"] = False
        properties["name"] = {"type": ["string", "null"]}
    return {"type": "object", "properties": properties, "required": ["role", "content"]}


async def read_body(request: Request, *, limit: int, seconds: float) -> bytes:
    """A JSON body of up to ``limit`` bytes that arrives within ``seconds``.

    Raises :class:`~telltale.serve.http_errors.ApiError` (408, 413 or 415).
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415,
            "the content type is not JSON; expected 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes.", code="body_too_large", headers={"Connection": "close"}
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                found += chunk
                if len(found) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds.", code="timeout") from None
    return bytes(found)


def encoded(document: Any) -> bytes:
    """JSON in ASCII: whatever a string holds, it can be written."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with ``document`` as its body."""
    return Response(encoded(document), status, {"content-type": "application/json"} | dict(headers or {}))


def error_response(error: ApiError) -> Response:
    """The response for an error."""
    return json_response(error.to_dict(), error.status, error.headers)


def answer_errors(app: FastAPI) -> None:
    """Answer :class:`~telltale.serve.http_errors.ApiError`, and paths and methods that do not exist, in the one form of errors."""

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = no_such_path(error.status_code, error.headers)
        assert isinstance(error, ApiError)
        return error_response(error)

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(HTTPException, refuse)


_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _translated(kind: type[BaseModel], error: ValidationError, status: int, within: str) -> ApiError:
    """Pydantic's first error as one sentence that names the field and what is expected."""
    first = error.errors(include_url=False)[0]
    where, path, context = first["type"], first["loc"], first.get("ctx", {})
    name = _name(path, within)
    if where == "missing":
        return refused(name, "the field is missing.", code="missing_required_parameter", status=status)
    if where == "extra_forbidden":
        known = list(_at(json_schema(kind), path[:-1]).get("properties", ()))
        near = difflib.get_close_matches(str(path[-1])[:SHOWN], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return refused(name, f"the field is not known here.{hint}", code="unknown_parameter", status=status)
    if where in _WANTED:
        given = json_kind(first["input"])
        return refused(name, f"expected {_WANTED[where]}, got {given}.", code="invalid_type", status=status)
    if where in _RANGES:
        given = f", got {first['input']}" if len(str(first["input"])) <= SHOWN else ""
        return refused(name, f"expected {_range(_at(json_schema(kind), path))}{given}.", status=status)
    if where == "string_unicode":
        return refused(
            name, "the text has half of a surrogate pair; expected text that UTF-8 can write.", status=status
        )
    inner = context.get("error")
    if isinstance(inner, ConversationError):
        return refused_conversation(inner, status=status)
    return refused(name, str(context.get("problem", first["msg"])), code=where, status=status)


def _name(path: tuple[str | int, ...], within: str) -> str:
    """``messages[0].role`` for ("messages", 0, "role")."""
    for part in path:
        if isinstance(part, int):
            within += f"[{part}]"
        else:
            within += f".{part[:SHOWN]}" if within else part[:SHOWN]
    return within


def _range(schema: Mapping[str, Any]) -> str:
    kind = "an integer" if schema["type"] == "integer" else "a number"
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None:
        return f"{kind} above {above:g} and up to {high:g}"
    return f"{kind} at least {low}" if high is None else f"{kind} from {low} to {high}"


def _at(schema: Mapping[str, Any], path: tuple[str | int, ...]) -> Mapping[str, Any]:
    """The schema of a field; null does not count as one."""
    for part in path:
        schema = schema.get("properties", {}).get(part, {}) if isinstance(part, str) else schema.get("items", {})
        while "anyOf" in schema:
            schema = next(one for one in schema["anyOf"] if one.get("type") != "null")
    return schema


def _depth(raw: bytes) -> int:
    """How many arrays and objects are open at the deepest place; strings do not count."""
    open_now = deepest = 0
    for one in re.findall(rb"[\[{}\]]", _STRING.sub(b"", raw)):
        open_now += 1 if one in b"[{" else -1
        deepest = max(deepest, open_now)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            # A proxy may have read the other one.
            raise refused(name[:SHOWN], "the field is given twice.", code="duplicate_parameter")
        found[name] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
