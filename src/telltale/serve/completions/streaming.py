"""Answers on the wire: server-sent events, and an end for everybody whose client has gone.

Both ways of answering watch the connection while they wait. What is not wanted any more is dropped at the next turn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from telltale.errors import MissingExtraError
from telltale.serve.completions.answers import Answer
from telltale.serve.completions.errors import ApiError
from telltale.serve.completions.tickets import Ticket

try:
    from starlette.responses import Response
except ImportError as error:
    raise MissingExtraError("the server needs FastAPI and uvicorn: pip install 'telltale[serve]'") from error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

GONE = 499
"""The status under which a request is counted whose client went away; nobody receives it."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Gone(Exception):
    """The client has closed the connection."""


def encoded(document: Mapping[str, Any]) -> bytes:
    """JSON in ASCII: whatever a string holds, it can be written."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


async def while_connected(work: Awaitable[Result], receive: Receive) -> Result:
    """The result of ``work``, which is cancelled if the client goes away. Raises :class:`Gone` then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return await task
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """An ASGI response that sends an answer's chunks as they come; the ticket is closed however it ends."""

    def __init__(self, answer: Answer, ticket: Ticket, *, include_usage: bool) -> None:
        super().__init__()
        self.answer = answer
        self.ticket = ticket
        self.include_usage = include_usage

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send(scope, send), receive)
        except (Gone, OSError):
            scope["telltale.status"] = GONE
        finally:
            self.ticket.close()

    async def _send(self, scope: MutableMapping[str, Any], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for data in self._events(scope):
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
            # Sending does not suspend while there is room to write: the loop must get to see that the client has gone.
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, scope: MutableMapping[str, Any]) -> AsyncIterator[bytes]:
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        for chunk in self.answer.opening():
            yield encoded(chunk | usage)
        try:
            async for piece in self.answer.pieces(self.ticket):
                yield encoded(self.answer.chunk(piece) | usage)
        except ApiError as error:
            # The status has been sent; clients read the error from the stream.
            scope["telltale.status"] = error.status
            yield encoded(error.to_dict())
            return
        if self.include_usage:
            yield encoded(self.answer.closing())
        yield b"[DONE]"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
