"""Responses in OpenAI's form, whole and as chunks, with telltale's telemetry in a field of its own.

Both forms are made of the same pieces, so what is streamed and what is sent at once cannot differ. Both watch the connection while
they wait: when the client has gone, its outputs are dropped at the next turn.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from telltale.decode.results import StepRecord, StepVerifiedStatistics
from telltale.runs.files import strict_json
from telltale.serve.detokenise import OutputText
from telltale.serve.http_errors import ApiError
from telltale.serve.http_json import Response, encoded
from telltale.serve.scheduler import ResponseHandle

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

FINISH = {"eos": "stop", "stop_string": "stop", "repetition": "stop", "length": "length"}
"""OpenAI's ``finish_reason`` of each of our stop reasons."""


@dataclass
class Piece:
    """Text that one choice has gained; ``step`` if the text is of an accepted step."""

    choice: int
    text: str
    step: StepRecord | None = None


@dataclass
class End:
    """One choice has ended."""

    choice: int
    stop_reason: str
    stats: StepVerifiedStatistics


@dataclass
class Answer:
    """One response under way. ``prompts`` are token counts; choice c belongs to prompt c // n."""

    chat: bool
    model: str
    seed: int
    policy: str
    prompts: list[int]
    texts: list[OutputText]
    prompt_ids: list[list[int]] = field(default_factory=list)
    """The prompts' tokens."""
    echoes: list[str] = field(default_factory=list)
    """What each choice repeats of its prompt; empty for none."""
    stepwise: bool = False
    """Whether the response lists the steps."""
    calibrated: bool = False
    """Whether the threshold's promise covers this answer."""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self.tokens: list[list[int]] = [[] for _ in self.texts]
        """The tokens of each choice that belong to its answer, so far."""
        self._ends: list[End] = []

    async def pieces(self, handle: ResponseHandle) -> AsyncIterator[Piece | End]:
        """The pieces of a response, in order. Raises the :class:`~telltale.serve.http_errors.ApiError` that ended it."""
        for choice, echo in enumerate(self.echoes):
            yield Piece(choice, echo)
        async for event in handle:
            if event.failure is not None:
                raise event.failure
            text = self.texts[event.choice]
            if text.stopped:
                # The engine went on for a while; how far depends on timing, so none of it is sent or counted.
                new, step = "", None
            else:
                count, new = text.push_counted(event.tokens)
                self.completion_tokens += count
                self.tokens[event.choice] += event.tokens[:count]
                if event.reason is not None:
                    new += text.finish()
                step = event.step if self.stepwise else None
            if new or step is not None:
                yield Piece(event.choice, new, step)
            if event.reason is None:
                if text.stopped:
                    # The engine sees hidden tokens, the reader does not: a stop string may span them.
                    handle.end(event.choice)
                continue
            stats = event.stats
            assert stats is not None
            end = End(event.choice, "stop_string" if text.stopped else event.reason, stats)
            self._ends.append(end)
            yield end

    async def whole(self, handle: ResponseHandle) -> dict[str, Any]:
        """The response that is sent at once."""
        texts = ["" for _ in self.texts]
        steps: list[list[StepRecord]] = [[] for _ in self.texts]
        ends: list[End | None] = [None] * len(self.texts)
        async for piece in self.pieces(handle):
            if isinstance(piece, End):
                ends[piece.choice] = piece
                continue
            texts[piece.choice] += piece.text
            if piece.step is not None:
                steps[piece.choice].append(piece.step)
        choices = []
        for choice, (text, end) in enumerate(zip(texts, ends, strict=True)):
            assert end is not None
            payload = self._telemetry(end)
            if self.stepwise:
                payload["steps"] = [strict_json(step.to_dict()) for step in steps[choice]]
            choices.append(self._choice(choice, self._content(text), FINISH[end.stop_reason]) | {"telltale": payload})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage(), "telltale": self._about()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: a chat's roles."""
        if not self.chat:
            return []
        return [
            self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None)
            for choice in range(len(self.texts))
        ]

    def chunk(self, piece: Piece | End) -> dict[str, Any]:
        """A piece as a chunk; an end is the only one with a finish reason."""
        if isinstance(piece, Piece):
            found = self._chunk(piece.choice, self._delta(piece.text), None)
            if piece.step is not None:
                found["choices"][0]["telltale"] = {"step": strict_json(piece.step.to_dict())}
            return found
        last = self._chunk(piece.choice, {"delta": {}} if self.chat else {"text": ""}, FINISH[piece.stop_reason])
        last["choices"][0]["telltale"] = self._telemetry(piece)
        last["telltale"] = self._about()
        return last

    def closing(self) -> dict[str, Any]:
        """The chunk that has the usage, without a choice."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": self.usage(), "telltale": self._about()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and outputs, and what became of the draft's: accepted ones are in the output, rejected ones not."""
        stats = [end.stats for end in self._ends]
        prompt = sum(self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(one.accepted_tokens + one.speculated_accepted for one in stats),
                "rejected_prediction_tokens": sum(
                    one.rejected_tokens + one.speculated - one.speculated_accepted for one in stats
                ),
                "reasoning_tokens": 0,
                "audio_tokens": 0,
            },
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _about(self) -> dict[str, Any]:
        return {"seed": self.seed, "policy": self.policy, "calibrated": self.calibrated}

    def _content(self, text: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _choice(self, choice: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice, **content, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choice: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return self._head(self._chunk_kind) | {"choices": [self._choice(choice, content, finish)]}

    def _telemetry(self, end: End) -> dict[str, Any]:
        stats = end.stats
        return {
            "stop_reason": end.stop_reason,
            "accepted_steps": stats.accepted_steps,
            "rejected_steps": stats.rejected_steps,
            "accepted_tokens": stats.accepted_tokens,
            "rejected_tokens": stats.rejected_tokens,
            "not_selected_tokens": stats.discarded_tokens + stats.target_discarded_tokens,
            "target_tokens": stats.target_tokens,
            "speculated_tokens": stats.speculated,
            "speculated_accepted_tokens": stats.speculated_accepted,
        }


class Gone(Exception):
    """The client has closed the connection."""


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
    """An ASGI response that sends an answer's chunks as they come; the handle is closed in any case."""

    def __init__(self, answer: Answer, handle: ResponseHandle, *, include_usage: bool) -> None:
        super().__init__()
        self.answer = answer
        self.handle = handle
        self.include_usage = include_usage

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send(scope, send), receive)
        except (Gone, OSError):
            scope["telltale.status"] = GONE
        finally:
            self.handle.close()

    async def _send(self, scope: MutableMapping[str, Any], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for data in self._events(scope):
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
            # Sending does not suspend while the buffer has room, and the loop must notice that the client has gone.
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, scope: MutableMapping[str, Any]) -> AsyncIterator[bytes]:
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        for chunk in self.answer.opening():
            yield encoded(chunk | usage)
        try:
            async for piece in self.answer.pieces(self.handle):
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
