"""What drafts cost and save on this machine: measurements beside what the cost models say, for early exits and verified steps.

:func:`sweep` runs every exit with every draft length, the plain decoder between the points, so that a drift of the machine
affects both terms of each ratio; :func:`tune` chooses what a server drafts with, and checks the choice by running it against
plain decoding. The verdict on a checkpoint is in ``diagnose``. :func:`measure_costs` is the latency model of a step: time is
counted in target decode passes, a step of T tokens costs T rho sigma_D to draft, v T to score, and (1 - pi) T sigma_T to
redo, so that decoding is 1 / (rho sigma_D + v + (1 - pi) sigma_T) times as fast as the target alone. It does not measure
quality, which is the task of calibration.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_integer, check_range
from telltale.decode.decoders import Autoregressive, SelfSpeculative, StepVerified
from telltale.decode.model_state import LateLayersState, ModelState, PassInput
from telltale.decode.pass_costs import PassCosts, clock_of, costs_of
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder
from telltale.models.exits import ExitQuality, draft_acceptance, exit_quality
from telltale.models.open import open_decoder
from telltale.runs.files import write_atomically

LONGEST_DRAFT = 12
GOAL = 1.3
"""The speed-up that a bound is stated for."""
WORTH_IT = 1.05
"""Predicted speed-up from which the verdict is yes."""
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)
STEP_REPEATS = 7
TUNING_ROWS = 4
"""Texts of the warm-up, and rows that are timed together."""
TUNING_TOKENS = 64
"""Tokens of each text."""
TIMED_TOKENS = 32
"""Tokens of each row that are timed."""
TUNING_REPEATS = 4
"""Timings of each contestant, in turn; the best counts, since other work on the machine only ever adds."""
TUNING_SECONDS = 10.0
"""Seconds of timing after which no repeat begins: a large model is measured once."""


def expected_acceptance(acceptance: Sequence[float], draft_length: int) -> float:
    """Accepted part of d drafts if draft i is accepted with ``acceptance[i]`` once those before it are; the last number holds for
    all later drafts."""
    standing, accepted = 1.0, 0.0
    for position in range(draft_length):
        standing *= acceptance[min(position, len(acceptance) - 1)]
        accepted += standing
    return accepted / draft_length if draft_length else 0.0


@dataclass(frozen=True)
class DraftBound:
    """What is known before an exit is trained. ``cost``: a draft step over a plain token; ``needed``: the acceptance of every
    draft at which the best draft length gives :data:`GOAL`, None where no acceptance does."""

    exit_layer: int
    cost: float
    needed: float | None


def draft_bound(costs: PassCosts, exit_layer: int) -> DraftBound:
    """The bound of drafting at ``exit_layer``, from measured pass costs."""
    cost = (costs.draft(exit_layer, 2) - costs.draft(exit_layer, 1)) / costs.plain
    rates = (percent / 100 for percent in range(1, 101))
    return DraftBound(
        exit_layer, cost, next((rate for rate in rates if best_draft(costs, exit_layer, [rate])[0] >= GOAL), None)
    )


def best_draft(costs: PassCosts, exit_layer: int, acceptance: Sequence[float]) -> tuple[float, int]:
    """The highest speed-up over plain decoding, and its draft length, of an exit with this :func:`expected_acceptance`."""
    return max(
        (costs.speedup(exit_layer, length, expected_acceptance(acceptance, length)), length)
        for length in range(1, LONGEST_DRAFT + 1)
    )


@dataclass(frozen=True)
class SweepPoint:
    """One exit layer and draft length. Rates are tokens per second of CPU time; speed-ups are over plain decoding."""

    exit_layer: int
    draft_length: int
    acceptance_rate: float
    tokens_per_verify: float
    tokens_per_second: float
    speedup: float
    predicted_speedup: float


@dataclass(frozen=True)
class Sweep:
    """All points, what plain decoding does on the same prompts, and the measured pass costs behind the predictions."""

    points: list[SweepPoint]
    plain_tokens_per_second: float
    costs: PassCosts

    @property
    def best(self) -> SweepPoint:
        """The fastest point measured."""
        return max(self.points, key=lambda point: point.speedup)

    def write_csv(self, path: str | Path) -> None:
        """Write the points as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(SweepPoint)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.points)
        write_atomically(path, text.getvalue())


