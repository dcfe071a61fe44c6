"""A judge over HTTP: ``POST /score``, OpenRLHF's ``POST /get_reward``, ``GET /health``.

A score is the exactly rounded sum of the contributions in the same answer, and the same number as ``Judge.score`` gives.
JSON keeps it to the last bit. Neither prompts nor responses are logged, and no error repeats them.
"""

# Without `from __future__ import annotations`: FastAPI reads the handlers' annotations, and its own names are imported
# inside the factory because the package is optional.

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from telltale.align.judge.explanation import Explanation
from telltale.align.judge.judge import Judge
from telltale.align.judge.templates import read_rendered
from telltale.errors import MissingExtraError, TelltaleError
from telltale.serve.batching import MicroBatcher
from telltale.serve.bodies import BadBody, parse, reward_body, score_body

_CONVERSATION = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SCORE_EXAMPLE = {"messages": _CONVERSATION}
REWARD_EXAMPLE = {"query": [_CONVERSATION]}


def create_app(judge: Judge, *, batch_size: int = 32, patience: float = 0.002) -> Any:
    """The ASGI application (FastAPI) that serves ``judge``.

    ``batch_size``: conversations that go through the model together; ``patience``: seconds an idle server waits for more.
    Raises :class:`~telltale.errors.MissingExtraError` without FastAPI, and :class:`~telltale.errors.ConfigError` for sizes
    out of range.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.requests import ClientDisconnect
    except ImportError as error:
        raise MissingExtraError("the server needs FastAPI and uvicorn: pip install 'telltale[serve]'") from error

    batcher: MicroBatcher[Any, Explanation] = MicroBatcher(judge.explain_all, size=batch_size, patience=patience)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="telltale judge", lifespan=running)
    app.state.batcher = batcher

    @app.exception_handler(BadBody)
    async def refuse(_: Request, error: BadBody) -> JSONResponse:
        return JSONResponse(error.to_dict(), status_code=error.status)

    async def told(request: Request) -> Any:
        try:
            return parse(await request.body())
        except ClientDisconnect:  # nobody is left to answer, and no trace belongs on the terminal
            raise BadBody(400, (), "the connection ended before the body did") from None

    @app.post("/score", openapi_extra=_schema(SCORE_EXAMPLE))
    async def score(request: Request) -> JSONResponse:
        body = score_body(await told(request))
        found = [_scored(explanation) for explanation in await _explained(batcher, body.conversations)]
        return JSONResponse(found[0] if body.single else found)

    @app.post("/get_reward", openapi_extra=_schema(REWARD_EXAMPLE))
    async def get_reward(request: Request) -> JSONResponse:
        queries = reward_body(await told(request))
        conversations = [_read(judge, query, index) for index, query in enumerate(queries)]
        return JSONResponse(_rewarded(await _explained(batcher, conversations)))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "objectives": list(judge.objectives), "batches": batcher.batches})

    return app


def _read(judge: Judge, query: Any, index: int) -> Any:
    """Messages of one query. Raises :class:`BadBody` (422) for a text that is not in the judge's chat format."""
    if isinstance(query, list):
        return query
    prompt, text = query if isinstance(query, tuple) else (None, query)
    try:
        return read_rendered(judge.tokenizer, text, prompt=prompt)
    except TelltaleError as error:
        raise BadBody(422, ("query", index), str(error)) from None


async def _explained(batcher: MicroBatcher[Any, Explanation], conversations: Sequence[Any]) -> list[Explanation]:
    """Explanations from the model. What it refuses becomes a 422, any other failure a 500 that keeps the text to itself."""
    try:
        return await batcher.submit(conversations)
    except TelltaleError as error:
        raise BadBody(422, (), str(error)) from None
    except Exception as error:
        raise BadBody(500, (), f"the judge failed with {type(error).__name__}") from None


def _scored(explanation: Explanation) -> dict[str, Any]:
    return {
        "score": explanation.score,
        "objectives": explanation.rewards,
        "weights": explanation.weights,
        "coefficients": explanation.coefficients,
        "contributions": explanation.contributions,
        "truncated": explanation.truncated,
    }


def _rewarded(explanations: Sequence[Explanation]) -> dict[str, Any]:
    """OpenRLHF's form: lists as long as the query; per-sample logs of every objective's reward and contribution."""
    scores = [explanation.score for explanation in explanations]
    names = [term.objective for term in explanations[0].terms] if explanations else []
    logs = {f"reward/{name}": [explanation.rewards[name] for explanation in explanations] for name in names}
    logs |= {f"contribution/{name}": [found.contributions[name] for found in explanations] for name in names}
    return {"rewards": scores, "scores": scores, "extra_logs": logs}


def _schema(example: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
