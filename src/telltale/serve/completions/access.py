"""Who may ask: a bearer token on everything but ``/health``, and where a server without one may listen."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import MutableMapping
from typing import Any

from telltale.errors import ConfigError
from telltale.serve.completions.errors import ApiError

OPEN_PATHS = ("/health",)
"""What a probe may ask without a token."""
ENVIRONMENT = "TELLTALE_API_KEY"


def checked_key(api_key: str | None) -> str | None:
    """The key, if it is one that a header can carry. Raises :class:`~telltale.errors.ConfigError` for one that is not."""
    if api_key is None:
        return None
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigError("the API key is empty or has spaces or special characters; expected printable ASCII.")
    return api_key


def check_host(host: str, *, api_key: str | None, anonymous: bool) -> None:
    """Raise :class:`~telltale.errors.ConfigError` if ``host`` can be reached from elsewhere and nothing guards it."""
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
    """Raise :class:`~telltale.serve.completions.errors.ApiError` (401) for a request without the right token."""
    if api_key is None or scope["path"] in OPEN_PATHS:
        return
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), api_key.encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong; expected the header 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
