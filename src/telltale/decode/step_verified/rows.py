"""One prompt on its way: what has been committed, what is proposed, and random numbers of its own.

A row's numbers depend on its seed alone. Who else is decoded at the time, and in how many pieces it is read, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from telltale.decode.sampling import Sampling
from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.ends import Ends
from telltale.decode.step_verified.records import StepRecord, StepVerifiedStatistics
from telltale.errors import NumericalError

if TYPE_CHECKING:
    from telltale.decode.step_verified.proposals import Proposal

ROLES = ("draft", "target", "policy")


@dataclass
class Job:
    """One prompt to be continued."""

    prompt: list[int]
    ends: Ends
    sampling: Sampling
    config: StepVerifiedConfig
    seed: int = 0
    seen_by_processors: list[int] = field(default_factory=list)
    """The prompt as logits processors see it; the prompt itself unless padding must be kept."""

    def __post_init__(self) -> None:
        if not self.seen_by_processors:
            self.seen_by_processors = self.prompt

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.sampling.temperature == 0.0


class Row:
    """The state of a job under way. ``proposal`` is what is being drafted or redone, None between steps."""

    def __init__(self, number: int, slot: int, job: Job) -> None:
        self.number = number
        self.slot = slot
        self.job = job
        self.tokens: list[int] = []
        """Committed, the prompt not included."""
        self.reason: str | None = None
        """Why the output ended; None while it goes on."""
        self.steps: list[StepRecord] = []
        self.stats = StepVerifiedStatistics(calibrated=job.config.normaliser.fitted)
        self.proposal: Proposal | None = None
        self.rejected: StepRecord | None = None
        """The draft that the target is redoing."""
        self.fallback = False
        """Whether the next step is the target's."""
        self.open_step: list[int] = []
        """Tokens of the step that is being written token by token."""
        self.repeats = 1
        self.history: dict[str, list[float]] = {}
        """Signals of the steps so far, for running extremes."""
        self._generators = {role: _generator(job.seed, role) for role in ROLES}

    @property
    def config(self) -> StepVerifiedConfig:
        """The job's configuration."""
        return self.job.config

    @property
    def length(self) -> int:
        """Committed tokens, the prompt included."""
        return len(self.job.prompt) + len(self.tokens)

    def drafted_from(self, position: int) -> int:
        """How many of the committed tokens from ``position`` on the draft wrote."""
        count, stop = 0, self.length
        for step in reversed(self.steps):
            if stop <= position:
                break
            start = stop - len(step.tokens)
            if step.source == "draft":
                count += stop - max(start, position)
            stop = start
        return count

    def committed_from(self, position: int) -> list[int]:
        """Committed tokens from ``position`` on, counted from the prompt's first."""
        prompt = self.job.prompt
        if position >= len(prompt):
            return self.tokens[position - len(prompt) :]
        return prompt[position:] + self.tokens

    def prefix(self, step: Sequence[int]) -> list[int]:
        """All tokens before the next one, as logits processors see them."""
        return [*self.job.seen_by_processors, *self.tokens, *step]

    def uniforms(self, role: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), float64 on the CPU, from the stream of one role."""
        return torch.rand(*shape, dtype=torch.float64, generator=self._generators[role])

    def remaining(self) -> int:
        """Tokens that the output may still get."""
        return self.job.ends.limit - len(self.tokens)

    def with_config(self, **changes: object) -> None:
        """Change the configuration of what is still to come."""
        self.job.config = replace(self.job.config, **changes)  # type: ignore[arg-type]


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


def refuse_no_distribution(logits: Tensor, rows: Sequence[Row], role: str) -> None:
    """Raise :class:`~telltale.errors.NumericalError` for ``logits`` (m, vocabulary), of one row each, that have no distribution.

    The argmax of NaN would be a token like any other, and so would an overflow to infinity. A logit of -inf is a token that
    cannot be, as long as not all are.
    """
    # The largest is NaN if one is, +inf if one is, and -inf if all are.
    bad = ~torch.isfinite(logits.amax(-1))
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        row, what = rows[place], "NaN" if bool(torch.isnan(logits[place]).any()) else "infinite"
        raise NumericalError(
            f"the {role}'s logits are {what} in step {len(row.steps)} of prompt {row.number}; expected finite numbers. Check "
            f"the checkpoint's weights."
        )


def _generator(seed: int, role: str) -> torch.Generator:
    return torch.Generator().manual_seed(_digest(f"{seed} {role}"))


def _digest(text: str) -> int:
    # torch keeps 32 bits of a CPU generator's seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
