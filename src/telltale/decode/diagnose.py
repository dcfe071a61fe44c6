"""Will self-speculation pay on this checkpoint, on this machine? Quality of every exit, pass costs, and a plain verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from telltale.decode.costs import Costs, costs_of
from telltale.models.exits import exit_quality
from telltale.models.open import open_decoder

LONGEST_DRAFT = 12
WORTH_IT = 1.05
"""Predicted speed-up from which the verdict is yes."""


@dataclass(frozen=True)
class ExitOutlook:
    """One exit layer: its held-out loss (nats per token), how often it agrees with the last layer on the next token, the draft
    length that suits it best, the part of such drafts that should be accepted, and the speed-up that should result."""

    exit_layer: int
    loss: float
    agreement: float
    draft_length: int
    expected_acceptance: float
    predicted_speedup: float


@dataclass(frozen=True)
class Diagnosis:
    """The outlook of every exit, the costs behind it, and a verdict in words."""

    exits: list[ExitOutlook]
    last_loss: float
    tokens: int
    costs: Costs
    backend: str
    pays: bool
    verdict: str

    @property
    def best(self) -> ExitOutlook:
        """The exit with the highest predicted speed-up."""
        return max(self.exits, key=lambda outlook: outlook.predicted_speedup)


def diagnose(model: nn.Module, batches: Iterable[Tensor], *, backend: str = "auto") -> Diagnosis:
    """Examine ``model`` on ``batches`` of token ids, each (batch, length), and time its passes on this machine.

    Agreement is measured on given text; acceptance while decoding is usually higher, since a model's own text is easier
    to predict than a person's. Raises :class:`~telltale.errors.DataError` if there is no token to predict.
    """
    decoder = open_decoder(model, backend=backend)
    quality = exit_quality(model, batches)
    costs = costs_of(decoder, 1)
    exits = []
    for exit_layer in range(1, decoder.layers):
        agreement = quality.agreement[exit_layer - 1]
        options = [
            (costs.speedup(exit_layer, length, expected_acceptance(agreement, length)), length)
            for length in range(1, LONGEST_DRAFT + 1)
        ]
        speedup, length = max(options)
        exits.append(
            ExitOutlook(
                exit_layer=exit_layer,
                loss=quality.losses[exit_layer - 1],
                agreement=agreement,
                draft_length=length,
                expected_acceptance=expected_acceptance(agreement, length),
                predicted_speedup=speedup,
            )
        )
    pays = bool(exits) and max(outlook.predicted_speedup for outlook in exits) >= WORTH_IT
    verdict = _verdict(exits, costs, pays=pays)
    return Diagnosis(exits, quality.losses[-1], quality.tokens, costs, decoder.backend, pays, verdict)


def expected_acceptance(agreement: float, draft_length: int) -> float:
    """Accepted part of d drafts when each agrees with the whole model with the same probability, independently."""
    if draft_length == 0:
        return 0.0
    return sum(agreement**position for position in range(1, draft_length + 1)) / draft_length


def _verdict(exits: list[ExitOutlook], costs: Costs, *, pays: bool) -> str:
    if not exits:
        return "No: the model has one layer, so no early exit to draft from. Plain decoding is the choice."
    best = max(exits, key=lambda outlook: outlook.predicted_speedup)
    if pays:
        return (
            f"Yes: drafting {best.draft_length} tokens at exit layer {best.exit_layer} should give about "
            f"{best.predicted_speedup:.2f}x the speed of plain decoding, with the same tokens. "
            f'exit_layer="auto" finds this by itself.'
        )
    ideal = max(
        (costs.speedup(outlook.exit_layer, length, 0.8), outlook.exit_layer)
        for outlook in exits
        for length in range(1, LONGEST_DRAFT + 1)
    )
    head = (
        f"No: the best exit, layer {best.exit_layer}, agrees with the last layer on {best.agreement:.0%} of next tokens; "
        f"the predicted speed is {best.predicted_speedup:.2f}x plain decoding."
    )
    if ideal[0] < WORTH_IT:
        return (
            f"{head} Even with 80% of drafts accepted it would be {ideal[0]:.2f}x: on this machine a pass over several "
            f"tokens costs {costs.relative(5):.1f} single ones (5 tokens), so use plain decoding or n-gram drafts."
        )
    return (
        f"{head} The early layers were not trained to predict: fine-tune with the LayerSkip recipe "
        f"(`telltale train --recipe layerskip --model CHECKPOINT`). At 80% acceptance this machine would give {ideal[0]:.2f}x."
    )
