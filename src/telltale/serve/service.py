"""From a checked request to rows of the engine, and from the engine's state to the figures that operators read.

Texts and messages become token ids on a thread of their own: a long prompt must not hold up the others' streams. The tokenizer
there is a copy. Encoding changes a fast tokenizer's settings, and the engine reads steps with the original meanwhile.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from telltale.decode.calibration.monitor import GuardMonitor
from telltale.decode.request import checked_request
from telltale.decode.results import StepVerifiedStatistics
from telltale.decode.rows import Row, Scoring
from telltale.decode.sampling import Sampling
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.stopping import StopConditions
from telltale.errors import TelltaleError
from telltale.models.conversations import Messages
from telltale.serve.audits import Audits, Checker
from telltale.serve.detokenise import OutputText
from telltale.serve.http_errors import ApiError, refused
from telltale.serve.logprobs import chat_logprobs, completion_logprobs, read_tokens
from telltale.serve.metrics import Gauges, Metrics
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_schema import ChatRequest, CompletionRequest, GenerationRequest, Prompts, configured
from telltale.serve.responses import Answer
from telltale.serve.scheduler import Event, ResponseHandle, Scheduler

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """``text``: what an echo repeats; ``continued``: whether the answer goes on from visible text."""

    ids: list[int]
    text: str
    continued: bool


class Encoder:
    """Encodes for a model with ``context`` positions that knows the token ids below ``tokens``. Close it after use."""

    def __init__(self, tokenizer: Any, *, context: int, tokens: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.context = context
        self.tokens = tokens
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def completion(self, prompts: Prompts, *, room: int) -> list[Prompt]:
        """Prompts of /v1/completions that leave ``room`` tokens for the answer.

        Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming ``prompt``.
        """
        return await self.apart(lambda: [self._completion(prompt, room) for prompt in prompts])

    async def chat(self, messages: Messages, *, room: int) -> Prompt:
        """The prompt that the tokenizer's chat template makes of messages; errors as in :meth:`completion`."""
        return await self.apart(lambda: self._chat(messages, room))

    async def apart(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _completion(self, prompt: str | list[int], room: int) -> Prompt:
        if isinstance(prompt, str):
            ids = self._ids(lambda: self.tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"])
            return Prompt(self._checked(ids, "prompt", room), prompt, continued=True)
        ids = self._checked(prompt, "prompt", room)
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Prompt(ids, text, continued=bool(text))

    def _chat(self, messages: Messages, room: int) -> Prompt:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "the model's tokenizer has no chat template; use /v1/completions, or save a chat_template with the model.",
                param="messages",
                code="no_chat_template",
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            # Templates refuse with exceptions of their own, which may repeat the text: only their kind is reported.
            raise refused(
                "messages",
                f"the model's chat template does not take them ({type(error).__name__}); do the roles alternate?",
            ) from None
        ids = self._ids(lambda: self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return Prompt(self._checked(ids, "messages", room), text, continued=False)

    def _ids(self, encode: Callable[[], Any]) -> list[int]:
        return [int(token) for token in encode()]

    def _checked(self, ids: Sequence[int], name: str, room: int) -> list[int]:
        if not ids:
            raise refused(name, "it has no token; expected some text.")
        if len(ids) + room > self.context:
            raise refused(
                name,
                f"{len(ids)} tokens and {room} of the answer are more than the model's {self.context} positions. Shorten "
                f"the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        if not 0 <= min(ids) <= max(ids) < self.tokens:
            raise refused(name, f"expected token ids from 0 to {self.tokens - 1}.")
        return list(ids)


class Service:
    """One served model with its scheduler, its tokenizer's thread and its metrics. Use it inside ``async with``."""

    def __init__(
        self,
        served: ServedModel,
        *,
        max_rows: int = 16,
        queue: int = 64,
        monitor: GuardMonitor | None = None,
        checker: Checker | None = None,
    ) -> None:
        self.served = served
        self.metrics = Metrics()
        self.scheduler = Scheduler(served.decoder, max_rows=max_rows, queue=queue, metrics=self.metrics)
        self.encoder = Encoder(served.decoder.tokenizer, context=served.context, tokens=served.tokens)
        self.audits = None if monitor is None else Audits(served, self.scheduler, monitor, checker)
        self.metrics.gauges += self._gauges()
        if self.audits is not None:
            self.metrics.gauges += self.audits.gauges()

    async def __aenter__(self) -> Service:
        await self.scheduler.__aenter__()
        if self.audits is not None:
            await self.audits.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.audits is not None:
            await self.audits.__aexit__()
        await self.scheduler.__aexit__()
        self.encoder.close()

    @property
    def monitor(self) -> GuardMonitor | None:
        """What audits have shown; None where there are none."""
        return None if self.audits is None else self.audits.monitor

    def entry(self) -> dict[str, Any]:
        """As ``/v1/models`` lists the model, with what audits say of its promise."""
        found = self.served.entry()
        if self.monitor is not None:
            found["telltale"]["audits"] = dict(self.monitor.describe())
        return found

    async def begin(self, asked: GenerationRequest) -> tuple[Answer, ResponseHandle]:
        """Admit a request. Raises :class:`~telltale.serve.http_errors.ApiError` for what cannot be served."""
        served = self.served
        if asked.model != served.name:
            raise ApiError(
                404,
                f"the model asked for is not served here; this server has {served.name!r}.",
                param="model",
                code="model_not_found",
            )
        config = self._configured(asked)
        count = self._rows(asked)
        self.scheduler.reserve(count)
        try:
            prompts = await self._prompts(asked)
            seed = secrets.randbits(31) if asked.seed is None else asked.seed
            rows = self.rows(asked, prompts, config, seed)
            answer = self._answer(asked, prompts, rows, seed)
            return answer, self._nothing(count) if asked.max_tokens == 0 else self.scheduler.submit(rows)
        except BaseException:
            # A client that goes away while its prompt is read cancels this.
            self.scheduler.release(count)
            raise

    def _configured(self, asked: GenerationRequest) -> StepVerifiedConfig:
        """The configuration of a request. A threshold that audits have raised takes the place of the guard's own."""
        config = configured(self.served.decoder, asked.overrides)
        raised = None if self.monitor is None else self.monitor.threshold
        own = self.served.decoder.config.policy
        if raised is None or "threshold" in asked.overrides.values or config.policy != own:
            return config
        return replace(config, threshold=raised)

    def _promised(self, config: StepVerifiedConfig, rows: Sequence[Row]) -> bool:
        """Whether the calibration's promise covers an answer, and stands."""
        if self.monitor is not None and not self.monitor.kept:
            return False
        return all(self.served.covered(config, row.sampling, row.prompt) for row in rows)

    async def whole(self, asked: GenerationRequest, answer: Answer, handle: ResponseHandle) -> dict[str, Any]:
        """The response that is sent at once, with log-probabilities if they were asked for."""
        response = await answer.whole(handle)
        if asked.top is None:
            return response
        echo = isinstance(asked, CompletionRequest) and asked.echo
        prompts = [prompt for prompt in answer.prompt_ids for _ in range(asked.n)]
        sequences = [[*prompt, *tokens] for prompt, tokens in zip(prompts, answer.tokens, strict=True)]
        starts = [1 if echo else len(prompt) for prompt in prompts]
        scores = await self._scores(sequences, starts, asked.top)
        for place, choice in enumerate(response["choices"]):
            since = 0 if echo else starts[place]
            # A long echo takes a while, and the event loop must not wait.
            read = await self.encoder.apart(
                partial(read_tokens, self.encoder.tokenizer, sequences[place], scores[place], since=since)
            )
            choice["logprobs"] = chat_logprobs(read) if answer.chat else completion_logprobs(read)
        return response

    async def _scores(self, sequences: Sequence[list[int]], starts: Sequence[int], top: int) -> list[Scoring]:
        """How likely the model finds the tokens of each sequence from its start on, whoever drafted them."""
        config = replace(self.served.decoder.config, policy="target")
        rows = []
        for sequence, start in zip(sequences, starts, strict=True):
            row = Row(sequence, StopConditions(0), Sampling(), config=config, stats=StepVerifiedStatistics())
            row.scoring = Scoring(start, top)
            rows.append(row)
        self.scheduler.reserve(len(rows), always=True)
        try:
            handle = self.scheduler.submit(rows, counted=False)
        except BaseException:
            self.scheduler.release(len(rows))
            raise
        try:
            async for event in handle:
                if event.failure is not None:
                    raise event.failure
        finally:
            handle.close()
        return [row.scoring for row in rows if row.scoring is not None]

    def _nothing(self, choices: int) -> ResponseHandle:
        """The events of outputs without a token; their places are given back."""
        self.scheduler.release(choices)
        handle = ResponseHandle(choices, asyncio.get_running_loop(), lambda: None)
        for choice in range(choices):
            handle.deliver(Event(choice, reason="length", stats=StepVerifiedStatistics()))
        return handle

    def _rows(self, asked: GenerationRequest) -> int:
        """How many outputs a request wants.

        Raises :class:`~telltale.serve.http_errors.ApiError` (400) for more than can ever be.
        """
        if asked.max_tokens is not None and asked.max_tokens >= self.served.context:
            raise refused(
                asked.limited_by,
                f"the model has {self.served.context} positions for prompt and answer; expected less.",
                code="context_length_exceeded",
            )
        prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
        most = self.scheduler.capacity
        if prompts > most:
            raise refused("prompt", f"{prompts} prompts; this server takes on {most} outputs.")
        if prompts * asked.n > most:
            raise refused("n", f"the request asks for {prompts * asked.n} outputs; this server takes on {most}.")
        return prompts * asked.n

    async def _prompts(self, asked: GenerationRequest) -> list[Prompt]:
        room = 1 if asked.max_tokens is None else asked.max_tokens
        if isinstance(asked, CompletionRequest):
            return await self.encoder.completion(asked.prompts, room=room)
        assert isinstance(asked, ChatRequest)
        return [await self.encoder.chat(asked.messages, room=room)]

    def rows(
        self, asked: GenerationRequest, prompts: Sequence[Prompt], config: StepVerifiedConfig, seed: int
    ) -> list[Row]:
        """The rows of a request: those of ``StepVerified.generate`` for its prompts, each repeated n times in place.

        The generator is ``torch.Generator().manual_seed(seed)``, so the same call offline gives the same tokens.
        """
        decoder = self.served.decoder
        rows = [prompt.ids for prompt in prompts for _ in range(asked.n)]
        limit = self.served.context - max(map(len, rows)) if asked.max_tokens is None else asked.max_tokens
        if limit == 0:
            # Nothing is decoded; the rows only say how it would be.
            rows, limit = [row[:1] for row in rows], 1
        try:
            request = checked_request(
                decoder.target,
                rows,
                max_new_tokens=limit,
                eos_token_id=self.served.eos,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                generator=torch.Generator().manual_seed(seed),
                stop_strings=asked.stop or None,
                tokenizer=decoder.tokenizer,
            )
        except TelltaleError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        return decoder.rows(request, config)

    def _answer(self, asked: GenerationRequest, prompts: Sequence[Prompt], rows: Sequence[Row], seed: int) -> Answer:
        config = rows[0].config
        chat = isinstance(asked, ChatRequest)
        echoes = [prompt.text for prompt in prompts for _ in range(asked.n)]
        tokenizer = self.served.decoder.tokenizer
        return Answer(
            chat=chat,
            model=self.served.name,
            seed=seed,
            policy=config.policy,
            prompts=[len(prompt.ids) for prompt in prompts],
            prompt_ids=[prompt.ids for prompt in prompts],
            texts=[
                OutputText(tokenizer, stops=asked.stop, continues=prompt.continued)
                for prompt in prompts
                for _ in range(asked.n)
            ],
            echoes=echoes if isinstance(asked, CompletionRequest) and asked.echo else [],
            stepwise=config.drafts,
            calibrated=self._promised(config, rows),
            fingerprint=self.served.fingerprint,
        )

    def _gauges(self) -> list[Gauges]:
        held = self.scheduler.occupancy
        return [
            Gauges("telltale_rows_live", "Rows that are being decoded.", lambda: {"": held().rows}),
            Gauges("telltale_queue_depth", "Rows that wait for a place.", lambda: {"": held().waiting}),
            Gauges(
                "telltale_cache_slots",
                "Places of the cache.",
                lambda: {"all": held().slots, "in_use": held().slots_in_use},
                "state",
            ),
            Gauges(
                "telltale_cache_branches_in_use",
                "Branches of the cache that candidates hold.",
                lambda: {"": held().branches_in_use},
            ),
            Gauges("telltale_cache_bytes", "Keys and values, allocated.", lambda: {"": held().cache_bytes}),
        ]
