"""Responses in OpenAI's form, whole and as chunks, with telltale's telemetry in a field of its own.

Both forms are made of the same pieces, so what is streamed and what is sent at once cannot differ. Both watch the connection while
they wait: when the client has gone, its outputs are dropped at the next turn.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from telltale.decode.results import StepRecord, StepVerifiedStatistics
from telltale.decode.rows import Scoring
from telltale.runs.files import strict_json
from telltale.serve.detokenise import OutputText
from telltale.serve.http_errors import ApiError
from telltale.serve.http_json import Response, encoded
from telltale.serve.logprobs import ReadToken, TokenReader, chat_logprobs, completion_logprobs
from telltale.serve.scheduler import Event, ResponseHandle
from telltale.serve.tools import ToolCall, ToolCallReader

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
    read: list[ReadToken] = field(default_factory=list)
    """The tokens that have come, with their log-probabilities, where a stream has them."""
    calls: list[ToolCall] = field(default_factory=list)
    """Calls of tools that are complete with it, and the place of the first among the choice's calls."""
    first_call: int = 0


@dataclass
class End:
    """One choice has ended."""

    choice: int
    stop_reason: str
    stats: StepVerifiedStatistics
    calls: int = 0
    """Calls of tools in it."""

    @property
    def finish(self) -> str:
        """OpenAI's ``finish_reason``."""
        found = FINISH[self.stop_reason]
        return "tool_calls" if self.calls and found == "stop" else found


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
    scored: Callable[[list[list[int]]], Awaitable[list[Scoring]]] | None = None
    """Where a stream has log-probabilities: what gives those of the prompts, for an echo."""
    tokenizer: Any = None
    calls: Callable[[], ToolCallReader] | None = None
    """Makes what reads calls of tools in a choice's text; None where there are no tools."""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self.tokens: list[list[int]] = [[] for _ in self.texts]
        """The tokens of each choice that belong to its answer, so far."""
        self._ends: list[End] = []
        self._readers: list[TokenReader] = []
        self._call_readers: list[ToolCallReader] = []

    async def pieces(self, handle: ResponseHandle) -> AsyncIterator[Piece | End]:
        """The pieces of a response, in order. Raises the :class:`~telltale.serve.http_errors.ApiError` that ended it."""
        for choice, (echo, read) in enumerate(zip(self.echoes, await self._read_prompts(), strict=False)):
            yield Piece(choice, echo, read=read)
        if self.calls is not None:
            self._call_readers = [self.calls() for _ in self.texts]
        async for event in handle:
            if event.failure is not None:
                raise event.failure
            text = self.texts[event.choice]
            if text.stopped:
                # The engine went on for a while; how far depends on timing, so none of it is sent or counted.
                new, step, read = "", None, []
            else:
                count, new = text.push_counted(event.tokens)
                self.completion_tokens += count
                self.tokens[event.choice] += event.tokens[:count]
                if event.reason is not None:
                    new += text.finish()
                step = event.step if self.stepwise else None
                read = self._read(event, count, last=text.stopped or event.reason is not None)
            piece = Piece(event.choice, new, step, read)
            if self._call_readers:
                self._part(piece, last=event.reason is not None or text.stopped)
            if piece.text or step is not None or read or piece.calls:
                yield piece
            if event.reason is None:
                if text.stopped:
                    # The engine sees hidden tokens, the reader does not: a stop string may span them.
                    handle.end(event.choice)
                continue
            stats = event.stats
            assert stats is not None
            calls = self._call_readers[event.choice].count if self._call_readers else 0
            end = End(event.choice, "stop_string" if text.stopped else event.reason, stats, calls)
            self._ends.append(end)
            yield end

    def _part(self, piece: Piece, *, last: bool) -> None:
        """Part a piece's text into what is said and calls of tools."""
        reader = self._call_readers[piece.choice]
        piece.first_call = reader.count
        piece.text, piece.calls = reader.push(piece.text)
        if last:
            said, calls = reader.finish()
            piece.text += said
            piece.calls += calls

    async def _read_prompts(self) -> list[list[ReadToken]]:
        """The tokens of each choice's echo with their log-probabilities, and what reads those that follow."""
        each = [prompt for prompt in self.prompt_ids for _ in range(len(self.texts) // len(self.prompt_ids))]
        if self.scored is None:
            return [[] for _ in each]
        if not self.echoes:
            self._readers = [TokenReader(self.tokenizer, prompt) for prompt in each]
            return [[] for _ in each]
        self._readers = [TokenReader(self.tokenizer) for _ in each]
        found = []
        for prompt, scoring, reader in zip(each, await self.scored(each), self._readers, strict=True):
            scores = [None, *zip(scoring.chosen, scoring.best, strict=True)]
            found.append([reader.push(token, score) for token, score in zip(prompt, scores, strict=True)])
        return found

    def _read(self, event: Event, count: int, *, last: bool) -> list[ReadToken]:
        if self.scored is None:
            return []
        new = list(zip(event.tokens, event.scores, strict=True))[:count]
        reader = self._readers[event.choice]
        return [reader.push(token, score, last=last and place == count) for place, (token, score) in enumerate(new, 1)]

    async def whole(self, handle: ResponseHandle) -> dict[str, Any]:
        """The response that is sent at once."""
        texts = ["" for _ in self.texts]
        steps: list[list[StepRecord]] = [[] for _ in self.texts]
        ends: list[End | None] = [None] * len(self.texts)
        calls: list[list[ToolCall]] = [[] for _ in self.texts]
        async for piece in self.pieces(handle):
            if isinstance(piece, End):
                ends[piece.choice] = piece
                continue
            texts[piece.choice] += piece.text
            calls[piece.choice] += piece.calls
            if piece.step is not None:
                steps[piece.choice].append(piece.step)
        choices = []
        for choice, (text, end) in enumerate(zip(texts, ends, strict=True)):
            assert end is not None
            payload = self._telemetry(end)
            if self.stepwise:
                payload["steps"] = [strict_json(step.to_dict()) for step in steps[choice]]
            content = self._content(text, calls[choice])
            choices.append(self._choice(choice, content, end.finish) | {"telltale": payload})
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
            found = self._chunk(piece.choice, self._delta(piece), None)
            if piece.read:
                found["choices"][0]["logprobs"] = (chat_logprobs if self.chat else completion_logprobs)(piece.read)
            if piece.step is not None:
                found["choices"][0]["telltale"] = {"step": strict_json(piece.step.to_dict())}
            return found
        last = self._chunk(piece.choice, {"delta": {}} if self.chat else {"text": ""}, piece.finish)
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
            "prompt_tokens_details": {"cached_tokens": self._cached(), "audio_tokens": 0},
        }

    def _cached(self) -> int:
        """Tokens of the prompts that an earlier request had read; each prompt counts once, as in ``prompt_tokens``."""
        found = [0] * len(self.prompts)
        for end in self._ends:
            place = end.choice * len(self.prompts) // len(self.texts)
            found[place] = max(found[place], end.stats.cached_tokens)
        return sum(found)

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

    def _content(self, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": (text.strip() and text) or None, "tool_calls": [call.to_dict() for call in calls]}
        return {"message": message}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if not self.chat:
            return {"text": piece.text}
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.calls else {}
        if piece.calls:
            delta["tool_calls"] = [
                {"index": place} | call.to_dict() for place, call in enumerate(piece.calls, start=piece.first_call)
            ]
        return {"delta": delta}

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
