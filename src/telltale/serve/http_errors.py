"""What a server refuses, in OpenAI's form for every application: ``{"error": {"message", "type", "param", "code"}}``.

Access: a bearer token guards everything but ``/health``, and a server without one listens on loopback only. No message
repeats the text of a request.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from telltale.errors import ConfigError, TelltaleError

if TYPE_CHECKING:
    from telltale.models.conversations import ConversationError

MISSING_EXTRA = "the server needs FastAPI, uvicorn and prometheus_client: pip install 'telltale[serve]'"
OPEN_PATHS = ("/health",)
"""What a probe may ask without a token."""
LET_IN = "telltale.let_in"
"""In the scope of a request that has the right token, or needs none where nobody has one."""
ENVIRONMENT = "TELLTALE_API_KEY"
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


def refused(param: str, message: str, *, code: str = "invalid_value", status: int = 400) -> ApiError:
    """The error for a field; ``message`` goes on after the field's name."""
    return ApiError(status, f"{param}: {message}", param=param, code=code)


def refused_conversation(error: ConversationError, *, status: int = 400) -> ApiError:
    """The error for messages that cannot be used."""
    codes = {
        "missing": "missing_required_parameter",
        "type": "invalid_type",
        "value": "invalid_value",
        "unsupported": "unsupported_parameter",
        "unknown": "unknown_parameter",
    }
    return refused(error.name, error.problem, code=codes[error.fault], status=status)


def queue_full(limit: int) -> ApiError:
    """The 429 for a server whose queue is full."""
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


def failed(error: BaseException, *, what: str = "decoding") -> ApiError:
    """The 500 for an unforeseen error in ``what``: it names the error's kind; its text, which may hold a prompt, is left out."""
    return ApiError(500, f"{what} failed with {type(error).__name__}.", code="internal_error", kind="server_error")


def no_such_path(status: int, headers: Mapping[str, str] | None = None) -> ApiError:
    """The error for a path or a method that does not exist."""
    words = {
        404: ("there is no such path here.", "not_found"),
        405: ("the path has another method.", "method_not_allowed"),
    }
    message, code = words.get(status, ("the request cannot be served.", None))
    return ApiError(status, message, code=code, headers=headers)


def where(error: BaseException) -> str:
    """An error in the form that may be logged. Messages of unforeseen errors may hold text of a prompt; our own never do."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    at = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
    return f"{error if isinstance(error, TelltaleError) else type(error).__name__} at {at}"


def checked_key(api_key: str | None) -> str | None:
    """The key, if it is one that a header can carry. Raises :class:`~telltale.errors.ConfigError` for one that is not."""
    if api_key is None:
        return None
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigError("the API key is empty or has spaces or special characters; expected printable ASCII.")
    return api_key


def check_host(host: str, *, api_key: str | None, anonymous: bool) -> None:
    """Raise :class:`~telltale.errors.ConfigError` if ``host`` can be reached from elsewhere without a key."""
    if api_key is None and not anonymous and not is_loopback(host):
        raise ConfigError(
            f"host={host!r} can be reached by others and no API key is set; expected --api-key or {ENVIRONMENT}, or "
            f"--allow-anonymous if everybody may use the model."
        )


def is_loopback(host: str) -> bool:
    """Whether every address of ``host`` is this machine's own. Raises :class:`~telltale.errors.ConfigError` for no address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host={host!r} has no address: {error.strerror or error}.") from error
    return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_loopback for entry in found)


def check_token(scope: MutableMapping[str, Any], api_key: str | None) -> None:
    """Let a request in, or raise :class:`ApiError` (401) if it has not the right token; what a probe may ask is answered to all."""
    if api_key is None:
        scope[LET_IN] = True
        return
    if scope["path"] in OPEN_PATHS:
        return
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not _same(token.strip(), api_key.encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong; expected the header 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
    scope[LET_IN] = True


def _same(given: bytes, wanted: bytes) -> bool:
    """Whether two keys are equal, in a time that depends on neither; digests, so that their lengths do not show either."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(wanted).digest())
