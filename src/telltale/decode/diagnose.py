"""Will self-speculation pay on a checkpoint? What its exits and n-grams give today, and what training could make of it.

A recommendation to train names only what can be reached: an exit that the recipe does train, with the draft length, the
steps and the memory that it assumes. Today's figures are measured on this machine, training's are predictions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.decode.costs_report import (
    WORTH_IT,
    best_draft,
    exit_acceptance,
    expected_acceptance,
    shortest_seconds,
)
from telltale.decode.decoders import Autoregressive, SelfSpeculative
from telltale.decode.pass_costs import PassCosts, costs_of
from telltale.models.decoder import Decoder
from telltale.models.exits import ExitQuality, exit_quality
from telltale.models.open import open_decoder

EARLIEST_EXIT = 0.25
"""Part of the depth from which trained exits are counted on: most exits of LayerSkip's tables 3 to 6 (8 of 32, 6 of 24).
Its loss weighs exits by the square of their depth (eq. 6), and the first not at all."""
TRAINED_AGREEMENT = 0.9
"""Share of next tokens on which a trained exit agrees: what acceptances of 45% to 77% of 6 to 12 drafts come to there."""
TRAINING_STEPS = 10_000
"""Optimizer steps of the paper's fine-tuning run (Table 8)."""
BYTES_PER_PARAMETER = 16
"""Float32 weights, gradients, and AdamW's two moments."""
NGRAM_PROMPTS = 3
"""Texts that n-gram drafts are tried behind, one after another."""
NGRAM_TOKENS = 48
"""Tokens decoded behind each, and the longest prompt."""


@dataclass(frozen=True)
class ExitOutlook:
    """One exit layer: its held-out loss (nats per token; None for a draft exit of a retrofit, which predicts a shortlist alone),
    how often it agrees with the last layer on the next token, the draft length that suits it best, the part of such drafts that
    should be accepted, and the speed-up that should result."""

    exit_layer: int
    loss: float | None
    agreement: float
    draft_length: int
    expected_acceptance: float
    predicted_speedup: float


@dataclass(frozen=True)
class NgramOutlook:
    """N-gram drafts, run on this machine behind the data's own texts: the part of ``drafted`` tokens that was accepted, and the
    measured speed-up over plain decoding."""

    drafted: int
    acceptance: float
    speedup: float


@dataclass(frozen=True)
class TrainingOutlook:
    """What the recipe could reach: an exit that it trains, the draft length that suits it, the agreement that is assumed, the
    part of such drafts that would be accepted, and the speed-up that would result; and what it takes: optimizer steps,
    and bytes of weights, gradients and optimizer state (activations apart), of those that the device has."""

    exit_layer: int
    draft_length: int
    agreement: float
    expected_acceptance: float
    predicted_speedup: float
    steps: int
    memory_bytes: int
    device_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.memory_bytes <= self.device_bytes


@dataclass(frozen=True)
class Diagnosis:
    """The outlook of every exit that ``auto`` would draft from, of n-grams and of training, the costs behind them, and a verdict
    in words.

    ``pays`` is about the exits as they are. ``ngram`` is None where no text leaves room to decode, ``training`` where the model
    is too shallow for an exit that the recipe trains.
    """

    exits: list[ExitOutlook]
    last_loss: float
    tokens: int
    costs: PassCosts
    backend: str
    pays: bool
    verdict: str
    ngram: NgramOutlook | None
    training: TrainingOutlook | None

    @property
    def best(self) -> ExitOutlook:
        """The exit with the highest predicted speed-up."""
        return max(self.exits, key=lambda outlook: outlook.predicted_speedup)


def diagnose(model: nn.Module, batches: Iterable[Tensor], *, backend: str = "auto") -> Diagnosis:
    """Examine ``model`` on ``batches`` of token ids, each (batch, length), and time it on this machine.

    Where draft exits of a retrofit lie beside the checkpoint, they are judged, since these are what drafts.
    Agreement is measured on given text; acceptance while decoding is usually higher, since a model's own text is easier
    to predict than a person's. Raises :class:`~telltale.errors.DataError` if there is no token to predict.
    """
    decoder = open_decoder(model, backend=backend)
    given = list(batches)
    quality = exit_quality(model, given)
    decoder.open_draft_exits()
    costs = costs_of(decoder, 1)
    acceptance = exit_acceptance(decoder, quality, given)
    exits = [_outlook(decoder, costs, quality, layer, acceptance[layer]) for layer in decoder.drafting_exits]
    pays = bool(exits) and max(outlook.predicted_speedup for outlook in exits) >= WORTH_IT
    ngram = _ngrams(decoder, given)
    training = _trained(decoder, costs, quality)
    verdict = _verdict(exits, ngram, training, costs, pays=pays)
    return Diagnosis(exits, quality.losses[-1], quality.tokens, costs, decoder.backend, pays, verdict, ngram, training)


def _outlook(
    decoder: Decoder, costs: PassCosts, quality: ExitQuality, exit_layer: int, acceptance: list[float]
) -> ExitOutlook:
    speedup, length = best_draft(costs, exit_layer, acceptance)
    return ExitOutlook(
        exit_layer=exit_layer,
        loss=quality.losses[exit_layer - 1] if decoder.draft_heads is None else None,
        agreement=acceptance[0],
        draft_length=length,
        expected_acceptance=expected_acceptance(acceptance, length),
        predicted_speedup=speedup,
    )