def sweep(
    model: nn.Module | Decoder,
    prompts: Sequence[Tensor],
    *,
    exit_layers: Sequence[int] | None = None,
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
    new_tokens: int = 64,
    rounds: int = 3,
    on_point: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Measure self-speculation (greedy) on ``prompts``, 1-D token tensors, ``new_tokens`` each.

    ``exit_layers`` None takes all, 1..L-1. A point's speed-up is the median over ``rounds`` of its ratio to the plain
    run beside it. ``on_point(done, total)`` is called after each point.
    Raises :class:`~telltale.errors.ConfigError` if there is no prompt or an exit layer is out of range.
    """
    if not prompts:
        raise ConfigError("prompts is empty; expected at least one prompt to decode.")
    if not draft_lengths or (exit_layers is not None and not exit_layers):
        raise ConfigError("there is nothing to sweep; expected at least one exit layer and one draft length.")
    decoder = model if isinstance(model, Decoder) else open_decoder(model)
    costs = costs_of(decoder, 1)
    plain = Autoregressive(decoder)
    decoder.open_draft_exits()
    exits = list(exit_layers) if exit_layers is not None else decoder.drafting_exits
    if not exits:
        raise ConfigError("the model has one layer, so no early exit to sweep.")
    pairs = [(exit_layer, length) for exit_layer in exits for length in draft_lengths]
    points, plain_seconds = [], []
    total_tokens = len(prompts) * new_tokens
    for done, (exit_layer, length) in enumerate(pairs, start=1):
        speculative = SelfSpeculative(decoder, exit_layer=exit_layer, draft_length=length)
        seconds, ratios = [], []
        drafted = accepted = passes = 0
        for round_index in range(rounds + 1):
            base = _plain_seconds(plain, prompts, new_tokens)
            began = time.process_time()
            results = [speculative.generate(p, max_new_tokens=new_tokens, eos_token_id=[]) for p in prompts]
            spent = time.process_time() - began
            if round_index == 0:
                drafted = sum(result.stats.drafted for result in results)
                accepted = sum(result.stats.accepted for result in results)
                passes = sum(result.stats.rounds + result.stats.plain_steps for result in results)
                continue
            seconds.append(spent)
            ratios.append(base / spent)
            plain_seconds.append(base)
        rate = accepted / drafted if drafted else 0.0
        points.append(
            SweepPoint(
                exit_layer=exit_layer,
                draft_length=length,
                acceptance_rate=rate,
                tokens_per_verify=(accepted + passes) / passes if passes else 0.0,
                tokens_per_second=total_tokens / statistics.median(seconds),
                speedup=statistics.median(ratios),
                predicted_speedup=costs.speedup(exit_layer, length, rate),
            )
        )
        if on_point is not None:
            on_point(done, len(pairs))
    return Sweep(points, total_tokens / statistics.median(plain_seconds), costs)


def _plain_seconds(plain: Autoregressive, prompts: Sequence[Tensor], new_tokens: int) -> float:
    began = time.process_time()
    for prompt in prompts:
        plain.generate(prompt, max_new_tokens=new_tokens, eos_token_id=[])
    return time.process_time() - began


@dataclass(frozen=True)
class Tuned:
    """The chosen exit and draft length, the speed-up over plain decoding that was predicted and measured, and on what."""

    exit_layer: int
    draft_length: int
    agreement: float
    predicted: float
    measured: float
    tokens: int

    @property
    def pays(self) -> bool:
        """Whether drafting was measured to be faster than plain decoding."""
        return self.measured >= WORTH_IT

    def describe(self) -> str:
        """The choice and its reasons, in words."""
        return (
            f"exit layer {self.exit_layer} with drafts of {self.draft_length}: agrees on {self.agreement:.0%} of {self.tokens} "
            f"tokens of the model's own text, {self.predicted:.2f}x plain decoding predicted, {self.measured:.2f}x measured"
        )


def tune(decoder: Decoder, tokenizer: Any, *, exit_layer: int | None = None, draft_length: int | None = None) -> Tuned:
    """Choose what is None, for the model behind ``decoder``; greedy, with ``TUNING_ROWS`` rows at a time.

    Raises :class:`~telltale.errors.ConfigError` for a model with a single layer or an exit that it does not have.
    """
    if decoder.layers < 2:
        raise ConfigError("the model has a single layer, so no layer can draft; use --decode autoregressive.")
    if exit_layer is not None and not 1 <= exit_layer < decoder.layers:
        raise ConfigError(f"exit_layer={exit_layer} is out of range; expected 1..{decoder.layers - 1}.")
    prompts = _beginnings(decoder, tokenizer)
    texts = _own_text(decoder, prompts)
    decoder.open_draft_exits()
    quality = exit_quality(decoder.model, texts)
    acceptance = exit_acceptance(decoder, quality, texts)
    costs = costs_of(decoder, TUNING_ROWS)
    exits = decoder.drafting_exits if exit_layer is None else [exit_layer]
    lengths = range(1, LONGEST_DRAFT + 1) if draft_length is None else [draft_length]

    def predicted(layer: int, length: int) -> float:
        return costs.speedup(layer, length, expected_acceptance(acceptance[layer], length))

    _, chosen, best = max((predicted(layer, length), layer, length) for layer in exits for length in lengths)
    # The cost of a wide pass is the hardest to predict, so a shorter draft is tried too.
    contestants = [best] if draft_length is not None else sorted({best, (best + 1) // 2})
    measured, length = max(zip(_measured(decoder, prompts, chosen, contestants), contestants, strict=True))
    return Tuned(
        exit_layer=chosen,
        draft_length=length,
        agreement=acceptance[chosen][0],
        predicted=predicted(chosen, length),
        measured=measured,
        tokens=quality.tokens,
    )


def exit_acceptance(decoder: Decoder, quality: ExitQuality, batches: Iterable[Tensor]) -> dict[int, list[float]]:
    """By exit and draft step how often a draft is the last layer's token: a draft exit's as ``batches`` show it, any other's as it
    agrees in ``quality``."""
    plain = {layer: [share] for layer, share in enumerate(quality.agreement[:-1], 1)}
    return plain | draft_acceptance(decoder, batches)


def _beginnings(decoder: Decoder, tokenizer: Any) -> list[list[int]]:
    """Short prompts that differ: the tokenizer's beginning of a text, if it has one, and an ordinary token."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    start = getattr(tokenizer, "bos_token_id", None)
    first = [] if start is None else [int(start)]
    # Spread over the vocabulary, the same ones each time.
    return [[*first, ordinary[(2 * place + 1) * len(ordinary) // (2 * TUNING_ROWS)]] for place in range(TUNING_ROWS)]


def _own_text(decoder: Decoder, prompts: list[list[int]]) -> list[Tensor]:
    """What the model writes behind each prompt, greedily, as batches of one row."""
    room = min(TUNING_TOKENS, decoder.max_positions - max(map(len, prompts)))
    result = Autoregressive(decoder).generate(prompts, max_new_tokens=room, eos_token_id=[])
    rows = zip(prompts, result.tokens.tolist(), result.lengths.tolist(), strict=True)
    return [torch.tensor([[*prompt, *tokens[:length]]], device=decoder.device) for prompt, tokens, length in rows]


def _measured(decoder: Decoder, prompts: list[list[int]], exit_layer: int, lengths: Sequence[int]) -> list[float]:
    """Speed of each draft length over plain decoding."""
    contestants = [Autoregressive(decoder), *(SelfSpeculative(decoder, exit_layer, length) for length in lengths)]
    count = min(TIMED_TOKENS, decoder.max_positions - max(map(len, prompts)))
    runs = [partial(one.generate, prompts, max_new_tokens=count, eos_token_id=[]) for one in contestants]
    best = shortest_seconds(decoder, runs)
    return [best[0] / max(own, 1e-9) for own in best[1:]]


def shortest_seconds(decoder: Decoder, runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The shortest time of each run over a few repeats in turn: other work on the machine only ever adds."""
    best = [float("inf")] * len(runs)
    clock, begun = clock_of(decoder), time.monotonic()
    for repeat in range(TUNING_REPEATS):
        if repeat and time.monotonic() - begun > TUNING_SECONDS:
            break
        for place, run in enumerate(runs):
            started = clock()
            run()
            best[place] = min(best[place], clock() - started)
    return best


@dataclass(frozen=True)
class StepCosts:
    """PassCosts of a step's parts in units of the target decoding the step alone, one token a pass."""

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
def measure_costs(decoder: StepVerified, *, prompt_tokens: int = 256, step_tokens: int = 24) -> StepCosts:
    """Time the parts of a step of ``decoder`` on this machine, seconds of wall time, medians of a few interleaved repeats.

    Tokens are arbitrary: costs do not depend on them. Raises :class:`~telltale.errors.ConfigError` for sizes that the models
    have no positions for.
    """
    check_integer("prompt_tokens", prompt_tokens, low=1)
    check_integer("step_tokens", step_tokens, low=1)
    engine = decoder.engine(slots=1)
    config = decoder.config
    candidates = config.samples(greedy=False)
    again = candidates if config.fallback == "k-sample" else 1
    states = {"target": engine.target} | ({} if engine.draft is None else {"draft": engine.draft})
    for state in states.values():
        state.decoder.check_capacity(prompt_tokens + step_tokens)
    for state in reversed(states.values()):
        state.prefill([PassInput(0, [1] * prompt_tokens)])
    times: dict[str, list[float]] = {}
    for repeat in range(STEP_REPEATS + 1):
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


def _decoded(state: ModelState, length: int, tokens: int, candidates: int) -> float:
    """Seconds to write a step of each of ``candidates`` token by token, the head included; leaves no trace."""
    last_hidden = state.rows[0].last_hidden
    assert last_hidden is not None
    started = time.perf_counter()
    if candidates == 1:
        newest = last_hidden
        for _ in range(tokens):
            state.head(newest.unsqueeze(0)).argmax(-1)
            newest = state.feed([PassInput(0, [1])])[0].states[-1]
        seconds = time.perf_counter() - started
        state.truncate(0, length, last_hidden)
        below = state.lower if isinstance(state, LateLayersState) else None
        if below is not None:
            below.truncate(0, length, below.rows[0].last_hidden)
        return seconds
    branches = state.branch(0, candidates)
    states = last_hidden.expand(candidates, -1)
    for _ in range(tokens):
        state.head(states).argmax(-1)
        states = torch.stack([one.states[-1] for one in state.grow(branches, [1] * candidates, None)])
    seconds = time.perf_counter() - started
    state.free(branches)
    return seconds


def _scored(state: ModelState, length: int, tokens: int, *, attention: bool) -> float:
    """Seconds of the target's pass over a step."""
    last_hidden = state.rows[0].last_hidden
    below = state.lower if isinstance(state, LateLayersState) else None
    if below is not None:  # the draft has left its states there
        below.feed([PassInput(0, [1] * tokens)])
    started = time.perf_counter()
    passed = state.feed([PassInput(0, [1] * tokens, length if attention else None)])
    state.head(passed[0].states)
    seconds = time.perf_counter() - started
    state.truncate(0, length, last_hidden)
    if below is not None:
        below.truncate(0, length, below.rows[0].last_hidden)
    return seconds
