"""A judge over HTTP: ``POST /score``, OpenRLHF's ``POST /get_reward``, ``GET /health``.

A score is the exactly rounded sum of the contributions in the same answer, and the same number as ``Judge.score`` gives.
JSON keeps it to the last bit. Neither prompts nor responses are logged, and no error repeats them.

Requests that wait at the same time go through the model together, on a thread of its own. While one batch is computed the next
one collects, so that a busy server batches without waiting; an idle one waits a moment for more. The event loop never computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from telltale.align.judge.explanation import Explanation
from telltale.align.judge.judge import Judge
from telltale.align.judge.templates import parse_rendered_chat
from telltale.config import check_integer, check_range
from telltale.errors import MissingExtraError, TelltaleError
from telltale.models.conversations import ROLES, ConversationError, Messages, read_conversation, read_text
from telltale.serve.http_errors import MISSING_EXTRA, ApiError, failed, refused, refused_conversation

try:
    from fastapi import FastAPI, Request, Response
    from pydantic import WithJsonSchema
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise MissingExtraError(MISSING_EXTRA) from error

from telltale.serve.http_json import (
    Body,
    answer_errors,
    json_response,
    json_schema,
    message_schema,
    openapi_body,
    parse,
    validated,
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

WRONG = 422
"""The status for JSON of the wrong form."""
_MESSAGES = {"type": "array", "items": message_schema(ROLES, strict=False), "minItems": 2}
_BATCH = {"type": "array", "items": _MESSAGES}


def _with_messages(*forms: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"messages": {"anyOf": list(forms)}}, "required": ["messages"]}


_SCORE_SCHEMA = {
    "anyOf": [
        _with_messages(_MESSAGES, _BATCH),
        {"type": "array", "items": {"anyOf": [_MESSAGES, _with_messages(_MESSAGES)]}},
    ]
}
_CONVERSATION = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
_SCORE_EXAMPLE = {"messages": _CONVERSATION}
_REWARD_EXAMPLE = {"query": [_CONVERSATION]}


class ScoreRequest(Body):
    """``messages``: one conversation, which ends with the response that is judged, or a list of them."""

    messages: list[Any]


class RewardRequest(Body):
    """OpenRLHF's body. ``query``: conversations or rendered texts; ``prompts``: for each text the prompt that it begins with."""

    query: Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"anyOf": [_MESSAGES, {"type": "string"}]}})]
    prompts: list[str] | None = None


@dataclass(frozen=True)
class Conversations:
    """What is to be scored; ``single``: whether the body held one conversation that was not in a list."""

    conversations: list[Messages]
    single: bool


def create_app(judge: Judge, *, batch_size: int = 32, patience: float = 0.002) -> FastAPI:
    """The ASGI application that serves ``judge``.

    ``batch_size``: conversations that go through the model together; ``patience``: seconds an idle server waits for more.
    Raises :class:`~telltale.errors.ConfigError` for sizes out of range.
    """
    batcher: MicroBatcher[Any, Explanation] = MicroBatcher(judge.explain_all, size=batch_size, patience=patience)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="telltale judge", lifespan=running)
    app.state.batcher = batcher
    answer_errors(app)

    @app.post("/score", openapi_extra=openapi_body(_SCORE_SCHEMA, example=_SCORE_EXAMPLE))
    async def score(request: Request) -> Response:
        body = score_body(await _payload(request))
        found = [_scored(explanation) for explanation in await _explained(batcher, body.conversations)]
        return json_response(found[0] if body.single else found)

    @app.post("/get_reward", openapi_extra=openapi_body(json_schema(RewardRequest), example=_REWARD_EXAMPLE))
    async def get_reward(request: Request) -> Response:
        queries = reward_body(await _payload(request))
        conversations = [_read(judge, query, index) for index, query in enumerate(queries)]
        return json_response(_rewarded(await _explained(batcher, conversations)))

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok", "objectives": list(judge.objectives), "batches": batcher.batches})

    return app


def score_body(value: Any) -> Conversations:
    """``{"messages": [message, ...]}`` (one), ``{"messages": [[message, ...], ...]}`` or a list of such (many).

    Raises :class:`~telltale.serve.http_errors.ApiError` (422) naming the field.
    """
    if isinstance(value, list):
        return Conversations([_entry(item, f"[{index}]") for index, item in enumerate(value)], single=False)
    messages = validated(ScoreRequest, value, status=WRONG).messages
    if not messages or isinstance(messages[0], list):
        found = [_conversation(item, f"messages[{index}]") for index, item in enumerate(messages)]
        return Conversations(found, single=False)
    return Conversations([_conversation(messages, "messages")], single=True)


def reward_body(value: Any) -> list[Messages | str | tuple[str, str]]:
    """OpenRLHF's ``{"query": [...], "prompts"?: [...]}``: per query a conversation, a rendered text, or (prompt, response).

    A query text that begins with its entry of ``prompts`` is split there. Raises
    :class:`~telltale.serve.http_errors.ApiError` (422).
    """
    body = validated(RewardRequest, value, status=WRONG)
    queries, prompts = body.query, body.prompts
    if prompts is not None and len(prompts) != len(queries):
        raise refused("prompts", f"{len(prompts)} prompts for {len(queries)} queries; expected as many.", status=WRONG)
    found: list[Messages | str | tuple[str, str]] = []
    for index, query in enumerate(queries):
        if not isinstance(query, str):
            found.append(_conversation(query, f"query[{index}]"))
            continue
        text = _text(query, f"query[{index}]")
        if prompts is not None and text.startswith(prompts[index]):
            found.append((prompts[index], text[len(prompts[index]) :]))
        else:
            found.append(text)
    return found


