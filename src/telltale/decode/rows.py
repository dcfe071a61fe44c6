"""One prompt on its way: what has been committed, how it goes on, and random numbers of its own.

A row's numbers depend on its seed alone. Which other rows are decoded at the time, and in how many pieces the prompt is read,
changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from telltale.decode.drafting import Plan
from telltale.decode.model_state import Part
from telltale.decode.ngrams import NgramIndex
from telltale.decode.results import DecodeStatistics, StepRecord
from telltale.decode.sampling import Sampling
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.stopping import StopConditions
from telltale.errors import NumericalError

Result = TypeVar("Result")


@dataclass
class SharedPrompt:
    """A prompt that several rows of one request have: one of them reads it, the others take over what the models made of it.

    It lives as long as a row that refers to it, and so do the keys and values that it keeps.
    """

    reader: int = -1
    """The number of the row that reads it."""
    read: dict[int, Part] = field(default_factory=dict)
    """What each of the engine's states, by its place, has made of the whole prompt."""


@dataclass
class Scoring:
    """What the target makes of a row's prompt, token by token from place ``start`` (at least 1): a row that is only read.

    Nats, of the raw distribution. ``chosen`` has the prompt's own tokens, ``best`` the ``top`` most likely ones at each place.
    """

    start: int
    top: int = 0
    chosen: list[float] = field(default_factory=list)
    best: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Take the next ``tokens``, T of them, with the logits (T, vocabulary) before each."""
        # Sums over long texts show the rounding of a normaliser in float32.
        values = logits.double().log_softmax(-1)
        own = torch.tensor(list(tokens), device=values.device).unsqueeze(-1)
        self.chosen += values.gather(-1, own).squeeze(-1).tolist()
        found = values.topk(min(self.top, values.shape[-1]), dim=-1)
        for ids, numbers in zip(found.indices.tolist(), found.values.tolist(), strict=True):
            self.best.append(list(zip(ids, numbers, strict=True)))


class Row:
    """The state of one output. How it is decoded: ``config`` with drafts is step by step, ``plan`` is token-level speculation,
    and a row with neither is decoded plainly."""

    def __init__(
        self,
        prompt: list[int],
        stopping: StopConditions,
        sampling: Sampling,
        *,
        config: StepVerifiedConfig | None = None,
        plan: Plan | None = None,
        seed: int = 0,
        seen_by_processors: list[int] | None = None,
        stats: Any = None,
        shared: SharedPrompt | None = None,
    ) -> None:
        self.prompt = prompt
        self.stopping = stopping
        self.sampling = sampling
        self.plan = plan
        self.seed = seed
        self.seen_by_processors = prompt if seen_by_processors is None else seen_by_processors
        """The prompt as logits processors see it; the prompt itself unless padding must be kept."""
        self.stats: Any = DecodeStatistics() if stats is None else stats
        self.shared = shared
        """What rows of the same prompt and configuration have in common; None if there is no other."""
        self.scoring: Scoring | None = None
        """What is to be found out about the prompt, by a row that is only read; None for one that is decoded."""
        self.reused_tokens = 0
        """Tokens of the prompt that the target has taken over from another row instead of reading them."""
        self.cached_tokens = 0
        """Of these, the ones that came from the cache of prefixes."""
        self.number = -1
        """Its number in the engine that has admitted it."""
        self.slot = -1
        """Its place in the caches."""
        self.tokens: list[int] = []
        """The output so far, the tokens of an open step included."""
        self.step_start = 0
        """Where the open step begins in ``tokens``."""
        self.reason: str | None = None
        """Why the output ended; None while it goes on."""
        self.steps: list[StepRecord] = []
        self.rejected: StepRecord | None = None
        """The draft that the target is redoing."""
        self.redoing = False
        """Whether the next step is the target's."""
        self.repeats = 1
        self.history: dict[str, list[float]] = {}
        """Signals of the steps so far, for running extremes."""
        self.ngrams: NgramIndex | None = None
        self.rereads_at: int | None = None
        """The position before which all is read anew once there is a token (:attr:`Decoder.rereads_at`); None from then on."""
        self.greedy = sampling.temperature == 0.0
        """Whether every token is the most likely one."""
        self.failure: NumericalError | None = None
        """Why it cannot go on; the engine ends it with the turn, and no other row."""
        self.beside: Scoring | None = None
        """Its output's log-probabilities, read while it is decoded; None if they are not wanted then."""
        self.scored = 0
        """Tokens of the output whose log-probabilities have been given out."""
        self.beside_slot = -1
        """The place in the caches where they are read."""
        self._generators: dict[str, torch.Generator] = {}
        self._config = config
        self.by_steps = config is not None and config.drafts
        """Whether steps are drafted, verified and redone."""

    @property
    def config(self) -> StepVerifiedConfig:
        """How steps are decoded."""
        assert self._config is not None
        return self._config

    @property
    def length(self) -> int:
        """Tokens so far, the prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def open_step(self) -> list[int]:
        """Tokens of the step that is being written."""
        return self.tokens[self.step_start :]

    @property
    def remaining(self) -> int:
        """Tokens that the output may still get."""
        return self.stopping.limit - len(self.tokens)

    @property
    def draftable(self) -> int:
        """Tokens that may be drafted now: behind the last token of an output none, and none across ``rereads_at``."""
        most = self.remaining - 1
        if self.rereads_at is not None and self.length <= self.rereads_at:
            most = min(most, self.rereads_at - self.length)
        return most

    def fail(self, error: NumericalError) -> None:
        """End with the turn, for the first reason that there is."""
        self.failure = self.failure or error

    def take_scores(self, count: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """Log-probability and most likely ones of each of the next ``count`` tokens; nothing if they are not wanted."""
        if self.beside is None:
            return []
        begin, self.scored = self.scored, self.scored + count
        own = self.beside
        return list(zip(own.chosen[begin : self.scored], own.best[begin : self.scored], strict=True))

    def drafted_from(self, position: int) -> int:
        """How many of the tokens of whole steps from ``position`` on the draft wrote."""
        count, stop = 0, len(self.prompt) + self.step_start
        for step in reversed(self.steps):
            if stop <= position:
                break
            start = stop - len(step.tokens)
            if step.source == "draft":
                count += stop - max(start, position)
            stop = start
        return count

    def tokens_from(self, position: int) -> list[int]:
        """Tokens from ``position`` on, counted from the prompt's first."""
        count = len(self.prompt)
        return self.tokens[position - count :] if position >= count else self.prompt[position:] + self.tokens

    def prefix(self, more: Sequence[int] = ()) -> list[int]:
        """All tokens before the next one, as logits processors see them."""
        return [*self.seen_by_processors, *self.tokens, *more]

    def uniforms(self, role: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), float64 on the CPU, from the row's stream of one ``role``."""
        generator = self._generators.get(role)
        if generator is None:
            generator = self._generators[role] = torch.Generator().manual_seed(_digest(f"{self.seed} {role}"))
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    def numbers(self, role: str, count: int) -> list[float]:
        """``count`` numbers of :meth:`uniforms`; zeros if the row is greedy, which uses none up."""
        return [0.0] * count if self.greedy or not count else self.uniforms(role, count).tolist()


