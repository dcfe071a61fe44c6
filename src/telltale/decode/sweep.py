"""Every exit layer with every draft length on the same prompts: measured speed-up beside the cost model's.

The plain decoder runs between the points, so that a drifting machine moves both sides of each ratio.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor, nn

from telltale.decode.autoregressive import Autoregressive
from telltale.decode.costs import Costs, costs_of
from telltale.decode.self_speculative import SelfSpeculative
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder
from telltale.models.open import open_decoder
from telltale.runs.files import write_atomically

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)


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
    costs: Costs

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
    exits = list(exit_layers) if exit_layers is not None else list(range(1, decoder.layers))
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
            base = _seconds(plain, prompts, new_tokens)
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


def _seconds(plain: Autoregressive, prompts: Sequence[Tensor], new_tokens: int) -> float:
    began = time.process_time()
    for prompt in prompts:
        plain.generate(prompt, max_new_tokens=new_tokens, eos_token_id=[])
    return time.process_time() - began
