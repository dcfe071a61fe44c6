"""From a checked request to rows of the engine, and from the engine's state to the figures that operators read."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from telltale.decode.calibration.monitor import GuardMonitor
from telltale.decode.request import checked_request
from telltale.decode.results import StepVerifiedStatistics
from telltale.decode.rows import Row, Scoring
from telltale.decode.sampling import Sampling
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.stopping import StopConditions
from telltale.errors import TelltaleError
from telltale.serve.audits import Audits, Checker
from telltale.serve.constraints import Constraints, calls_of, constrained_by
from telltale.serve.detokenise import OutputText
from telltale.serve.encoding import Encoder, Prompt
from telltale.serve.http_errors import ApiError, refused
from telltale.serve.logprobs import chat_logprobs, completion_logprobs, read_tokens
from telltale.serve.metrics import Gauges, Metrics
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_schema import ChatRequest, CompletionRequest, GenerationRequest
from telltale.serve.overrides import configured
from telltale.serve.responses import Answer
from telltale.serve.scheduler import Event, ResponseHandle, Scheduler
from telltale.serve.tool_forms import ToolForm


class Service:
    """One served model with its scheduler, its tokenizer's thread and its metrics. Use it inside ``async with``."""

    def __init__(
        self,
        served: ServedModel,
        *,
        max_rows: int = 16,
        queue: int = 64,
        prefix_cache: int | None = None,
        monitor: GuardMonitor | None = None,
        checker: Checker | None = None,
    ) -> None:
        self.served = served
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            served.decoder,
            max_rows=max_rows,
            queue=queue,
            prefix_cache=prefix_cache,
            shared=served.shared,
            metrics=self.metrics,
        )
        self.encoder = Encoder(served.decoder.tokenizer, context=served.context, tokens=served.tokens)
        self.constraints = Constraints(served, self.encoder)
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
            form = await self.constraints.tool_form(asked)
            prompts = await self._prompts(asked, form)
            grammar = await self.constraints.grammar(asked, form)
            seed = secrets.randbits(31) if asked.seed is None else asked.seed
            rows = self.rows(asked, prompts, config, seed)
            self.constraints.apply(asked, rows, grammar)
            answer = self._answer(asked, prompts, rows, seed)
            if form is not None:
                answer.calls = calls_of(asked, form)
            if asked.stream and asked.top is not None:
                for row in rows:
                    row.beside = Scoring(1, asked.top)
                answer.scored = partial(self._scores_of_prompts, top=asked.top)
            if asked.max_tokens == 0:
                return answer, self._nothing(count)
            return answer, self.scheduler.submit(rows, constrained_by=constrained_by(asked))
        except BaseException:
            # A client that goes away while its prompt is read cancels this.
            self.scheduler.release(count)
            raise

    def _configured(self, asked: GenerationRequest) -> StepVerifiedConfig:
        """The configuration of a request. A threshold that audits have raised takes the place of the guard's own."""
        config = configured(self.served.decoder, asked.overrides, temperature=asked.temperature)
        raised = None if self.monitor is None else self.monitor.threshold
        own = self.served.decoder.config.policy
        if raised is None or "threshold" in asked.overrides.values or config.policy != own:
            return config
        return replace(config, threshold=raised)

    def _promised(self, config: StepVerifiedConfig, rows: Sequence[Row]) -> bool:
        """Whether the calibration's promise covers an answer, and stands."""
        if self.monitor is not None and not self.monitor.kept:
            return False
        return all(
            row.sampling.processor is None and self.served.covered(config, row.sampling, row.prompt) for row in rows
        )

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

    async def _scores_of_prompts(self, prompts: Sequence[list[int]], top: int) -> list[Scoring]:
        return await self._scores(prompts, [1] * len(prompts), top)

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

    async def _prompts(self, asked: GenerationRequest, form: ToolForm | None) -> list[Prompt]:
        room = 1 if asked.max_tokens is None else asked.max_tokens
        if isinstance(asked, CompletionRequest):
            return await self.encoder.completion(asked.prompts, room=room)
        assert isinstance(asked, ChatRequest)
        if "tools" in asked.chat_template_kwargs:
            raise refused("chat_template_kwargs", "tools have a field of their own.")
        given = asked.chat_template_kwargs | ({} if form is None else {form.variable: form.shown(asked.shown_tools)})
        return [await self.encoder.chat(asked.messages, room=room, given=given)]

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
            # The body's fields have been checked one by one; what is left is too long.
            raise ApiError(400, str(error), param=asked.limited_by, code="invalid_value") from None
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
            tokenizer=tokenizer,
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
            Gauges(
                "telltale_prefix_cache_bytes",
                "Keys and values of texts that were read before.",
                lambda: {"": held().prefix_bytes},
            ),
            Gauges("telltale_prefix_cache_pieces", "Pieces of these.", lambda: {"": held().prefix_pieces}),
        ]
