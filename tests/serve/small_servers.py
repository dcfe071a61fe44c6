"""Small served models of the three decodes, and a real server on loopback to ask them over."""

from __future__ import annotations

import functools
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import torch
import uvicorn

from decode.models_that_draft import drafting_model
from serve.small_tokenizers import byte_level
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.serve.connections import guarded_protocol
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_app import create_app
from telltale.serve.service import Service

NAME = "small"
CONTEXT = 512
STEPS = StepVerifiedConfig(
    delimiter="e", max_step_tokens=16, candidates=3, score="log-probability", threshold=-6.0, repetition_limit=None
)
"""Random weights hardly ever write blank lines, so a step ends with a letter; about half of them are accepted."""
CONFIGS = {
    "autoregressive": StepVerifiedConfig(policy="target", repetition_limit=None),
    "self-speculative": StepVerifiedConfig(policy="speculative", exit_layer=2, draft_length=3, repetition_limit=None),
    "step-verified": STEPS,
}


@functools.cache
def models(late: float = 0.3) -> Any:
    """A model with varied output; ones of different ``late`` share their early layers."""
    return drafting_model(vocabulary_size=len(byte_level()), late=late, max_positions=CONTEXT)


def served(decode: str, config: StepVerifiedConfig | None = None, *, tokenizer: Any = None) -> ServedModel:
    """A served model; caches and decoders are its own."""
    draft = models(0.1) if decode == "step-verified" else None
    opened = StepVerified(models(), draft, tokenizer or byte_level(), config or CONFIGS[decode])
    return ServedModel(NAME, opened, decode)


@dataclass
class Running:
    """A server under way."""

    url: str
    app: Any
    server: uvicorn.Server

    @property
    def service(self) -> Service:
        return self.app.state.service

    def client(self, **options: Any) -> openai.OpenAI:
        """The stock client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))

    def held(self):
        """What the server holds now."""
        return self.service.scheduler.occupancy()

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until nothing is decoded any more."""
        wait_for(lambda: (self.held().rows, self.held().waiting, self.held().slots_in_use) == (0, 0, 0), seconds)


@contextmanager
def listening(app: Any, *, log_level: str = "warning", http: Any = None):
    """An application under uvicorn on a free port of loopback, as users run it; gives its URL."""
    http = guarded_protocol() if http is None else http
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, port=0, log_level=log_level, lifespan="on", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    app.state.server = server
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def running(found: ServedModel, *, log_level: str = "warning", **options: Any):
    """``found`` on a free port of loopback."""
    app = create_app(found, **options)
    with listening(app, log_level=log_level) as url:
        yield Running(url, app, app.state.server)


class Held:
    """Keeps the decoding thread at the beginning of its next turn until :meth:`release`."""

    def __init__(self, service: Service) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        engine = service.scheduler._engine
        advance = engine.advance

        def held(*arguments):
            self.reached.set()
            assert self.open.wait(30)
            return advance(*arguments)

        engine.advance = held

    def release(self) -> None:
        self.open.set()


def slowed(service):
    """Turns of at least 10 ms: no output ends before its client has gone."""
    engine = service.scheduler._engine
    advance = engine.advance

    def slow(*arguments):
        time.sleep(0.01)
        return advance(1)

    engine.advance = slow


def wait_for(condition, seconds: float = 20.0) -> None:
    """Until ``condition()`` holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def offline(found: ServedModel, prompts: list[list[int]], *, seed: int = 0, config=None, **arguments: Any):
    """What the same decoder says without a server, one prompt of the request at a time where ``prompts`` are alike."""
    decoder = found.decoder
    if config is not None:
        decoder = StepVerified(decoder.target, decoder.draft, decoder.tokenizer, config)
    generator = torch.Generator().manual_seed(seed)
    result = decoder.generate(prompts, generator=generator, eos_token_id=found.eos, **arguments)
    return [row[:length] for row, length in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)], result


def text_of(tokens: list[int]) -> str:
    """As Transformers decodes it."""
    return byte_level().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