def _ngrams(decoder: Decoder, batches: list[Tensor]) -> NgramOutlook | None:
    """Decode behind beginnings of the data, plainly and with n-gram drafts."""
    rows = [row for batch in batches for row in batch][:: max(1, sum(len(batch) for batch in batches) // NGRAM_PROMPTS)]
    longest = min(NGRAM_TOKENS, decoder.max_positions // 2)
    prompts = [row[:longest].tolist() for row in rows[:NGRAM_PROMPTS] if longest]
    if not prompts:
        return None
    room = min(NGRAM_TOKENS, decoder.max_positions - max(map(len, prompts)))
    plain, drafting = Autoregressive(decoder), SelfSpeculative(decoder, drafter="ngram")
    last: list[Any] = []

    def run(contestant: Any) -> None:
        last[:] = [contestant.generate([one], max_new_tokens=room, eos_token_id=[]).stats for one in prompts]

    best = shortest_seconds(decoder, [lambda: run(plain), lambda: run(drafting)])
    drafted, accepted = sum(stats.drafted for stats in last), sum(stats.accepted for stats in last)
    return NgramOutlook(drafted, accepted / drafted if drafted else 0.0, best[0] / max(best[1], 1e-9))


def _trained(decoder: Decoder, costs: PassCosts, quality: ExitQuality) -> TrainingOutlook | None:
    """The best exit among those that the recipe trains, if it comes to agree as the paper's do."""
    first = max(2, math.ceil(decoder.layers * EARLIEST_EXIT))
    options = []
    for exit_layer in range(first, decoder.layers):
        agreement = max(TRAINED_AGREEMENT, quality.agreement[exit_layer - 1])
        speedup, length = best_draft(costs, exit_layer, [agreement])
        options.append((speedup, -exit_layer, length, agreement))
    if not options:
        return None
    speedup, negative, length, agreement = max(options)
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    return TrainingOutlook(
        exit_layer=-negative,
        draft_length=length,
        agreement=agreement,
        expected_acceptance=expected_acceptance([agreement], length),
        predicted_speedup=speedup,
        steps=TRAINING_STEPS,
        memory_bytes=BYTES_PER_PARAMETER * parameters,
        device_bytes=_memory_of(decoder.device),
    )


def _memory_of(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _verdict(
    exits: list[ExitOutlook],
    ngram: NgramOutlook | None,
    training: TrainingOutlook | None,
    costs: PassCosts,
    *,
    pays: bool,
) -> str:
    if not exits:
        return f"No: the model has one layer, so no early exit to draft from. {_today(ngram)}"
    best = max(exits, key=lambda outlook: outlook.predicted_speedup)
    if pays:
        return (
            f"Yes: drafting {best.draft_length} tokens at exit layer {best.exit_layer} should give about "
            f"{best.predicted_speedup:.2f}x the speed of plain decoding, with the same tokens. "
            f'exit_layer="auto" finds this setting.'
        )
    head = (
        f"No: the best exit, layer {best.exit_layer}, agrees with the last layer on {best.agreement:.0%} of next tokens; "
        f"the predicted speed is {best.predicted_speedup:.2f}x plain decoding."
    )
    return f"{head} {_today(ngram)} {_after(training, costs)}"


def _today(ngram: NgramOutlook | None) -> str:
    """What can be had without training."""
    if ngram is None:
        return "Plain decoding is the choice: the texts leave no room to try n-gram drafts."
    if not ngram.drafted:
        return "Today plain decoding is the choice: n-gram drafts found nothing to repeat in these texts, or no gain in it."
    measured = (
        f"n-gram drafts gave {ngram.speedup:.2f}x on these texts ({ngram.acceptance:.0%} of {ngram.drafted} accepted)"
    )
    if ngram.speedup >= WORTH_IT:
        return f'Today {measured}, with the same tokens and without any training: drafter="ngram".'
    return f"Today plain decoding is the choice: {measured}."


def _after(training: TrainingOutlook | None, costs: PassCosts) -> str:
    """What training could give, and what it takes."""
    if training is None:
        return "The model is too shallow for an exit that the LayerSkip recipe trains."
    drafts = f"drafts of {training.draft_length} token" + "s" * (training.draft_length > 1)
    reach = (
        f"exit layer {training.exit_layer} with {drafts} would give "
        f"{training.predicted_speedup:.2f}x if it came to agree on {training.agreement:.0%} of next tokens"
    )
    if training.predicted_speedup < WORTH_IT:
        return (
            f"Training would not help on this machine, where a pass over 5 tokens costs {costs.relative(5):.1f} single ones: "
            f"of the exits that the LayerSkip recipe trains, {reach}."
        )
    device = f"of this machine's {training.device_bytes / 1e9:.1f} GB"
    fits = device if training.fits else f"more than {device.removeprefix('of ')}; train elsewhere"
    return (
        f"Trained with the LayerSkip recipe (`telltale train --recipe layerskip --model CHECKPOINT`), {reach}, as the paper's "
        f"models do from a quarter of their depth on. Theirs took about {training.steps:,} steps; weights, gradients and "
        f"optimizer take {training.memory_bytes / 1e9:.1f} GB ({fits}), activations apart."
    )
