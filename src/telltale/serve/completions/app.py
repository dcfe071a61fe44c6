"""The OpenAI-compatible application over one decoder: models, completions, chats, health and metrics.

A request is read, checked, tokenised, given to the scheduler, and answered at once or step by step. Neither prompts nor answers are
logged, and no error repeats them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from telltale.config import check_integer
from telltale.errors import MissingExtraError
from telltale.serve.completions.access import check_token, checked_key
from telltale.serve.completions.bodies import Asked, chat_body, completion_body
from telltale.serve.completions.errors import ApiError, failed, shutting_down, where
from telltale.serve.completions.metrics import CONTENT_TYPE, Metrics
from telltale.serve.completions.reading import parse
from telltale.serve.completions.served import Served
from telltale.serve.completions.service import Service
from telltale.serve.completions.streaming import GONE, EventStream, Gone, Receive, Send, encoded, while_connected

try:
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise MissingExtraError("the server needs FastAPI and uvicorn: pip install 'telltale[serve]'") from error

BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
_log = logging.getLogger("telltale.serve")


def create_app(
    served: Served, *, api_key: str | None = None, max_rows: int = 16, queue: int = 64, max_body: int = 1 << 20
) -> FastAPI:
    """The ASGI application that answers with ``served``.

    ``api_key``: the bearer token that requests need, None for none; ``max_rows``: rows decoded at the same time; ``queue``: rows
    that may wait; ``max_body``: bytes of a request's body.
    Raises :class:`~telltale.errors.ConfigError` for values out of range.
    """
    key = checked_key(api_key)
    check_integer("max_body", max_body, low=1)
    service = Service(served, max_rows=max_rows, queue=queue)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(title="telltale", lifespan=running, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, api_key=key, metrics=service.metrics)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _no_such_thing)

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        held = service.scheduler.occupancy()
        broken = service.scheduler.broken
        told = {
            "status": "failed" if broken else "ok",
            "model": served.name,
            "rows": held.rows,
            "waiting": held.waiting,
        }
        return _json(told, 503 if broken else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [served.entry()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            raise ApiError(404, f"this server has the model {served.name!r}.", param="model", code="model_not_found")
        return _json(served.entry())

    @app.post("/v1/completions", openapi_extra=_schema({"model": served.name, "prompt": "2 + 2 ="}))
    async def completions(request: Request) -> Response:
        return await _answered(service, request, completion_body, max_body)

    example = {"model": served.name, "messages": [{"role": "user", "content": "2 + 2?"}]}

    @app.post("/v1/chat/completions", openapi_extra=_schema(example))
    async def chat_completions(request: Request) -> Response:
        return await _answered(service, request, chat_body, max_body)

    return app


class Gate:
    """ASGI middleware: lets in who has the token, counts what becomes of requests, and keeps accidents out of the log's text."""

    def __init__(self, app: Any, *, api_key: str | None, metrics: Metrics) -> None:
        self.app = app
        self.api_key = api_key
        self.metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = asyncio.get_running_loop().time()
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            check_token(scope, self.api_key)
            await self.app(scope, receive, watched)
        except ApiError as error:
            await _error(error)(scope, receive, watched)
        except asyncio.CancelledError:
            # The server ends and has waited long enough; there is nobody above who could do something about it.
            if not status:
                await _error(shutting_down())(scope, receive, watched)
        except Exception as error:
            # Its text may hold a prompt: the log gets its kind and place.
            _log.error("a request failed: %s", where(error))
            if not status:
                await _error(failed(error))(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.add(endpoint=path, status=str(scope.get("telltale.status", status or GONE)))
            if path in ("/v1/completions", "/v1/chat/completions"):
                self.metrics.request.observe(asyncio.get_running_loop().time() - started)


async def _answered(
    service: Service, request: Request, reader: Callable[[dict[str, Any]], Asked], max_body: int
) -> Response:
    try:
        asked = reader(parse(await _body(request, max_body)))
        answer, ticket = await while_connected(service.begin(asked), request.receive)
        if asked.stream:
            return EventStream(answer, ticket, include_usage=asked.include_usage)
        try:
            return _json(await while_connected(answer.whole(ticket), request.receive))
        finally:
            ticket.close()
    except (Gone, ClientDisconnect):
        request.scope["telltale.status"] = GONE
        return Response(status_code=GONE)


async def _body(request: Request, limit: int) -> bytes:
    """The body, up to ``limit`` bytes. Raises :class:`~telltale.serve.completions.errors.ApiError` (408, 413 or 415)."""
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
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limit:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                found += chunk
                if len(found) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds.", code="timeout") from None
    return bytes(found)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _no_such_thing(_: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    words = {
        404: ("there is no such path here.", "not_found"),
        405: ("the path has another method.", "method_not_allowed"),
    }
    message, code = words.get(error.status_code, ("the request cannot be served.", None))
    return _error(ApiError(error.status_code, message, code=code, headers=error.headers))


def _error(error: ApiError) -> Response:
    return _json(error.to_dict(), error.status, error.headers)


def _json(document: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(document), status, {"content-type": "application/json"} | (headers or {}))


def _schema(example: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
