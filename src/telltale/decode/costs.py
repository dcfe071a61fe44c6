"""Seconds that passes of a decoder take on this machine, measured on a scratch cache: the V(n) and h of the cost model.

A round that drafts k tokens at exit E costs ``draft(E, k) + verify(E, k + 1)`` (LayerSkip's cost model with measured
widths): ``draft = overhead + (k+1) E c + k h`` and ``verify(E, n) = base(n) + (L - E) layer(n)``.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from telltale.models.decoder import Decoder

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17)
_CONTEXT = 64
_SECONDS_PER_PASS = 2e-3
"""Measuring a pass goes on for about this long, twice at least: short passes are the noisy ones."""

_KNOWN: WeakKeyDictionary[Decoder, dict[int, Costs]] = WeakKeyDictionary()


class Costs:
    """Pass costs in seconds for ``batch`` rows of one decoder."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        layers = decoder.layers
        clock = clock_of(decoder)
        self.layers = layers
        context = max(0, min(_CONTEXT, decoder.max_positions - 2 * WIDTHS[-1]))
        widths = [width for width in WIDTHS if context + width < decoder.max_positions] or [1]
        cache = decoder.new_cache(batch, context + 2 * widths[-1])
        at = [context] * batch
        tokens = [0] * batch

        def verify(first: int, width: int) -> float:
            states = torch.zeros(batch, width, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device)
            return _seconds(lambda: decoder.verify_greedy(states, at, exit_layer=first, cache=cache), clock)

        def draft(exit_layer: int, length: int) -> float:
            return _seconds(
                lambda: decoder.draft_greedy(tokens, at, exit_layer=exit_layer, length=length, cache=cache), clock
            )

        # Layers and head are weighed by their parameters, not timed apart: a layer that runs alone stays in the processor's
        # cache and looks several times cheaper than it is among the others.
        layer_size = sum(parameter.numel() for parameter in decoder.parts.layers[0].parameters())
        self._head = decoder.vocabulary_size * decoder.hidden_size / max(layer_size, 1)
        whole = layers + self._head
        single = verify(0, 1)
        if batch == 1 and context + 8 < decoder.max_positions:
            self.plain = min(
                _seconds(lambda: decoder.decode_greedy(0, context, count=4, cache=cache), clock) / 4, single
            )
        else:
            self.plain = single
        self._call = single - self.plain
        # An expensive model is measured at few widths; between them costs are interpolated.
        if single > 4 * _SECONDS_PER_PASS:
            widths = [width for width in widths if width in (1, 2, 4, 8, 17)]
        self._widths = widths
        passes = [min(pair) for pair in zip(*[[verify(0, width) for width in widths] for _ in range(2)], strict=True)]
        # Other work on the machine only ever adds time, and no pass costs more than a wider one.
        passes = [min(passes[index:]) for index in range(len(passes))]
        self._layer = [(seconds - self._call) / whole for seconds in passes]
        self.step_layer = self.plain / whole
        middle = max(1, layers // 2)
        steps = (2 * middle + self._head) * self.step_layer
        self._draft_call = self._call
        if context + 2 < decoder.max_positions:
            drafting = min(draft(middle, 1), draft(middle, 1))
            self._draft_call = min(max(drafting - steps, 0.0), 0.5 * steps)

    def draft(self, exit_layer: int, length: int) -> float:
        """``length`` draft steps at ``exit_layer`` and the early pass of the last drafted token."""
        return self._draft_call + ((length + 1) * exit_layer + length * self._head) * self.step_layer

    def verify(self, exit_layer: int, width: int) -> float:
        """Layers E..L-1 and the head on ``width`` tokens."""
        return self._call + (self.layers - exit_layer + self._head) * self._at(width)

    def round(self, exit_layer: int, length: int) -> float:
        """One self-speculation round: ``length`` drafts at exit E and their verification."""
        return self.draft(exit_layer, length) + self.verify(exit_layer, length + 1)

    def speedup(self, exit_layer: int, length: int, acceptance_rate: float) -> float:
        """Tokens per second over plain decoding if this part of the drafted tokens is accepted: (1 + r d) tokens a round."""
        return (1.0 + acceptance_rate * length) * self.plain / self.round(exit_layer, length)

    def relative(self, width: int) -> float:
        """V(n): what a layer costs for ``width`` tokens, over what it costs for one."""
        return self._at(width) / max(self._at(1), 1e-12)

    def score(self, width: int) -> float:
        """All layers and the head on ``width`` tokens."""
        return self.verify(0, width)

    def _at(self, width: int) -> float:
        """One layer on ``width`` tokens."""
        place = bisect_left(self._widths, width)
        if place == len(self._widths):
            return self._layer[-1] * width / self._widths[-1]
        if place == 0 or self._widths[place] == width:
            return self._layer[place]
        low, high = self._widths[place - 1], self._widths[place]
        share = (width - low) / (high - low)
        return self._layer[place - 1] * (1 - share) + self._layer[place] * share


def costs_of(decoder: Decoder, batch: int) -> Costs:
    """Measured once per decoder and batch size (rounded up to a power of two), on first use."""
    size = 1 << (batch - 1).bit_length()
    known = _KNOWN.setdefault(decoder, {})
    if size not in known:
        known[size] = Costs(decoder, size)
    return known[size]


def clock_of(decoder: Decoder) -> Callable[[], float]:
    """What tells the seconds of a pass: the thread's CPU time where one thread does all, so that neighbours do not count."""
    alone = decoder.device.type == "cpu" and (decoder.threads or torch.get_num_threads()) == 1
    return time.thread_time if alone else time.perf_counter


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The shortest of several runs, after one that warms up."""
    work()
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 2 or (spent < _SECONDS_PER_PASS and repeats < 20):
        start = clock()
        work()
        taken = clock() - start
        best, spent, repeats = min(best, taken), spent + taken, repeats + 1
    return best
