"""The OpenAI-compatible application over one decoder: models, completions, chats, health and metrics.

A request is read, checked, tokenised, given to the scheduler, and answered at once or step by step. Neither prompts nor answers are
logged, and no error repeats them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from telltale.config import check_integer
from telltale.decode.calibration.monitor import GuardMonitor
from telltale.errors import MissingExtraError
from telltale.serve.audits import Checker
from telltale.serve.http_errors import MISSING_EXTRA, ApiError, check_token, checked_key, failed, shutting_down, where

try:
    from fastapi import FastAPI, Request, Response
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise MissingExtraError(MISSING_EXTRA) from error

from telltale.serve.http_json import (
    answer_errors,
    error_response,
    json_response,
    json_schema,
    openapi_body,
    parse,
    read_body,
)
from telltale.serve.metrics import CONTENT_TYPE, Metrics
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_schema import ChatRequest, CompletionRequest, GenerationRequest, chat_body, completion_body
from telltale.serve.responses import GONE, EventStream, Gone, Receive, Send, while_connected
from telltale.serve.service import Service

PREFIX_BYTES = 1 << 29
"""What texts that were read before may take, unless the server is told otherwise."""
BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
_log = logging.getLogger("telltale.serve")


def create_app(
    served: ServedModel,
    *,
    api_key: str | None = None,
    max_rows: int = 16,
    queue: int = 64,
    max_body: int = 1 << 20,
    prefix_cache: int | None = PREFIX_BYTES,
    cors: Sequence[str] = (),
    monitor: GuardMonitor | None = None,
    checker: Checker | None = None,
) -> FastAPI:
    """The ASGI application that answers with ``served``.

    ``api_key``: the bearer token that requests need, None for none; ``max_rows``: rows decoded at the same time; ``queue``: rows
    that may wait; ``max_body``: bytes of a request's body; ``prefix_cache``: bytes for texts that were read before, None for none;
    ``cors``: origins whose pages may ask, ("*",) for all. ``monitor`` audits accepted steps: by ``checker``, or without one by the
    target.
    Raises :class:`~telltale.errors.ConfigError` for values out of range.
    """
    key = checked_key(api_key)
    check_integer("max_body", max_body, low=1)
    service = Service(
        served, max_rows=max_rows, queue=queue, prefix_cache=prefix_cache, monitor=monitor, checker=checker
    )

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(title="telltale", lifespan=running, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(AuthAndMetricsMiddleware, api_key=key, metrics=service.metrics)
    if cors:
        # Outside of the check of keys: a browser's preflight has none.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"], max_age=3600
        )
    answer_errors(app)

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        held = service.scheduler.occupancy()
        broken = service.scheduler.broken
        payload = {
            "status": "failed" if broken else "ok",
            "model": served.name,
            "rows": held.rows,
            "waiting": held.waiting,
        }
        return json_response(payload, 503 if broken else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [service.entry()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            raise ApiError(404, f"this server has the model {served.name!r}.", param="model", code="model_not_found")
        return json_response(service.entry())

    asks = {"model": served.name, "prompt": "2 + 2 ="}

    @app.post("/v1/completions", openapi_extra=openapi_body(json_schema(CompletionRequest), example=asks))
    async def completions(request: Request) -> Response:
        return await _answered(service, request, completion_body, max_body)

    talks = {"model": served.name, "messages": [{"role": "user", "content": "2 + 2?"}]}

    @app.post("/v1/chat/completions", openapi_extra=openapi_body(json_schema(ChatRequest), example=talks))
    async def chat_completions(request: Request) -> Response:
        return await _answered(service, request, chat_body, max_body)

    return app


class AuthAndMetricsMiddleware:
    """ASGI middleware: checks the token, counts requests by outcome, and logs failures without their text."""

    def __init__(self, app: Any, *, api_key: str | None, metrics: Metrics) -> None:
        self.app = app
        self.api_key = api_key
        self.metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = asyncio.get_running_loop().time()
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            # Base URLs are written with a slash at the end and without; a redirect would lose a POST's body in some clients.
            scope["path"] = scope["path"].rstrip("/") or "/"
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
            await error_response(error)(scope, receive, watched)
        except asyncio.CancelledError:
            # The server ends and has waited long enough; no caller could handle this.
            if not status:
                await error_response(shutting_down())(scope, receive, watched)
        except Exception as error:
            # Its text may hold a prompt: the log gets its kind and place.
            _log.error("a request failed: %s", where(error))
            if not status:
                await error_response(failed(error))(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.add(endpoint=path, status=str(scope.get("telltale.status", status or GONE)))
            if path in ("/v1/completions", "/v1/chat/completions"):
                self.metrics.request.observe(asyncio.get_running_loop().time() - started)


async def _answered(
    service: Service, request: Request, reader: Callable[[Any], GenerationRequest], max_body: int
) -> Response:
    try:
        asked = reader(parse(await read_body(request, limit=max_body, seconds=BODY_SECONDS)))
        answer, handle = await while_connected(service.begin(asked), request.receive)
        if asked.stream:
            return EventStream(answer, handle, include_usage=asked.include_usage)
        try:
            return json_response(await while_connected(service.whole(asked, answer, handle), request.receive))
        finally:
            handle.close()
    except (Gone, ClientDisconnect):
        request.scope["telltale.status"] = GONE
        return Response(status_code=GONE)
