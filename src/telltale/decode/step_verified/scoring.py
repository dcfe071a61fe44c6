"""From a step's signals to the number that is compared with the threshold.

SpecGuard (arXiv 2604.15244, section 3): r = beta * l~ + (1 - beta) * g~, l the smallest log-probability of the step and g its
smallest grounding, each normalised. A signal that cannot be had is an error here, never a substitute.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.passes import Work
from telltale.decode.step_verified.proposals import groundings_of
from telltale.decode.step_verified.records import Reading
from telltale.decode.step_verified.rows import Row
from telltale.decode.step_verified.sides import Side
from telltale.errors import DataError, NumericalError
from telltale.signals.confidence import entropy, reduced, token_log_probabilities


@dataclass
class Step:
    """A proposed step as verifiers see it: plain ids and text, nothing of caches."""

    prompt: list[int]
    before: list[int]
    """Tokens that have been committed, the prompt not included."""
    tokens: list[int]
    prompt_text: str
    before_text: str
    text: str
    number: int
    """Place of the step in its output, from 0."""
    accepted: tuple[str, ...] = ()
    """The texts of the steps that ``before_text`` is made of."""


@dataclass
class Scored:
    """A row whose step the target is to read: the step, and which signals."""

    row: Row
    tokens: list[int]
    log_probabilities: bool
    entropies: bool
    grounding: bool


def read_with_target(side: Side, scored: Sequence[Scored]) -> tuple[list[Reading], list[Tensor]]:
    """One parallel pass of the target over each step, behind what it has not seen yet of the row.

    Returns the readings, and per row the state (hidden,) before the step. The step counts as processed then; ``side.rewind``
    to that state takes it back if it is rejected.
    """
    work, starts, tails = [], [], []
    for one in scored:
        seat = side.seats[one.row.slot]
        pending = one.row.committed_from(seat.length)
        starts.append(len(pending))
        tails.append(seat.tail)
        work.append(Work(one.row.slot, [*pending, *one.tokens], one.row.length if one.grounding else None))
        one.row.stats.scored_tokens += one.row.drafted_from(seat.length) + len(one.tokens)
    passed = side.feed(work)
    readings, bases, states = [], [], []
    for one, found, start, tail in zip(scored, passed, starts, tails, strict=True):
        base = found.states[start - 1] if start else tail
        assert base is not None
        bases.append(base)
        if one.log_probabilities or one.entropies:
            states.append(torch.cat([base.unsqueeze(0), found.states[start:-1]]))
    logits = side.head(torch.cat(states)) if states else None
    place = 0
    for one, found in zip(scored, passed, strict=True):
        log_probabilities: tuple[float, ...] = ()
        entropies: tuple[float, ...] = ()
        if logits is not None and (one.log_probabilities or one.entropies):
            own = logits[place : place + len(one.tokens)]
            place += len(one.tokens)
            try:
                chosen = torch.tensor(one.tokens, device=own.device)
                log_probabilities = tuple(token_log_probabilities(own, chosen).tolist())
                if one.entropies:
                    entropies = tuple(entropy(own).tolist())
            except NumericalError as error:
                raise NumericalError(
                    f"the target cannot score step {len(one.row.steps)} of prompt {one.row.number}: {error}"
                ) from error
        groundings: tuple[float, ...] = ()
        if one.grounding:
            masses = side.seats[one.row.slot].masses
            before = None if masses is None else masses[:, : one.row.length]
            groundings = groundings_of([found], len(one.tokens), one.row, "target", before=before)
        readings.append(Reading(log_probabilities, entropies, groundings))
    return readings, bases


def log_probability_of(reading: Reading, config: StepVerifiedConfig) -> float:
    """The step's log-probability signal (LPBV), nats."""
    return _reduced("log-probabilities", reading.log_probabilities, config.log_probability_reduce)


def grounding_of(reading: Reading, config: StepVerifiedConfig) -> float:
    """The step's grounding signal (ABGV), in [0, 1]; a rank among calibrated tokens with debias="position-ecdf"."""
    values = reading.groundings
    if config.debias == "position-ecdf":
        tables = config.position_quantiles
        values = tuple(
            bisect_right(tables[min(place, len(tables) - 1)], value) / len(tables[min(place, len(tables) - 1)])
            for place, value in enumerate(values)
        )
    return _reduced("groundings", values, config.grounding_reduce)


def score_of(
    config: StepVerifiedConfig,
    draft: Reading | None,
    target: Reading | None,
    agreement: float | None,
    *,
    history: dict[str, list[float]],
    among: Sequence[Reading] = (),
) -> float:
    """The score of a step. ``history``: earlier values of the same row, for running extremes; this step's are appended.

    ``among``: the readings of all candidates, for extremes over the group.
    """
    reading = draft if config.signal_model == "draft" else target
    if config.score == "agreement":
        if agreement is None:
            raise DataError("score='agreement' was asked of a step without candidates; expected at least one.")
        return agreement
    if config.score == "likelihood-ratio":
        if draft is None or target is None:
            raise DataError("score='likelihood-ratio' needs the log-probabilities of both models.")
        return sum(target.log_probabilities) - sum(draft.log_probabilities)
    if reading is None:
        raise DataError(f"the step has no signals of the {config.signal_model} model; expected them to be read.")
    if config.score == "entropy":
        return _reduced("entropies", [-value for value in reading.entropies], config.log_probability_reduce)
    if config.score == "log-probability":
        return log_probability_of(reading, config)
    if config.score == "grounding":
        return grounding_of(reading, config)
    score = 0.0
    for weight, name, value_of in (
        (config.beta, "log_probability", log_probability_of),
        (1 - config.beta, "grounding", grounding_of),
    ):
        if weight:
            value = value_of(reading, config)
            seen = history.setdefault(name, [])
            seen.append(value)
            pool = [value_of(other, config) for other in among] if config.normaliser.kind == "group" else seen
            score += weight * config.normaliser.normalised(name, value, among=pool)
    return score


def checked_score(value: object, row: Row) -> float:
    """``value`` as a number. Raises :class:`~telltale.errors.NumericalError` naming the step if it is none."""
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"the verifier gave {type(value).__name__} for step {len(row.steps)} of prompt {row.number}; expected a number."
        ) from None
    if math.isnan(score):
        raise NumericalError(f"the score of step {len(row.steps)} of prompt {row.number} is NaN; expected a number.")
    return score


def _reduced(name: str, values: Sequence[float], how: str) -> float:
    if not values:
        raise DataError(f"the step has no {name}; expected the model to give them.")
    return float(reduced(torch.tensor(values, dtype=torch.float64), how))