def _entry(item: Any, name: str) -> Messages:
    if isinstance(item, dict):
        item, name = validated(ScoreRequest, item, status=WRONG, name=name).messages, f"{name}.messages"
    return _conversation(item, name)


def _conversation(value: Any, name: str) -> Messages:
    try:
        return read_conversation(value, name=name)
    except ConversationError as error:
        raise refused_conversation(error, status=WRONG) from None


def _text(value: str, name: str) -> str:
    try:
        return read_text(value, name)
    except ConversationError as error:
        raise refused_conversation(error, status=WRONG) from None


async def _payload(request: Request) -> Any:
    try:
        return parse(await request.body())
    except ClientDisconnect:  # the client has gone; no trace belongs on the terminal
        raise ApiError(400, "the connection ended before the body did.", code="invalid_json") from None


def _read(judge: Judge, query: Any, index: int) -> Any:
    """Messages of one query. Raises :class:`~telltale.serve.http_errors.ApiError` (422) for a text that is not in the judge's chat
    format."""
    if isinstance(query, list):
        return query
    prompt, text = query if isinstance(query, tuple) else (None, query)
    try:
        return parse_rendered_chat(judge.tokenizer, text, prompt=prompt)
    except TelltaleError as error:
        raise refused(f"query[{index}]", str(error), status=WRONG) from None


async def _explained(batcher: MicroBatcher[Any, Explanation], conversations: Sequence[Any]) -> list[Explanation]:
    """Explanations from the model. What it refuses becomes a 422, any other failure a 500 that does not repeat the text."""
    try:
        return await batcher.submit(conversations)
    except TelltaleError as error:
        raise ApiError(WRONG, str(error), code="invalid_value") from None
    except Exception as error:
        raise failed(error, what="the judge") from None


def _scored(explanation: Explanation) -> dict[str, Any]:
    return {
        "score": explanation.score,
        "objectives": explanation.rewards,
        "weights": explanation.weights,
        "coefficients": explanation.coefficients,
        "contributions": explanation.contributions,
        "truncated": explanation.truncated,
        "response_truncated": explanation.response_truncated,
        "unfamiliar": explanation.unfamiliar,
    }


def _rewarded(explanations: Sequence[Explanation]) -> dict[str, Any]:
    """OpenRLHF's form: lists as long as the query; per-sample logs of every objective's reward and contribution."""
    scores = [explanation.score for explanation in explanations]
    names = [term.objective for term in explanations[0].terms] if explanations else []
    logs = {f"reward/{name}": [explanation.rewards[name] for explanation in explanations] for name in names}
    logs |= {f"contribution/{name}": [found.contributions[name] for found in explanations] for name in names}
    return {"rewards": scores, "scores": scores, "extra_logs": logs}


@dataclass
class _Waiting(Generic[Item, Answer]):
    items: list[Item]
    answer: asyncio.Future[list[Answer]] = field(repr=False)


class MicroBatcher(Generic[Item, Answer]):
    """Calls ``compute(items) -> answers`` (one each, in order) with the items of several requests at once.

    ``size``: items per batch; a larger request goes alone. ``patience``: seconds an idle server waits for more.
    Use it inside ``async with``; leaving the block answers what has been submitted and refuses what comes later.
    """

    def __init__(
        self, compute: Callable[[Sequence[Item]], Sequence[Answer]], *, size: int = 32, patience: float = 0.002
    ) -> None:
        check_integer("batch_size", size, low=1)
        check_range("patience", patience, low=0.0)
        self.compute = compute
        self.size = size
        self.patience = patience
        self.batches = 0
        """How many times the model was called."""
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MicroBatcher[Item, Answer]:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._changed.set()
        if self._worker is not None:
            await self._worker
        self._pool.shutdown(wait=True)

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to ``items``, or the error that computing them raised. An empty request never reaches the model.

        Raises ``RuntimeError`` outside the ``async with`` block.
        """
        if not items:
            return []
        if self._closing or self._worker is None:
            raise RuntimeError("the batcher is not running; submit inside its async with block.")
        entry = _Waiting[Item, Answer](list(items), asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._changed.set()
        return await entry.answer

    async def _work(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._waiting and not self._closing and len(self._waiting) == 1:
                await asyncio.sleep(self.patience)
            while self._waiting:
                await self._serve(self._take())
            if self._closing:
                return

    def _take(self) -> list[_Waiting[Item, Answer]]:
        """The longest run of waiting requests that fits a batch, in order of arrival; at least one."""
        batch: list[_Waiting[Item, Answer]] = []
        count = 0
        while self._waiting and (not batch or count + len(self._waiting[0].items) <= self.size):
            entry = self._waiting.popleft()
            if not entry.answer.cancelled():
                batch.append(entry)
                count += len(entry.items)
        return batch

    async def _serve(self, batch: list[_Waiting[Item, Answer]]) -> None:
        answers = await self._compute([item for entry in batch for item in entry.items])
        if isinstance(answers, Exception) and len(batch) > 1:
            # One bad request must not fail the others: each is computed again alone.
            for entry in batch:
                _answer(entry, await self._compute(entry.items))
            return
        start = 0
        for entry in batch:
            stop = start + len(entry.items)
            _answer(entry, answers if isinstance(answers, Exception) else answers[start:stop])
            start = stop

    async def _compute(self, items: Sequence[Item]) -> list[Answer] | Exception:
        if not items:
            return []
        self.batches += 1
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._pool, self.compute, items))
        except Exception as error:
            return error


def _answer(entry: _Waiting[Item, Answer], answers: list[Answer] | Exception) -> None:
    if entry.answer.done():
        return
    if isinstance(answers, Exception):
        entry.answer.set_exception(answers)
    else:
        entry.answer.set_result(answers)
