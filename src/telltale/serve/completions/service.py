"""From a checked request to rows of the engine, and from the engine's state to the figures that operators read."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from telltale.decode.request import checked_request
from telltale.decode.rows import Row
from telltale.decode.step_config import StepVerifiedConfig
from telltale.errors import TelltaleError
from telltale.serve.completions.answers import Answer
from telltale.serve.completions.bodies import Asked, ChatAsked, CompletionAsked
from telltale.serve.completions.deltas import OutputText
from telltale.serve.completions.errors import ApiError, refused
from telltale.serve.completions.metrics import Gauges, Metrics
from telltale.serve.completions.overrides import configured
from telltale.serve.completions.prompts import Encoder, Prompt
from telltale.serve.completions.scheduler import Scheduler
from telltale.serve.completions.served import Served
from telltale.serve.completions.tickets import Ticket


class Service:
    """One served model with its scheduler, its tokenizer's thread and its metrics. Use it inside ``async with``."""

    def __init__(self, served: Served, *, max_rows: int = 16, queue: int = 64) -> None:
        self.served = served
        self.metrics = Metrics()
        self.scheduler = Scheduler(served.decoder, max_rows=max_rows, queue=queue, metrics=self.metrics)
        self.encoder = Encoder(served.decoder.tokenizer, context=served.context, tokens=served.tokens)
        self.metrics.gauges += self._gauges()

    async def __aenter__(self) -> Service:
        await self.scheduler.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.scheduler.__aexit__()
        self.encoder.close()

    async def begin(self, asked: Asked) -> tuple[Answer, Ticket]:
        """Take a request in. Raises :class:`~telltale.serve.completions.errors.ApiError` for what cannot be served."""
        served = self.served
        if asked.model != served.name:
            raise ApiError(
                404,
                f"the model asked for is not served here; this server has {served.name!r}.",
                param="model",
                code="model_not_found",
            )
        config = configured(served.decoder, asked.overrides)
        count = self._rows(asked)
        self.scheduler.reserve(count)
        try:
            prompts = await self._prompts(asked)
            seed = secrets.randbits(31) if asked.seed is None else asked.seed
            rows = self.rows(asked, prompts, config, seed)
            return self._answer(asked, prompts, rows, seed), self.scheduler.submit(rows)
        except BaseException:
            # A client that goes away while its prompt is read cancels this.
            self.scheduler.release(count)
            raise

    def _rows(self, asked: Asked) -> int:
        """How many outputs a request wants.

        Raises :class:`~telltale.serve.completions.errors.ApiError` (400) for more than can ever be.
        """
        if asked.max_tokens is not None and asked.max_tokens >= self.served.context:
            raise refused(
                asked.limited_by,
                f"the model has {self.served.context} positions for prompt and answer; expected less.",
                code="context_length_exceeded",
            )
        prompts = len(asked.prompts) if isinstance(asked, CompletionAsked) else 1
        most = self.scheduler.capacity
        if prompts > most:
            raise refused("prompt", f"{prompts} prompts; this server takes on {most} outputs.")
        if prompts * asked.n > most:
            raise refused("n", f"the request asks for {prompts * asked.n} outputs; this server takes on {most}.")
        return prompts * asked.n

    async def _prompts(self, asked: Asked) -> list[Prompt]:
        room = 1 if asked.max_tokens is None else asked.max_tokens
        if isinstance(asked, CompletionAsked):
            return await self.encoder.completion(asked.prompts, room=room)
        assert isinstance(asked, ChatAsked)
        return [await self.encoder.chat(asked.messages, room=room)]

    def rows(self, asked: Asked, prompts: Sequence[Prompt], config: StepVerifiedConfig, seed: int) -> list[Row]:
        """The rows of a request: those of ``StepVerified.generate`` for its prompts, each repeated n times in place.

        The generator is ``torch.Generator().manual_seed(seed)``, so the same call offline gives the same tokens.
        """
        decoder = self.served.decoder
        rows = [prompt.ids for prompt in prompts for _ in range(asked.n)]
        limit = self.served.context - max(map(len, rows)) if asked.max_tokens is None else asked.max_tokens
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

    def _answer(self, asked: Asked, prompts: Sequence[Prompt], rows: Sequence[Row], seed: int) -> Answer:
        config = rows[0].config
        chat = isinstance(asked, ChatAsked)
        echoes = [prompt.text for prompt in prompts for _ in range(asked.n)]
        tokenizer = self.served.decoder.tokenizer
        return Answer(
            chat=chat,
            model=self.served.name,
            seed=seed,
            policy=config.policy,
            prompts=[len(prompt.ids) for prompt in prompts],
            texts=[
                OutputText(tokenizer, stops=asked.stop, continues=prompt.continued)
                for prompt in prompts
                for _ in range(asked.n)
            ],
            echoes=echoes if isinstance(asked, CompletionAsked) and asked.echo else [],
            stepwise=config.drafts,
            calibrated=self.served.covered(config, rows[0].sampling),
            fingerprint=self.served.fingerprint,
        )

    def _gauges(self) -> list[Gauges]:
        held = self.scheduler.occupancy
        return [
            Gauges("telltale_rowslive", "Rows that are being decoded.", lambda: {"": held().rows}),
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
