"""Refusals in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``, and never the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from telltale.errors import TelltaleError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that cannot be served. ``param``: the field that is wrong; ``code``: a word that programs can act on."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str, *, code: str = "invalid_value") -> ApiError:
    """The 400 for a field; ``message`` goes on after the field's name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def queue_full(limit: int) -> ApiError:
    """The 429 for a server that has as much to do as it takes on."""
    return ApiError(
        429,
        f"the server is busy: {limit} rows are being decoded or wait. Try again in a moment.",
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """The 503 for a request that comes, or is under way, when the server ends."""
    return ApiError(503, "the server is shutting down.", code="shutting_down", kind="server_error")


def failed(error: BaseException) -> ApiError:
    """The 500 for an accident; names its kind and keeps its text, which may hold a prompt, to itself."""
    return ApiError(500, f"decoding failed with {type(error).__name__}.", code="internal_error", kind="server_error")


def where(error: BaseException) -> str:
    """What a log may say of an error. The message of an unforeseen one may hold text of a prompt; our own never do."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    at = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
    return f"{error if isinstance(error, TelltaleError) else type(error).__name__} at {at}"