def row_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each prompt that depends on the prompt, not on its place; equal prompts get different ones."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        again = seen.get(key, 0)
        seen[key] = again + 1
        found.append(_digest(f"{seed} {again} {list(key)}"))
    return found


def refuse_no_distribution(logits: Tensor, rows: Sequence[Row], role: str) -> Tensor:
    """``logits`` (m, vocabulary), of one row each, with zeros for those that have no distribution; their rows fail.

    The argmax of NaN would be a token like any other, and so would an overflow to infinity. A logit of -inf is a token that
    cannot be, as long as not all are. A row that fails gets an :attr:`Row.failure` and ends with the turn; the others go on.
    """
    # The largest is NaN if one is, +inf if one is, and -inf if all are.
    bad = ~torch.isfinite(logits.amax(-1))
    if not bool(bad.any()):
        return logits
    for place in bad.nonzero().view(-1).tolist():
        what = "NaN" if bool(logits[place].isnan().any()) else "infinite"
        rows[place].fail(no_distribution(rows[place : place + 1], role, what))
    return logits.masked_fill(bad.unsqueeze(-1), 0.0)


def attempted(
    row: Row, role: str, choice: Callable[..., Result], *arguments: Any, otherwise: Result, **options: Any
) -> Result:
    """``choice(*arguments, **options)`` for one row; if it refuses the logits, the row fails and this is ``otherwise``."""
    try:
        return choice(*arguments, **options)
    except NumericalError:
        row.fail(no_distribution([row], role, "NaN or infinite"))
        return otherwise


def distribution_of(
    sampling: Sampling, logits: Tensor, rows: Sequence[Row], prefixes: Sequence[Sequence[int]]
) -> Tensor:
    """``sampling.distribution``; a row whose processors leave no token fails, and gets any distribution."""
    try:
        return sampling.distribution(logits, prefixes)
    except NumericalError as error:
        if len(rows) == 1:
            rows[0].fail(error)
            return torch.full_like(logits, 1.0 / logits.shape[-1], dtype=torch.float32)
    alone = [
        distribution_of(sampling, logits[place : place + 1], rows[place : place + 1], prefixes[place : place + 1])
        for place in range(len(rows))
    ]
    return torch.cat(alone)


def no_distribution(rows: Sequence[Row], role: str, what: str) -> NumericalError:
    """The error of logits that are ``what``, of the model in this ``role``, for one of ``rows``."""
    places = " or ".join(f"step {len(row.steps)} of prompt {row.number}" for row in rows[:3])
    return NumericalError(
        f"the {role}'s logits are {what} in {places}{' or later ones' if len(rows) > 3 else ''}; expected finite numbers. Check "
        f"the checkpoint's weights."
    )


def _digest(text: str) -> int:
    # torch keeps 32 bits of a CPU generator's seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
