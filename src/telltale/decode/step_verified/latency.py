"""When does step verification pay? The latency model of a step, with costs measured on this machine for these two models.

Time is counted in target decode passes. A step of T tokens costs T rho sigma_D to draft, v T to score, and (1 - pi) T sigma_T to
redo, so that decoding is 1 / (rho sigma_D + v + (1 - pi) sigma_T) times as fast as the target alone. The model knows nothing of
quality: what the accepted steps are worth is a matter of calibration.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from telltale.config import check_integer, check_range
from telltale.decode.step_verified.decoder import StepVerified
from telltale.decode.step_verified.passes import Work
from telltale.decode.step_verified.sides import Side

REPEATS = 7


@dataclass(frozen=True)
class StepCosts:
    """Costs of a step's parts in units of the target decoding the step alone, one token a pass."""

    draft: float
    """rho: one candidate."""
    draft_inflation: float
    """sigma_D: all candidates together, over one."""
    verify: float
    """v: the target's pass over the step; 0 if the target does not score."""
    fallback_inflation: float
    """sigma_T: the target's candidates together, over one."""
    target_seconds: float = float("nan")
    """The unit: seconds for the target to decode the step."""

    def speedup(self, acceptance_rate: float) -> float:
        """How many times faster than the target alone, for a share of accepted steps in [0, 1]."""
        check_range("acceptance_rate", acceptance_rate, low=0.0, high=1.0)
        spent = self.draft * self.draft_inflation + self.verify + (1.0 - acceptance_rate) * self.fallback_inflation
        return 1.0 / spent

    @property
    def break_even(self) -> float:
        """The share of accepted steps from which it pays; above 1 it never does."""
        return 1.0 - (1.0 - self.draft * self.draft_inflation - self.verify) / self.fallback_inflation


@torch.inference_mode()
def measure_costs(guard: StepVerified, *, prompt_tokens: int = 256, step_tokens: int = 24) -> StepCosts:
    """Time the parts of a step of ``guard`` on this machine, seconds of wall time, medians of a few interleaved repeats.

    Tokens are arbitrary: costs do not depend on them. Raises :class:`~telltale.errors.ConfigError` for sizes that the models
    have no positions for.
    """
    check_integer("prompt_tokens", prompt_tokens, low=1)
    check_integer("step_tokens", step_tokens, low=1)
    engine = guard.engine(slots=1)
    config = guard.config
    candidates = config.samples(greedy=False)
    again = candidates if config.fallback == "k-sample" else 1
    sides = {"target": engine.target} | ({} if engine.draft is None else {"draft": engine.draft})
    for side in sides.values():
        side.decoder.check_capacity(prompt_tokens + step_tokens)
    for side in reversed(sides.values()):
        side.prefill(0, [1] * prompt_tokens)
    times: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):
        found = {"target": _decoded(engine.target, prompt_tokens, step_tokens, 1)}
        if again > 1:
            found["target, candidates"] = _decoded(engine.target, prompt_tokens, step_tokens, again)
        if engine.draft is not None:
            found["draft"] = _decoded(engine.draft, prompt_tokens, step_tokens, 1)
            if candidates > 1:
                found["draft, candidates"] = _decoded(engine.draft, prompt_tokens, step_tokens, candidates)
        if config.target_scores:
            found["score"] = _scored(engine.target, prompt_tokens, step_tokens, attention=config.reads_grounding)
        if repeat:
            for name, seconds in found.items():
                times.setdefault(name, []).append(seconds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    unit, draft = middle["target"], middle.get("draft", 0.0)
    return StepCosts(
        draft=draft / unit,
        draft_inflation=middle["draft, candidates"] / draft if "draft, candidates" in middle else 1.0,
        verify=middle.get("score", 0.0) / unit,
        fallback_inflation=middle.get("target, candidates", unit) / unit,
        target_seconds=unit,
    )


def _decoded(side: Side, length: int, tokens: int, candidates: int) -> float:
    """Seconds to write a step of each of ``candidates`` token by token, the head included; leaves no trace."""
    tail = side.seats[0].tail
    assert tail is not None
    started = time.perf_counter()
    if candidates == 1:
        state = tail
        for _ in range(tokens):
            side.head(state.unsqueeze(0)).argmax(-1)
            state = side.feed([Work(0, [1])])[0].states[-1]
        seconds = time.perf_counter() - started
        side.rewind(0, length, tail)
        below = getattr(side, "lower", None)
        if below is not None:
            below.rewind(0, length, below.seats[0].tail)
        return seconds
    branches = side.branch(0, candidates)
    states = tail.expand(candidates, -1)
    for _ in range(tokens):
        side.head(states).argmax(-1)
        states = torch.stack([one.states[-1] for one in side.grow(branches, [1] * candidates, None)])
    seconds = time.perf_counter() - started
    side.free(branches)
    return seconds


def _scored(side: Side, length: int, tokens: int, *, attention: bool) -> float:
    """Seconds of the target's pass over a step."""
    tail = side.seats[0].tail
    below = getattr(side, "lower", None)
    if below is not None:  # the draft has left its states there
        below.feed([Work(0, [1] * tokens)])
    started = time.perf_counter()
    passed = side.feed([Work(0, [1] * tokens, length if attention else None)])
    side.head(passed[0].states)
    seconds = time.perf_counter() - started
    side.rewind(0, length, tail)
    if below is not None:
        below.rewind(0, length, below.seats[0].tail)
    return seconds
