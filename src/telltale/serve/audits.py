"""Audits of a served guard's accepted steps: by a checker, which knows wrong ones, or by the target, which may only disagree.

Steps are drawn when an output ends (:mod:`telltale.decode.calibration.monitor`). The target's audits are rows like any other,
behind those that wait; when the server is full they are left out. Neither prompts nor steps are kept or logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from telltale.decode.calibration.monitor import Draw, GuardMonitor
from telltale.decode.request import checked_request
from telltale.decode.rows import Row
from telltale.decode.verification import Step
from telltale.serve.http_errors import ApiError, where
from telltale.serve.metrics import Gauges
from telltale.serve.open_model import ServedModel
from telltale.serve.scheduler import Scheduler

Checker = Callable[[Step], bool | None]
"""Whether a step is right; None if that cannot be said. Called on a thread of its own."""
WAITING = 64
"""Audits that may wait; of more, the newest are left out."""
_log = logging.getLogger("telltale.serve")


@dataclass(frozen=True)
class _Drawn:
    """A step to be audited."""

    prompt: list[int]
    before: list[int]
    tokens: list[int]
    texts: tuple[str, ...]
    draw: Draw


class Audits:
    """Runs the audits of ``monitor`` on ``scheduler``. Use it inside ``async with``.

    ``checker`` finds wrong steps, for the kind "wrong"; without one the target writes each step again.
    """

    def __init__(
        self, served: ServedModel, scheduler: Scheduler, monitor: GuardMonitor, checker: Checker | None = None
    ) -> None:
        self.served = served
        self.scheduler = scheduler
        self.monitor = monitor
        self.checker = checker
        self._queue: asyncio.Queue[_Drawn] = asyncio.Queue(WAITING)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Audits:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._work())
        self.scheduler.on_output = self.offer
        return self

    async def __aexit__(self, *_: object) -> None:
        self.scheduler.on_output = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def offer(self, row: Row) -> None:
        """An output has ended. Only those are drawn from that were decoded as the guard has it, nothing overridden."""
        config, now = row.config, self.monitor.threshold
        own = self.served.decoder.config
        if now is not None and config.threshold == now:
            config = replace(config, threshold=own.threshold)
        elif now is not None:
            return
        calibrated = self.served.calibration is not None
        if not row.by_steps or not (
            self.served.covered(config, row.sampling, row.prompt) if calibrated else config == own
        ):
            return
        draw = self.monitor.draw(row.steps)
        if draw is None or self._loop is None:
            return
        place = draw.place
        before = [token for step in row.steps[:place] for token in step.tokens]
        texts = tuple(step.text for step in row.steps[: place + 1])
        drawn = _Drawn(row.prompt, before, list(row.steps[place].tokens), texts, draw)
        if self.checker is None and row.steps[place].end == "length":
            # The step was cut: what the target would write cannot be compared.
            self.monitor.skip(draw, failed=False)
            return
        self._loop.call_soon_threadsafe(self._put, drawn)

    def gauges(self) -> list[Gauges]:
        """What ``/metrics`` shows of the audits."""
        monitor, what = self.monitor, "were wrong" if self.monitor.kind == "wrong" else "the target disagreed with"

        def rate() -> dict[str, float]:
            return dict(zip(("lower", "estimate", "upper"), monitor.interval(), strict=True))

        found = [
            Gauges(
                f"telltale_guard_{monitor.kind}_rate",
                f"Share of an output's drafted steps that were accepted and that {what}: 95% confidence sequence.",
                rate,
                "bound",
            ),
            Gauges(
                "telltale_guard_draws", "Steps drawn for audits, by outcome.", lambda: dict(monitor.counts), "outcome"
            ),
            Gauges(
                "telltale_guard_promise",
                "Whether the calibration's promise stands: 0 after an alarm.",
                lambda: {"": float(monitor.kept)},
            ),
            Gauges(
                "telltale_guard_watched",
                "Whether audits come to an end: 0 while they hang or fail, and then nothing is counted.",
                lambda: {"": float(monitor.watching)},
            ),
            Gauges("telltale_guard_alarms", "Alarms so far.", lambda: {"": monitor.alarms}),
            Gauges(
                "telltale_guard_threshold",
                "The score that steps must reach.",
                lambda: {"": self.served.decoder.config.threshold if monitor.threshold is None else monitor.threshold},
            ),
        ]
        if monitor.limit is not None:
            limit = monitor.limit
            found += [
                Gauges("telltale_guard_limit", "The rate that was promised, at most.", lambda: {"": limit}),
                Gauges(
                    "telltale_guard_evidence",
                    f"Wealth of a bet against the promise; an alarm at {1 / monitor.level:g}, at twice that with --on-drift raise.",
                    lambda: {"": monitor.evidence},
                ),
            ]
        return found

    def _put(self, drawn: _Drawn) -> None:
        try:
            self._queue.put_nowait(drawn)
        except asyncio.QueueFull:
            self.monitor.skip(drawn.draw)

    async def _work(self) -> None:
        while True:
            drawn = await self._queue.get()
            try:
                bad = await (self._disagrees(drawn) if self.checker is None else self._wrong(drawn))
            except ApiError:
                # The server is full or ends: an audit is no reason to refuse anybody.
                self.monitor.skip(drawn.draw)
            except Exception as error:
                _log.error("an audit failed: %s", where(error))
                self.monitor.skip(drawn.draw)
            else:
                self.monitor.record(bad, of=drawn.draw)

    async def _wrong(self, drawn: _Drawn) -> bool | None:
        assert self.checker is not None
        read = self.served.decoder.steps_text.text
        step = Step(
            prompt=drawn.prompt,
            before=drawn.before,
            tokens=drawn.tokens,
            prompt_text=read(drawn.prompt),
            before_text=read(drawn.before),
            text=drawn.texts[-1],
            number=drawn.draw.place,
            accepted=drawn.texts[:-1],
        )
        right = await asyncio.to_thread(self.checker, step)
        return None if right is None else not right

    async def _disagrees(self, drawn: _Drawn) -> bool:
        """Whether the target, greedily, writes another step at this place; white space does not count."""
        decoder = self.served.decoder
        config = replace(decoder.config, policy="target")
        prompt = [*drawn.prompt, *drawn.before]
        limit = min(config.max_step_tokens, self.served.context - len(prompt))
        request = checked_request(
            decoder.target,
            [prompt],
            max_new_tokens=limit,
            stop_strings=config.delimiter,
            eos_token_id=self.served.eos,
            tokenizer=decoder.tokenizer,
        )
        self.scheduler.reserve(1)
        try:
            handle = self.scheduler.submit(decoder.rows(request, config), counted=False)
        except BaseException:
            self.scheduler.release(1)
            raise
        tokens: list[int] = []
        try:
            async for event in handle:
                if event.failure is not None:
                    raise event.failure
                tokens += event.tokens
        finally:
            handle.close()
        end = "eos" if tokens and tokens[-1] in self.served.eos else None
        return decoder.steps_text.step(tokens, end).split() != drawn.texts[-1].split()
